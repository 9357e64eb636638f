#!/usr/bin/env bash
# The demo: a small SDXL learns to draw handwritten digits, from nothing, on a CPU in minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${DEMO_DIR:-out/demo}

python config/demo/make_images.py "$out/images"
python config/demo/make_model.py "$out/model"
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    ${DEMO_ACCELERATE_FLAGS:---num_cpu_threads_per_process 2} train_sdxl.py --config_file config/demo/demo.json \
    --pretrained_model_name_or_path "$out/model" --train_data_dir "$out/images" --output_dir "$out/run" "$@"
python generate.py --model "$out/run" --prompt_file config/demo/prompts.txt --num_images 5 --size 64 \
    --scheduler ddim --steps 20 --guidance 5 --batch_size 50 --output_dir "$out/images_drawn"

cat <<END

The demo is done. Open:
  $out/images_drawn/grid.png   digits that the model drew: a row for each of zero to nine
  $out/run/report.html         how the training went
  $out/run/loss_curve.png      its loss
  $out/run/                    the trained model, a diffusers pipeline
Draw more:
  .venv/bin/python generate.py --model $out/run --prompt "three over eight" --size 64,128 --scheduler ddim --steps 20 --guidance 5
END
