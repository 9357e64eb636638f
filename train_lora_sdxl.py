"""Train an adapter (LoRA, DoRA, LoHa, LoKr, OFT, LyCORIS) for SDXL on images with captions, or on a few images of one thing.

    accelerate launch train_lora_sdxl.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --train_data_dir my_images --resolution 1024 --enable_bucket --mixed_precision bf16 --output_dir out/my_lora

To go on after a stop, run the same command again with --resume_from_checkpoint latest.
To make a new task, copy this file: training_loss() is usually all that changes.
"""

from pathlib import Path

from library import errors, flags, flags_adapter


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_model_flags(parser)
    flags_adapter.add_adapter_flags(parser)
    flags.add_data_flags(parser)
    flags_adapter.add_dreambooth_flags(parser)
    flags.add_cache_flags(parser)
    flags.add_training_flags(parser)
    flags.add_optimizer_flags(parser)
    flags.add_ddpm_objective_flags(parser)
    flags.add_checkpoint_flags(parser)
    flags.add_validation_flags(parser)
    flags.add_runtime_flags(parser)
    parser.override_defaults(output_dir="sdxl-lora")
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import torch

from library.training import accelerator as running
running.calm()    # before PEFT, which imports every quantiser that is installed
from library.models import adapters    # before diffusers, which looks for PEFT once
from library.data import dataset, findings, loader
from library.diffusion import ddpm, ema
from library.models import adapter_flags, adapting, caching, quantize, sdxl, sdxl_output
from library.models.encoders import Encoders
from library.training import checkpoints, meter, offload, optimizers, plan, sharding, signals
from library.training import layer_statistics as layers
from library.validation import class_images, dataset_report, report
from library.validation import images as validation
from library.validation import loss as evaluation


def training_loss(unet, batch, schedule, timestep_cdf, args):
    """Mean denoising loss of one batch: the part to edit for a new objective."""
    latents, prediction_type = batch["latents"], schedule.config.prediction_type               # [B, 4, h, w] float32
    noise = ddpm.offset_noise(batch["noise"], batch["noise_offset"], args.noise_offset)
    t = ddpm.draw_timesteps(batch["timestep_draw"], timestep_cdf)                             # [B]
    noisy = ddpm.add_noise(latents, noise, t, schedule.alphas_cumprod)

    cond = sdxl.added_cond(batch["pooled_prompt_embeds"], batch["time_ids"])
    target = ddpm.target(prediction_type, latents, noise, t, schedule.alphas_cumprod)
    if "keeps_prior" in batch:    # what the model says of these images without its adapter is what they should stay
        with torch.no_grad(), adapters.without(running.bare(unet)):
            prior = unet(noisy, t, batch["prompt_embeds"], added_cond_kwargs=cond).sample.float()
        target = torch.where(batch["keeps_prior"][:, None, None, None] > 0, prior, target)
    prediction = unet(noisy, t, batch["prompt_embeds"], added_cond_kwargs=cond).sample

    loss = ddpm.mse_per_sample(prediction, target, batch.get("loss_mask"), args.masked_loss_area)    # [B]
    if args.snr_gamma is not None:
        loss = loss * ddpm.min_snr_weight(prediction_type, t, schedule.alphas_cumprod, args.snr_gamma)
    return (loss * batch["loss_weight"]).mean()


def main(args):
    accelerator = running.start(args)
    device, output = accelerator.device, Path(args.output_dir)
    optimizers.check_optimizer(args, device.type)
    base_precision, *text_precisions = adapter_flags.precisions_of(args, device.type)
    offload.check(args.offload_activations, device.type)
    base = sdxl.find_base(args)
    start, settings, rates, formats = adapter_flags.adapter_of(args, sdxl.empty_unet(base))
    schedule = sdxl.load_schedule(base, args.prediction_type, args.zero_terminal_snr)
    sdxl_output.check_base(base, schedule)
    even_cdf = ddpm.cumulative(torch.full_like(schedule.alphas_cumprod, 1 / schedule.config.num_train_timesteps)).to(device)
    timestep_cdf = ddpm.cumulative(ddpm.timestep_bias(
        args.timestep_bias_strategy, schedule.config.num_train_timesteps, args.timestep_bias_multiplier,
        args.timestep_bias_begin, args.timestep_bias_end, args.timestep_bias_portion)).to(device)
    found, notes = checkpoints.find(output, args.resume_from_checkpoint)
    seed = running.choose_seed(found.manifest["seed"] if found and args.seed is None else args.seed)
    batches_a_step = args.gradient_accumulation_steps * accelerator.num_processes
    facts = {"seed": seed, "global_batch": args.train_batch_size * batches_a_step}
    if found:
        notes += [f"going on from {found.path}", *checkpoints.compare_flags(found, vars(args), facts)]
    running.open_output(output, base.path, found)
    trackers = running.Trackers(args, output)

    # data: every image and caption is looked at; what is encoded once need not be encoded again
    cached = Path(args.embedding_cache_dir or output / "cache")
    encoders = Encoders(sdxl, args, base, accelerator, precisions=text_precisions, adapted=True)
    if args.with_prior_preservation and (missing := class_images.missing(args.class_data_dir, args.num_class_images, seed)):
        (prompt,), negative = encoders.guided([args.class_prompt], None, sdxl_output.base_guides_from_encoded(base))
        encoders.free(vae=False, text=True)
        drawn_by = adapting.frozen(sdxl, "unet", args, base, base_precision, accelerator)
        pipeline = sdxl_output.make_pipeline(base, drawn_by, encoders.vae, schedule)
        class_images.draw(args.class_data_dir, missing, pipeline, prompt, negative, args.resolution, seed, accelerator)
        del drawn_by, pipeline
    data = dataset.load(args, seed, cached / "scan", decode=False)
    for note in notes + data.notes:
        running.say(note)
    data, order, steps, latents = caching.cache_images(args, encoders, data, seed, batches_a_step, cached)
    prompts = caching.cache_captions(args, encoders, data, order, steps, cached)
    running.say(f"{dataset.describe_table(data.table, batches_a_step)}; {steps} steps")
    if args.cache_only:
        return running.say(f"--cache_only: everything is encoded in {cached}; without the flag, the run goes on from here")
    held_out = data.held_out and caching.cache_evaluation(args, encoders, data.held_out, prompts, accelerator, cached)
    encoders.free(vae=latents.whole and not args.validation_prompt, text=prompts.whole)

    # models: the frozen UNet (and text encoders), small or quantised, and the adapter on them in float32
    unet = adapting.frozen(sdxl, "unet", args, base, base_precision, accelerator)
    networks = {"unet": unet} | sdxl.adapted_text_encoders(args, encoders)
    settings = adapting.put_on(networks, settings, start, seed, accelerator.mixed_precision != "no")
    running.say(adapters.describe(networks, settings.kind))
    if args.gradient_checkpointing:
        sdxl.enable_gradient_checkpointing(networks)
    for network in networks.values():
        quantize.leave_out_of_ddp(network.train())
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)

    # optimizer: the schedule counts optimizer steps, whatever the accumulation or the number of processes
    groups = adapters.parameter_groups(networks, optimizers.learning_rates(args, facts["global_batch"]), rates)
    optimizer = optimizers.from_groups(args, groups, device.type)
    lr_schedule = optimizers.make_lr_schedule(args, optimizer, steps)
    everything = torch.nn.ModuleList(networks.values())
    *wrapped, optimizer = accelerator.prepare(*networks.values(), optimizer)
    average = ema.EMA(unet, args.ema_decay) if args.use_ema else None    # of what is trained, which the rates decide
    encoders.call_wrapped(dict(zip(networks, wrapped, strict=True)))
    kept = {f"{part}.{name}": value for part, network in networks.items() for name, value in adapters.state_dict(network).items()}
    state = checkpoints.State({}, optimizer, lr_schedule, accelerator.scaler, average, adapter=kept)
    if found:
        state.load(found)
    state.check_space(output, optimizers.state_bytes(args))

    batches = loader.Loader(data, order, latents, prompts, args, seed, accelerator)
    log = meter.Meter(output, trackers, state, steps, args.logging_steps, device.type, layers.record(args, networks, batches))
    stop = signals.StopRequest()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def on_device(batch):
        """A batch of the loader, with prompts encoded that are not cached."""
        return encoders.complete({name: values.to(device, non_blocking=True) for name, values in batch.items()})

    def show_and_save(step):
        """Validation images, evaluation loss and an adapter ready to use, where they fall due after this step."""
        if held_out and (step == steps or plan.due(order, step, args.eval_steps_interval, None)):
            with optimizers.evaluated(optimizer):
                evaluation.run(lambda batch: training_loss(unet, batch, schedule, even_cdf, args), held_out, args.num_eval_images,
                               args.eval_timesteps, [*networks.values()], average, step, output, trackers, accelerator, on_device)
        if args.validation_prompt and (step == steps or plan.due(order, step, args.validation_steps, args.validation_epochs)):
            pipeline = sdxl_output.make_pipeline(base, unet, encoders.vae, schedule)
            shown = encoders.shown(args, prompts, sdxl_output.guides_from_encoded(args, base))
            with optimizers.evaluated(optimizer):
                validation.run(args, seed, pipeline, shown, unet, average, step, output, trackers, accelerator)
        for name in plan.model_names(args, order, step) if step < steps else ():
            with optimizers.evaluated(optimizer):
                adapting.save(output, name, args, networks, settings, average, formats)

    if found:    # the run may have been stopped between the checkpoint and this
        with log.paused():
            show_and_save(state.step)
    for batch in log.waiting(batches.batches(state.step, steps)):
        if accelerator.sync_gradients:    # an optimizer step begins
            running.seed_dropout(seed, state.step, device.type)
        with accelerator.accumulate(*wrapped):
            batch = on_device(batch)
            with offload.activations(args.offload_activations, everything, device.type):
                loss = training_loss(wrapped[0], batch, schedule, timestep_cdf, args)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                log.add_norm(sharding.clip_grad_norm(accelerator, parameters, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.add(loss, len(batch["latents"]))    # stays on the device: no wait for it here
        if not accelerator.sync_gradients:
            continue
        # one optimizer step is done
        state.step += 1
        log.step(state.step, order.epoch_of(state.step), lr_schedule.get_last_lr()[0])
        lr_schedule.step()
        if average:
            average.update(unet)
        stopping = stop.after_step()
        with log.paused():
            if state.step % args.checkpointing_steps == 0 or state.step == steps or stopping:
                state.unlogged = log.unlogged()
                state.save(output, facts, vars(args), args.checkpoints_total_limit)
            if stopping:
                break
            show_and_save(state.step)
    for each in (log, latents, prompts):
        each.close()
    if state.step < steps:
        return running.say(f"stopped after step {state.step} of {steps}; --resume_from_checkpoint latest goes on from there")

    with optimizers.evaluated(optimizer):
        written = adapting.save(output, args.output_name, args, networks, settings, average, formats)
    if accelerator.is_main_process:
        written += [report.write_loss_curve(output), report.write_report(
            output, title=output.resolve().name, command=running.command(), versions=running.versions(device),
            notes=notes + data.notes, style=dataset_report.STYLE,
            summary=dataset_report.summary_html(data, findings.find(data)))]
    running.publish(args, output)
    trackers.close()
    for path in written:
        running.say(f"wrote {path}")


if __name__ == "__main__":
    with errors.exit_on_user_error("train_lora_sdxl.py"):
        main(ARGS)
