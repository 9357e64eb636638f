# Sourced by the launch scripts beside it, each of which sets `script` and what differs from the values below.
# Every variable can be given as a flag (--batch_size=4 or --batch_size 4); every other flag goes to the training script.
#
#   model_name vae_name dataset_name      a folder, or a name on the hub
#   batch_size resolution mixed_precision max_train_epoch max_train_steps
#   device                                auto, npu, cuda, cpu
#   nproc_per_node nnodes node_rank master_ip master_port
#   max_restarts                          how often a group with a dead worker starts again by itself, from its last checkpoint
#   min_nodes                             go on with so many machines when others are lost (with --global_batch_size, as before)
#   rdzv_conf                             more settings of the machines' meeting, such as last_call_timeout=10
#   output_path                           model, logs and results; of many machines, the same shared folder
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
complain() { echo "error: $*" >&2; exit 2; }

network=${network:-$(basename "$script" .py)} model_name=${model_name:-} vae_name=${vae_name:-} dataset_name=${dataset_name:-}
batch_size=${batch_size:-4} resolution=${resolution:-1024,1024} mixed_precision=${mixed_precision:-} device=auto
max_train_epoch=${max_train_epoch:-120} max_train_steps='' output_path='' max_restarts=0 min_nodes='' rdzv_conf=''
nproc_per_node=${nproc_per_node:-1} nnodes=${nnodes:-1} node_rank=0 master_ip='' master_port=8989
known=" model_name vae_name dataset_name batch_size resolution mixed_precision max_train_epoch max_train_steps device nproc_per_node
 nnodes min_nodes node_rank master_ip master_port max_restarts rdzv_conf output_path "

passed=()
while [ $# -gt 0 ]; do
    name=${1%%=*} name=${name#--}
    case "$name" in    # the training scripts' names of the same
        master_addr) name=master_ip ;;
        max_train_epochs | num_train_epochs) name=max_train_epoch ;;
        train_batch_size) name=batch_size ;;
        output_dir) name=output_path ;;
        train_data_dir) name=dataset_name ;;
        pretrained_model_name_or_path) name=model_name ;;
        vae | pretrained_vae_model_name_or_path) name=vae_name ;;
    esac
    if [[ $1 == --* && $known == *[[:space:]]"$name"[[:space:]]* ]]; then
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            [ $# -gt 1 ] || complain "--$name: its value is missing"
            value=$2
            shift
        fi
        printf -v "$name" %s "$value"
    else
        passed+=("$1")
    fi
    shift
done
min_nodes=${min_nodes:-$nnodes}
for name in batch_size max_train_epoch nproc_per_node nnodes min_nodes master_port; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || complain "--$name=${!name}: give a whole number above 0"
done
for name in node_rank max_restarts; do
    [[ ${!name} =~ ^[0-9]+$ ]] || complain "--$name=${!name}: give a whole number"
done
[ -z "$max_train_steps" ] || [[ $max_train_steps =~ ^[1-9][0-9]*$ ]] || complain "--max_train_steps=$max_train_steps: give a whole number above 0"
[ "$node_rank" -lt "$nnodes" ] || complain "--node_rank=$node_rank: of $nnodes machines, the last has rank $((nnodes - 1))"
[ "$min_nodes" -le "$nnodes" ] || complain "--min_nodes=$min_nodes: there are $nnodes machines"
[ "$min_nodes" -eq "$nnodes" ] || [ "$max_restarts" -gt 0 ] || complain "--min_nodes needs --max_restarts: the others start again"
[ "$nnodes" -eq 1 ] || [ -n "$master_ip" ] || complain "--master_ip is missing: the address of the machine with --node_rank=0, on all machines"
[ -n "$model_name" ] || complain "--model_name is missing: the folder of the base model, or its name on the hub"
other_data=false
for word in ${passed[@]+"${passed[@]}"}; do
    case "${word%%=*}" in --data_backend_config | --dataset_config | --instance_data_dir) other_data=true ;; esac
done
$other_data || [ -n "$dataset_name" ] || complain "--dataset_name is missing: the folder of the images, or the name of a data set on the hub"

# the machine
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3 || command -v python || true)}
[ -n "$python" ] || complain "there is no Python: install it, or name it: PYTHON=/path/to/python bash $0"
own=''
if [ "$nnodes" -gt 1 ]; then    # by which address this machine is reached: its name need not be known to the others
    own=$("$python" -c 'import socket, sys
probe = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((sys.argv[1], int(sys.argv[2])))
print(probe.getsockname()[0])' "$master_ip" "$master_port") || complain "--master_ip=$master_ip: no way leads there from this machine"
    [[ $own != 127.* || $master_ip == 127.* || $master_ip == localhost ]] \
        || complain "--master_ip=$master_ip is $own on this machine, which no other one can reach: give its address instead of its name"
fi
if [ -d /usr/local/Ascend ] || [ -f /etc/Ascend/ascend_cann_install.info ] || [ -d "${HOME:-}/Ascend" ] \
        || [ -n "${ASCEND_HOME_PATH:-}" ]; then
    source "$here/env_npu.sh"    # for --device=cpu, too: torch_npu is loaded with torch
fi
case "$device" in
    cpu) export ACCELERATE_USE_CPU=true ;;
    auto | npu | cuda)
        found=$(PYTHONPATH="$root:${PYTHONPATH:-}" "$python" -c 'from library import errors
errors.explain_imports("launch.sh")
with errors.exit_on_user_error("launch.sh"):
    from library.training import devices
    print(devices.best())' | tail -n 1) \
            || complain "PyTorch does not start in $python: its words are above"
        [ "$device" = auto ] || [ "$device" = "$found" ] || complain "--device=$device: PyTorch finds no such device here, but $found"
        device=$found
        if [ "$device" = cpu ]; then export ACCELERATE_USE_CPU=true; fi ;;
    *) complain "--device=$device: there are auto, npu, cuda and cpu" ;;
esac
[ "$device" != cpu ] || mixed_precision=${mixed_precision:-no}    # a CPU has no fp16 training
mixed_precision=${mixed_precision:-fp16}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / nproc_per_node > 0 ? cores / nproc_per_node : 1))}    # no core is asked twice

# the command
case_name=${network}_bs${batch_size}_$((nnodes * nproc_per_node))p
output_path=${output_path:-$here/output/$case_name}
mkdir -p "$output_path" || complain "--output_path: cannot make $output_path"
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}    # else twenty lines of C++ for each connection that a dead process leaves
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # else the processes of a restart read what those before it left (pytorch 135712)
if [ $((nnodes * nproc_per_node)) -eq 1 ] && [ "$max_restarts" -eq 0 ]; then
    launcher=("$python")
elif [ "$nnodes" -eq 1 ]; then    # finds a free port
    launcher=("$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc_per_node" --max_restarts="$max_restarts")
elif [ "$max_restarts" -gt 0 ]; then    # machines that meet anew when one of them has lost a worker
    launcher=("$python" -m torch.distributed.run --nnodes="$min_nodes:$nnodes" --nproc_per_node="$nproc_per_node"
              --max_restarts="$max_restarts" --rdzv_backend=c10d --rdzv_endpoint="$master_ip:$master_port" --rdzv_id="$case_name"
              --local_addr="$own"
              --rdzv_conf="is_host=$([ "$node_rank" -eq 0 ] && echo true || echo false)${rdzv_conf:+,$rdzv_conf}")
else
    launcher=("$python" -m torch.distributed.run --nnodes="$nnodes" --nproc_per_node="$nproc_per_node" --node_rank="$node_rank"
              --master_addr="$master_ip" --master_port="$master_port")
fi
flags=(--pretrained_model_name_or_path "$model_name" --train_batch_size "$batch_size" --resolution "$resolution"
       --mixed_precision "$mixed_precision" --num_train_epochs "$max_train_epoch" --output_dir "$output_path" --seed 1)
if $other_data; then :
elif [ -d "$dataset_name" ]; then flags+=(--train_data_dir "$dataset_name"); else flags+=(--dataset_name "$dataset_name"); fi
[ -z "$vae_name" ] || flags+=(--pretrained_vae_model_name_or_path "$vae_name")
[ -z "$max_train_steps" ] || flags+=(--max_train_steps "$max_train_steps")
[ "$max_restarts" -eq 0 ] || flags+=(--resume_from_checkpoint latest)
[ "$device" != npu ] || [ "$mixed_precision" = no ] || flags+=(--attention_mechanism npu)

# the run; one that is taken up adds to what it said before
log=$output_path/train_$node_rank.log
add=
if [ "$max_restarts" -gt 0 ] || [[ " ${passed[*]-} " == *" --resume"* ]]; then add=-a; fi
before=$(cat "$output_path/metrics.jsonl" 2>/dev/null || true)    # of a run that this launch goes on with
begin=$(date +%s.%N)
status=0
"${launcher[@]}" "$root/$script" "${flags[@]}" ${script_flags[@]+"${script_flags[@]}"} ${passed[@]+"${passed[@]}"} 2>&1 \
    | (trap '' INT TERM; exec tee $add "$log") || status=$?    # it outlives a stop, whose last words would break the training
end=$(date +%s.%N)
if [ "$status" -ne 0 ]; then
    echo "error: training ended with status $status; all it said is in $log" >&2
    exit "$status"
fi
if [ "$node_rank" -eq 0 ]; then
    "$python" "$here/result.py" "$output_path" --network "$network" --seconds "$(echo "$begin $end" | awk '{print $2 - $1}')" \
        --before /dev/stdin <<< "$before"
fi
