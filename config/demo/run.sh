#!/usr/bin/env bash
# The demo: a small SDXL, or with DEMO=sd3 a small SD 3.5, learns to draw handwritten digits, from nothing, on a CPU in minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${DEMO:-sdxl} in
    sdxl) out=${DEMO_DIR:-out/demo} script=train_sdxl.py make=make_model.py config=demo.json images=
          draw="--size 64 --scheduler ddim --steps 20 --guidance 5" more="--prompt \"three over eight\" ${draw/64/64,128}" ;;
    sd3) out=${DEMO_DIR:-out/demo_sd3} script=train_sd3.py make=make_model_sd3.py config=demo_sd3.json images=--singles
         draw="--size 64 --tokenizer_max_length 77 --steps 20 --guidance 3.5" more="--prompt seven $draw" ;;
    *) echo "DEMO=$DEMO: there is sdxl and sd3" >&2; exit 2 ;;
esac

python config/demo/make_images.py "$out/images" $images
python "config/demo/$make" "$out/model"
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    ${DEMO_ACCELERATE_FLAGS:---num_cpu_threads_per_process 2} "$script" --config_file "config/demo/$config" \
    --pretrained_model_name_or_path "$out/model" --train_data_dir "$out/images" --output_dir "$out/run" "$@"
python generate.py --model "$out/run" --prompt_file config/demo/prompts.txt --num_images 5 $draw \
    --batch_size 50 --output_dir "$out/images_drawn"

cat <<END

The demo is done. Open:
  $out/images_drawn/grid.png   digits that the model drew: a row for each of zero to nine
  $out/run/report.html         how the training went
  $out/run/loss_curve.png      its loss
  $out/run/                    the trained model, a diffusers pipeline
Draw more:
  .venv/bin/python generate.py --model $out/run $more
END
