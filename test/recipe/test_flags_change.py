"""Every flag of the training scripts has a test in which it changes what it says it changes: the list, and its keeper.

An option that is accepted and then ignored is worse than none. A new flag without a line here makes the suite red.
"""

import ast
from pathlib import Path

import pytest

import train_lora_sd3
import train_lora_sdxl
import train_sd3
import train_sdxl
from library import flags, parser

TESTS = Path(__file__).resolve().parents[1]
MODEL, DATA, TRAINING, OUTPUT = (f"recipe/test_flags_{name}.py::test_" for name in ("model", "data", "training", "output"))
RATES, HUB, DEVICES = "unit/test_optimizers.py::test_", "recipe/test_hub.py::test_", "unit/test_devices.py::test_"
MACHINES = "recipe/test_machines.py::test_"
ATTENTION = "unit/test_attention.py::test_"
PREVIEWS = "recipe/test_previews.py::test_"
SETS, CAPTIONS, BACKEND = (f"recipe/test_{name}.py::test_" for name in ("data_sets", "flags_captions", "flags_backend"))
REFUSED = DEVICES + "flags_for_other_hardware_are_refused_on_a_cpu"    # without such hardware here, that is the test

SHOWN_BY = {
    "pretrained_model_name_or_path": MODEL + "base_model",
    "pretrained_vae_model_name_or_path": MODEL + "vae",
    "revision": MODEL + "revision",
    "variant": MODEL + "variant",
    "single_file_config": MODEL + "single_file_config",
    "tokenizer1_path": MODEL + "tokenizers",
    "tokenizer2_path": MODEL + "tokenizers",
    "max_token_length": MODEL + "max_token_length",
    "vae_dtype": MODEL + "vae_dtype",
    "gradient_checkpointing": MODEL + "gradient_checkpointing",
    "attention_mechanism": ATTENTION + "a_run_with_another_attention",
    "sageattention_usage": ATTENTION + "a_run_with_another_attention",
    "train_data_dir": DATA + "train_data_dir",
    "dataset_name": DATA + "dataset_name_its_config_and_cache",
    "dataset_config_name": DATA + "dataset_name_its_config_and_cache",
    "cache_dir": DATA + "dataset_name_its_config_and_cache",
    "image_column": DATA + "columns",
    "caption_column": DATA + "columns",
    "caption_extension": DATA + "caption_extension",
    "max_train_samples": DATA + "max_train_samples",
    "resolution": DATA + "resolution",
    "center_crop": DATA + "center_crop",
    "random_crop": DATA + "random_crop",
    "random_flip": DATA + "random_flip",
    "image_interpolation_mode": DATA + "image_interpolation_mode",
    "enable_bucket": DATA + "bucket_flags",
    "min_bucket_reso": DATA + "bucket_flags",
    "max_bucket_reso": DATA + "bucket_flags",
    "bucket_reso_steps": DATA + "bucket_flags",
    "bucket_no_upscale": DATA + "bucket_flags",
    "shuffle_caption": DATA + "shuffle_caption_and_keep_tokens",
    "keep_tokens": DATA + "shuffle_caption_and_keep_tokens",
    "proportion_empty_prompts": DATA + "proportion_empty_prompts",
    "skip_bad_images": DATA + "skip_bad_images",
    "dataloader_num_workers": DATA + "dataloader_num_workers",
    "cache_latents": MODEL + "cache_latents",
    "cache_text_encoder_outputs": MODEL + "cache_text_encoder_outputs",
    "embedding_cache_dir": MODEL + "embedding_cache_dir",
    "cache_variants": MODEL + "cache_variants",
    "vae_batch_size": MODEL + "batch_sizes_of_the_encoders",
    "text_encoder_batch_size": MODEL + "batch_sizes_of_the_encoders",
    "train_batch_size": TRAINING + "train_batch_size",
    "gradient_accumulation_steps": TRAINING + "gradient_accumulation_steps",
    "global_batch_size": MACHINES + "data_and_caches_of_each_machine",
    "layer_statistics": "recipe/test_layer_statistics.py::test_a_weight_that_was_scaled_is_named",
    "optimizer_sharding": "recipe/test_sharding.py::test_some_processes_make_the_losses_and_the_checkpoints_of_one",
    "rank_timeout": MACHINES + "fewer_machines_go_on",
    "num_train_epochs": TRAINING + "length_of_the_run",
    "max_train_steps": TRAINING + "length_of_the_run",
    "learning_rate": TRAINING + "learning_rate_and_scale_lr",
    "scale_lr": TRAINING + "learning_rate_and_scale_lr",
    "train_text_encoder": TRAINING + "train_text_encoder_and_its_rates",
    "learning_rate_te1": TRAINING + "train_text_encoder_and_its_rates",
    "learning_rate_te2": TRAINING + "train_text_encoder_and_its_rates",
    "lr_scheduler": RATES + "schedules_of_diffusers",
    "lr_warmup_steps": TRAINING + "learning_rate_schedule_of_a_run",
    "lr_num_cycles": RATES + "schedules_of_diffusers",
    "lr_power": RATES + "schedules_of_diffusers",
    "lr_scheduler_min_lr_ratio": RATES + "schedules_of_transformers",
    "lr_decay_steps": RATES + "schedules_of_transformers",
    "lr_scheduler_timescale": RATES + "schedules_of_transformers",
    "lr_step_rules": RATES + "schedules_of_diffusers",
    "max_grad_norm": TRAINING + "max_grad_norm",
    "optimizer": TRAINING + "optimizer_of_a_run",
    "optimizer_args": TRAINING + "optimizer_of_a_run",
    "use_8bit_adam": TRAINING + "optimizer_of_a_run",
    "adam_beta1": RATES + "adamw_is_torchs",
    "adam_beta2": RATES + "adamw_is_torchs",
    "adam_weight_decay": RATES + "adamw_is_torchs",
    "adam_epsilon": RATES + "adamw_is_torchs",
    "allow_tf32": REFUSED,
    "prediction_type": TRAINING + "prediction_type_and_zero_terminal_snr_of_a_run",
    "snr_gamma": TRAINING + "objective",
    "noise_offset": TRAINING + "objective",
    "zero_terminal_snr": TRAINING + "prediction_type_and_zero_terminal_snr_of_a_run",
    "timestep_bias_strategy": TRAINING + "timestep_bias",
    "timestep_bias_multiplier": TRAINING + "timestep_bias",
    "timestep_bias_begin": TRAINING + "timestep_bias",
    "timestep_bias_end": TRAINING + "timestep_bias",
    "timestep_bias_portion": TRAINING + "timestep_bias",
    "use_ema": TRAINING + "use_ema_and_its_decay",
    "ema_decay": TRAINING + "use_ema_and_its_decay",
    "output_dir": OUTPUT + "output_dir",
    "checkpointing_steps": OUTPUT + "checkpointing_steps_and_limit",
    "checkpoints_total_limit": OUTPUT + "checkpointing_steps_and_limit",
    "resume_from_checkpoint": OUTPUT + "resume_from_checkpoint",
    "output_name": OUTPUT + "models_saved_on_the_way",
    "save_every_n_epochs": OUTPUT + "models_saved_on_the_way",
    "save_every_n_steps": OUTPUT + "models_saved_on_the_way",
    "save_model_as": OUTPUT + "save_model_as_and_save_precision",
    "save_precision": OUTPUT + "save_model_as_and_save_precision",
    "push_to_hub": HUB + "the_finished_model_is_uploaded_and_nothing_else",
    "hub_model_id": HUB + "the_finished_model_is_uploaded_and_nothing_else",
    "hub_token": HUB + "the_token_is_in_no_file",
    "validation_prompt": OUTPUT + "validation_prompts_images_sizes_and_steps",
    "validation_negative_prompt": OUTPUT + "validation_guidance_negative_prompt_and_seed",
    "num_validation_images": OUTPUT + "validation_prompts_images_sizes_and_steps",
    "validation_epochs": OUTPUT + "when_validation_falls_due",
    "validation_steps": OUTPUT + "when_validation_falls_due",
    "validation_resolution": OUTPUT + "validation_prompts_images_sizes_and_steps",
    "validation_num_inference_steps": OUTPUT + "validation_prompts_images_sizes_and_steps",
    "validation_guidance": OUTPUT + "validation_guidance_negative_prompt_and_seed",
    "validation_seed": OUTPUT + "validation_guidance_negative_prompt_and_seed",
    "validation_preview": PREVIEWS + "previews_are_written_and_posted",
    "validation_preview_steps": PREVIEWS + "previews_are_written_and_posted",
    "validation_preview_model": PREVIEWS + "a_tiny_autoencoder_that_is_none",
    "webhook_config": PREVIEWS + "previews_are_written_and_posted",
    "config_file": OUTPUT + "config_file",
    "seed": OUTPUT + "seed",
    "mixed_precision": OUTPUT + "mixed_precision",
    "local_rank": OUTPUT + "local_rank",
    "report_to": OUTPUT + "report_to_and_logging_dir",
    "logging_dir": OUTPUT + "report_to_and_logging_dir",
    "tracker_project_name": OUTPUT + "wandb_and_the_name_of_the_project",
    "logging_steps": OUTPUT + "logging_steps",
    "data_backend_config": SETS + "repeats_and_probability_of_a_set",
    "dataset_config": SETS + "two_sets_of_their_own_size_and_batch",
    "reg_data_dir": SETS + "regularisation_images_are_balanced_and_weighed",
    "prior_loss_weight": SETS + "regularisation_images_are_balanced_and_weighed",
    "conditioning_data_dir": SETS + "conditioning_data_dir_masks_the_loss",
    "masked_loss_area": SETS + "conditioning_data_dir_masks_the_loss",
    "alpha_mask": SETS + "alpha_mask_follows_the_cut",
    "masked_loss": SETS + "masked_loss_insists_on_masks",
    "vae_cache_ondemand": SETS + "on_disk_on_demand_and_never_are_one_run",
    "vae_cache_disable": SETS + "on_disk_on_demand_and_never_are_one_run",
    "cache_only": SETS + "cache_only_stops_before_the_first_step",
    "streaming": BACKEND + "streaming",
    "dataset_repeats": BACKEND + "dataset_repeats",
    "color_aug": BACKEND + "color_aug",
    "caption_strategy": BACKEND + "caption_strategy",
    "resolution_type": BACKEND + "resolution_type_and_alignment",
    "aspect_bucket_alignment": BACKEND + "resolution_type_and_alignment",
    "aspect_bucket_rounding": BACKEND + "resolution_type_and_alignment",
    "minimum_image_size": BACKEND + "minimum_maximum_and_downsampled_sizes",
    "maximum_image_size": BACKEND + "minimum_maximum_and_downsampled_sizes",
    "target_downsample_size": BACKEND + "minimum_maximum_and_downsampled_sizes",
    "eval_steps_interval": BACKEND + "evaluation_sets",
    "num_eval_images": BACKEND + "evaluation_sets",
    "eval_timesteps": BACKEND + "evaluation_sets",
    "in_json": CAPTIONS + "in_json",
    "keep_tokens_separator": CAPTIONS + "keep_tokens_separator",
    "caption_separator": CAPTIONS + "caption_separator_parts_and_joins_the_tags",
    "secondary_separator": CAPTIONS + "secondary_separator_binds_tags",
    "enable_wildcard": CAPTIONS + "enable_wildcard_chooses_in_braces_and_among_lines",
    "caption_prefix": CAPTIONS + "prefix_and_suffix_stand_around_dropped_captions_too",
    "caption_suffix": CAPTIONS + "prefix_and_suffix_stand_around_dropped_captions_too",
    "caption_dropout_every_n_epochs": CAPTIONS + "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate": CAPTIONS + "caption_tag_dropout_rate",
    "token_warmup_min": CAPTIONS + "token_warmup",
    "token_warmup_step": CAPTIONS + "token_warmup",
}


ADAPTERS = "recipe/test_flags_lora.py::test_"
PLACED = ADAPTERS + "ranks_and_alphas_of_parts"
# of train_lora_sdxl.py, beside those of train_sdxl.py
SHOWN_BY_ADAPTERS = {
    "lora_type": ADAPTERS + "lora_type",
    "rank": ADAPTERS + "rank_and_alpha_by_all_their_names",
    "network_dim": ADAPTERS + "rank_and_alpha_by_all_their_names",
    "lora_rank": ADAPTERS + "rank_and_alpha_by_all_their_names",
    "lora_alpha": ADAPTERS + "rank_and_alpha_by_all_their_names",
    "network_alpha": ADAPTERS + "rank_and_alpha_by_all_their_names",
    "lora_targets": ADAPTERS + "lora_targets",
    "lora_layers": ADAPTERS + "lora_targets",
    "lora_dropout": ADAPTERS + "dropouts",
    "network_dropout": ADAPTERS + "dropouts",
    "rank_dropout": ADAPTERS + "dropouts",
    "module_dropout": ADAPTERS + "dropouts",
    "conv_rank": PLACED,
    "conv_alpha": PLACED,
    "rank_pattern": PLACED,
    "alpha_pattern": PLACED,
    "lokr_factor": ADAPTERS + "lokr_factor",
    "use_dora": ADAPTERS + "use_dora_and_use_rslora",
    "use_rslora": ADAPTERS + "use_dora_and_use_rslora",
    "lora_init_type": ADAPTERS + "lora_init_type",
    "init_lora": ADAPTERS + "init_lora",
    "network_weights": ADAPTERS + "network_weights_is_init_lora",
    "lycoris_config": ADAPTERS + "lycoris_config",
    "network_module": ADAPTERS + "network_module_and_args",
    "network_args": ADAPTERS + "network_module_and_args",
    "unet_lr": ADAPTERS + "unet_lr_and_the_rates_of_text_encoders",
    "loraplus_lr_ratio": ADAPTERS + "loraplus_lr_ratio",
    "down_lr_weight": ADAPTERS + "rates_of_blocks",
    "mid_lr_weight": ADAPTERS + "rates_of_blocks",
    "up_lr_weight": ADAPTERS + "rates_of_blocks",
    "lora_format": ADAPTERS + "lora_format_and_output_name",
    "no_metadata": ADAPTERS + "no_metadata",
    "base_model_precision": ADAPTERS + "precisions_of_what_is_frozen",
    "text_encoder_1_precision": ADAPTERS + "precisions_of_what_is_frozen",
    "text_encoder_2_precision": ADAPTERS + "precisions_of_what_is_frozen",
    "offload_activations": ADAPTERS + "offload_activations",
    "instance_data_dir": ADAPTERS + "prompts_and_images_of_dreambooth",
    "instance_prompt": ADAPTERS + "prompts_and_images_of_dreambooth",
    "with_prior_preservation": ADAPTERS + "prompts_and_images_of_dreambooth",
    "class_data_dir": ADAPTERS + "prompts_and_images_of_dreambooth",
    "class_prompt": ADAPTERS + "prompts_and_images_of_dreambooth",
    "repeats": ADAPTERS + "repeats_make_an_epoch_longer",
    "num_class_images": ADAPTERS + "prompts_and_images_of_dreambooth",
}

FLOW, SPIKES = "unit/test_flow.py::test_each_flag_of_the_objective_changes_the_loss", "recipe/test_sd3_run.py::test_"
TEXT, SKIPPING = SPIKES + "each_flag_changes_the_loss", SPIKES + "skip_layer_guidance_is_the_pipelines_own"
OF_DDPM = ("prediction_type", "snr_gamma", "zero_terminal_snr", "timestep_bias_strategy", "timestep_bias_multiplier",
           "timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion")
# of train_sd3.py, in place of OF_DDPM
SHOWN_BY_SD3 = {flag: place for flag, place in SHOWN_BY.items() if flag not in OF_DDPM} | {
    "no_t5": TEXT,
    "text_encoder_3_precision": TEXT,
    "tokenizer_max_length": TEXT,
    "t5_padding": TEXT,
    "apply_lg_attn_mask": TEXT,
    "apply_t5_attn_mask": TEXT,
    "clip_l_dropout_rate": TEXT,
    "clip_g_dropout_rate": TEXT,
    "t5_dropout_rate": TEXT,
    "sd3_clip_uncond_behaviour": TEXT,
    "sd3_t5_uncond_behaviour": TEXT,
    "weighting_scheme": FLOW,
    "logit_mean": FLOW,
    "logit_std": FLOW,
    "mode_scale": FLOW,
    "precondition_outputs": FLOW,
    "flow_schedule_shift": FLOW,
    "flow_schedule_auto_shift": FLOW,
    "flow_use_uniform_schedule": FLOW,
    "flow_use_beta_schedule": FLOW,
    "spike_guard": SPIKES + "a_gradient_that_is_not_finite_is_skipped_and_counted",
    "spike_factor": SPIKES + "stop_saves_and_ends_and_goes_on_behind_it",
    "validation_guidance_skip_layers": SKIPPING,
    "validation_guidance_skip_layers_start": SKIPPING,
    "validation_guidance_skip_layers_stop": SKIPPING,
    "validation_guidance_skip_scale": SKIPPING,
}
OF_UNETS = ("conv_rank", "conv_alpha", "down_lr_weight", "mid_lr_weight", "up_lr_weight")
ON_SD3 = "recipe/test_lora_sd3.py::test_"
# of train_lora_sd3.py, beside those of train_sd3.py, in place of OF_UNETS
SHOWN_BY_SD3_ADAPTERS = {flag: place for flag, place in SHOWN_BY_ADAPTERS.items() if flag not in OF_UNETS} | {
    "lora_blocks": ON_SD3 + "lora_blocks_and_lora_layers",
    "lora_layers": ON_SD3 + "lora_blocks_and_lora_layers",
    "network_module": ON_SD3 + "network_module_and_args",
    "network_args": ON_SD3 + "network_module_and_args",
    "unet_lr": ON_SD3 + "rates_of_all_that_is_trained",
    "learning_rate_te3": ON_SD3 + "rates_of_all_that_is_trained",
    "base_model_precision": ON_SD3 + "precisions_and_quantize_exclude",
    "text_encoder_1_precision": ON_SD3 + "precisions_and_quantize_exclude",
    "text_encoder_2_precision": ON_SD3 + "precisions_and_quantize_exclude",
    "text_encoder_3_precision": ON_SD3 + "precisions_and_quantize_exclude",
    "quantize_exclude": ON_SD3 + "precisions_and_quantize_exclude",
}
LISTS = {train_sdxl: SHOWN_BY, train_lora_sdxl: SHOWN_BY | SHOWN_BY_ADAPTERS, train_sd3: SHOWN_BY_SD3,
         train_lora_sd3: SHOWN_BY_SD3 | SHOWN_BY_SD3_ADAPTERS}
PLACES = sorted({each for shown in LISTS.values() for each in shown.items()})


def names_of_flags(monkeypatch, script) -> set[str]:
    """Every flag that the script's parser knows."""
    made = []

    class Kept(parser.Parser):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(flags, "Parser", Kept)
    script.parse_args(["--pretrained_model_name_or_path", "a", "--train_data_dir", "b"])
    return {option.removeprefix("--") for action in made[0]._actions for option in action.option_strings
            if option.startswith("--")} - {"help"}


@pytest.mark.parametrize(("script", "shown"), LISTS.items(), ids=[script.__name__ for script in LISTS])
def test_every_flag_has_its_test(monkeypatch, script, shown):
    known = names_of_flags(monkeypatch, script)
    assert len(known) > 100
    assert known - shown.keys() == set(), "flags without a test in which they change something"
    assert shown.keys() - known == set(), "tests of flags that are gone"


@pytest.mark.parametrize("file", sorted({place.split("::")[0] for _, place in PLACES}))
def test_the_tests_are_there_and_give_their_flags(file):
    """By name; and the file names each flag on a command line or in a configuration."""
    text = (TESTS / file).read_text()
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    for flag, place in PLACES:
        if place.startswith(file):
            assert place.split("::")[1] in functions, f"--{flag}: there is no {place}"
            assert f"--{flag}" in text, f"--{flag} is not given in {file}"
