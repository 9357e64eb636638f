# Sourced by launch.sh on Ascend machines: finds CANN and sets what training wants. A variable that is set already stays.
# Meanings: "Ascend Extension for PyTorch, environment variables" and the CANN reference of the same name.

if [ -z "${ASCEND_HOME_PATH:-}" ]; then    # else its set_env.sh has been sourced
    cann=$(sed -n 's/^Install_Path=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null || true)
    for each in "${cann:-/usr/local/Ascend}" "${HOME:-}/Ascend"; do
        for kit in ascend-toolkit cann nnae; do
            if [ -f "$each/$kit/set_env.sh" ]; then
                set +eu; source "$each/$kit/set_env.sh"; set -eu    # it reads variables that are not set, and tries commands that fail
                break 2
            fi
        done
    done
fi

keep() { [ -n "${!1:-}" ] || export "$1=$2"; }
keep TASK_QUEUE_ENABLE 2              # a second thread hands operators to the device, and makes their workspaces: less waiting
keep COMBINED_ENABLE 1                # pairs of operators on strided tensors become one copy
keep CPU_AFFINITY_CONF 1              # each process on a share of the cores, in their order, and so of few NUMA nodes
keep PYTORCH_NPU_ALLOC_CONF expandable_segments:True    # buckets differ in size: their memory would break into pieces
keep HCCL_WHITELIST_DISABLE 1         # no list of hosts that may connect
keep HCCL_CONNECT_TIMEOUT 1200        # seconds for all hosts to appear: the first ones wait for the last to load its model
keep HCCL_EXEC_TIMEOUT 17340          # seconds a collective may last, the most that a 910A takes: one process may be encoding
                                      # or saving meanwhile, and a dead one is found by --rank_timeout
keep HCCL_BUFFSIZE 120                # MB a link for collectives: gradients come in buckets of 25 MB
[ -z "${own:-}" ] || keep HCCL_IF_IP "$own"    # of many machines: the address that the others see (launch.sh)
keep ASCEND_SLOG_PRINT_TO_STDOUT 0    # the device's log goes to its file, not among the lines of training
keep ASCEND_GLOBAL_LOG_LEVEL 3        # errors alone: more slows each operator down
keep ASCEND_GLOBAL_EVENT_ENABLE 0     # no log of events, for the same reason
unset -f keep
