#!/usr/bin/env bash
# An adapter for SDXL, on one device of one machine.
#   bash test/train_lora_1m_1p_sdxl.sh
# Change the values here, or give them as flags: --max_train_epoch=13. Any other flag of train_lora_sdxl.py works as well.
script=train_lora_sdxl.py
network=sdxl_lora
model_name=stabilityai/stable-diffusion-xl-base-1.0    # a folder, or a name on the hub
vae_name=madebyollin/sdxl-vae-fp16-fix
dataset_name=lambdalabs/naruto-blip-captions    # a folder of images, or a name on the hub
batch_size=4
resolution=1024,1024
max_train_epoch=120
nproc_per_node=1
script_flags=(--enable_bucket --gradient_checkpointing --rank 16 --learning_rate 1e-4 --lr_scheduler cosine --lr_warmup_steps 0)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
