#!/usr/bin/env bash
# An adapter for SDXL, on many machines; run it on each, with its own node_rank.
#   bash test/train_lora_nm_np_sdxl.sh --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_ip=x.x.x.x --master_port=8989
# Change the values here, or give them as flags: --max_train_epoch=13. Any other flag of train_lora_sdxl.py works as well.
script=train_lora_sdxl.py
network=sdxl_lora
model_name=stabilityai/stable-diffusion-xl-base-1.0    # a folder, or a name on the hub
vae_name=madebyollin/sdxl-vae-fp16-fix
dataset_name=lambdalabs/naruto-blip-captions    # a folder of images, or a name on the hub
batch_size=4
resolution=1024,1024
max_train_epoch=120
nproc_per_node=8
script_flags=(--enable_bucket --gradient_checkpointing --rank 16 --learning_rate 1e-4 --lr_scheduler cosine --lr_warmup_steps 0)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
