#!/usr/bin/env bash
# SDXL, all of the UNet and both text encoders, on many machines; run it on each, with its own node_rank.
#   bash test/pretrain_full_nm_np_sdxl.sh --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_ip=x.x.x.x --master_port=8989
# Change the values here, or give them as flags: --max_train_epoch=13. Any other flag of train_sdxl.py works as well.
script=train_sdxl.py
network=sdxl_full
model_name=stabilityai/stable-diffusion-xl-base-1.0    # a folder, or a name on the hub
vae_name=madebyollin/sdxl-vae-fp16-fix
dataset_name=lambdalabs/naruto-blip-captions    # a folder of images, or a name on the hub
batch_size=4
resolution=1024,1024
max_train_epoch=120
nproc_per_node=8
script_flags=(--enable_bucket --gradient_checkpointing --learning_rate 1e-6 --train_text_encoder --learning_rate_te1 1e-7
              --learning_rate_te2 1e-7 --lr_scheduler cosine_with_restarts --lr_warmup_steps 0
              --optimizer_sharding zero1)    # AdamW's moments once for all processes, not once for each
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
