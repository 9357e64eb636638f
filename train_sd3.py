"""Fine-tune SD 3 or 3.5, all of its transformer (and both CLIPs on request), on images with captions.

    accelerate launch train_sd3.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --train_data_dir my_images --resolution 1024 --enable_bucket --output_dir out/my_model

To go on after a stop, run the same command again with --resume_from_checkpoint latest.
To make a new task, copy this file: training_loss() is usually all that changes.
"""

import math
from pathlib import Path

from library import errors, flags, flags_sd3


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_model_flags(parser)
    flags_sd3.add_sd3_text_flags(parser)
    flags.add_data_flags(parser)
    flags.add_cache_flags(parser)
    flags.add_training_flags(parser)
    flags.add_optimizer_flags(parser)
    flags.add_flow_objective_flags(parser)
    flags_sd3.add_spike_flags(parser)
    flags.add_checkpoint_flags(parser)
    flags.add_validation_flags(parser)
    flags_sd3.add_skip_layer_flags(parser)
    flags.add_runtime_flags(parser)
    parser.override_defaults(output_dir="sd3-model-finetuned", single_file_config="stabilityai/stable-diffusion-3.5-medium",
                             validation_preview_model="madebyollin/taesd3")
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


if __name__ == "__main__":
    ARGS = parse_args()    # before torch: --help and mistakes are answered at once

import torch

from library.data import dataset, findings, loader
from library.diffusion import ddpm, ema, flow
from library.models import attention, caching, sd3, sd3_output
from library.models.encoders import Encoders
from library.training import accelerator as running
from library.training import checkpoints, meter, optimizers, plan, sharding, signals, spikes
from library.training import layer_statistics as layers
from library.validation import dataset_report
from library.validation import images as validation
from library.validation import loss as evaluation
from library.validation import report


def training_loss(transformer, batch, schedule, density, args):
    """Mean flow-matching loss of one batch: the part to edit for a new objective."""
    latents = batch["latents"]                                                                 # [B, 16, h, w] float32
    noise = ddpm.offset_noise(batch["noise"], batch["noise_offset"], args.noise_offset)
    shift = flow.auto_shift(*latents.shape[2:], schedule.config) if args.flow_schedule_auto_shift else args.flow_schedule_shift
    u = flow.draw_u(batch["timestep_draw"], density, args.logit_mean, args.logit_std, args.mode_scale)    # [B]
    sigma = flow.sigmas(u, shift)                                                              # [B], 1 is noise
    noisy = flow.add_noise(latents, noise, sigma)

    prediction = transformer(hidden_states=noisy, timestep=flow.STEPS * sigma, encoder_hidden_states=batch["prompt_embeds"],
                             pooled_projections=batch["pooled_prompt_embeds"]).sample

    target = flow.velocity(latents, noise)
    if args.precondition_outputs:
        prediction, target = flow.denoised(prediction, noisy, sigma), latents
    loss = ddpm.mse_per_sample(prediction, target, batch.get("loss_mask"), args.masked_loss_area)    # [B]
    return (loss * flow.loss_weight(args.weighting_scheme, sigma) * batch["loss_weight"]).mean()


def main(args):
    accelerator = running.start(args)
    device, output = accelerator.device, Path(args.output_dir)
    optimizers.check_optimizer(args, device.type)
    text_precisions = sd3.text_precisions(args, device.type)
    base = sd3.find_base(args)
    schedule = sd3.load_schedule(base)
    sd3_output.check_base(base, args.validation_guidance_skip_layers)
    density = flags_sd3.density(args)
    skip_layers = sd3_output.skip_layer_guidance(
        args.validation_guidance_skip_layers, args.validation_guidance_skip_scale,
        args.validation_guidance_skip_layers_start, args.validation_guidance_skip_layers_stop)
    found, notes = checkpoints.find(output, args.resume_from_checkpoint)
    seed = running.choose_seed(found.manifest["seed"] if found and args.seed is None else args.seed)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    facts = {"seed": seed, "global_batch": global_batch}
    if found:
        sd3.check_same_transformer(base, found.path)
        notes += [f"going on from {found.path}", *checkpoints.compare_flags(found, vars(args), facts)]
    running.open_output(output, base.path, found)
    trackers = running.Trackers(args, output)

    # data: every image and caption is looked at; what is encoded once need not be encoded again
    cached = Path(args.embedding_cache_dir or output / "cache")
    data = dataset.load(args, seed, cached / "scan", decode=False)
    sd3_output.check_sizes(base, data.table.buckets + (args.validation_resolution or []))
    for note in notes + data.notes:
        running.say(note)
    encoders = Encoders(sd3, args, base, accelerator, found and found.path, text_precisions)
    batches_a_step = args.gradient_accumulation_steps * accelerator.num_processes
    data, order, steps, latents = caching.cache_images(args, encoders, data, seed, batches_a_step, cached)
    prompts = caching.cache_captions(args, encoders, data, order, steps, cached)
    running.say(f"{dataset.describe_table(data.table, batches_a_step)}; {steps} steps")
    if args.cache_only:
        return running.say(f"--cache_only: everything is encoded in {cached}; without the flag, the run goes on from here")
    held_out = data.held_out and caching.cache_evaluation(args, encoders, data.held_out, prompts, accelerator, cached)
    encoders.free(vae=latents.whole and not args.validation_prompt, text=prompts.whole)

    # models: the transformer, and with it the CLIPs if they are trained
    transformer = sd3.load_part(base, "transformer", torch.float32, found and found.path).requires_grad_(True).train()
    attention.set_attention(transformer, args.attention_mechanism, args.sageattention_usage)
    networks = {"transformer": transformer} | sd3.trainable_text_encoders(args, encoders)
    if args.gradient_checkpointing:
        sd3.enable_gradient_checkpointing(networks)

    # optimizer: the schedule counts optimizer steps, whatever the accumulation or the number of processes
    optimizer = optimizers.make_optimizer(args, networks, global_batch, device.type)
    lr_schedule = optimizers.make_lr_schedule(args, optimizer, steps)
    *wrapped, optimizer = accelerator.prepare(*networks.values(), optimizer)
    average = ema.EMA(transformer, args.ema_decay) if args.use_ema else None
    if args.train_text_encoder:
        encoders.call_wrapped(dict(zip(networks, wrapped, strict=True)))
    state = checkpoints.State(networks, optimizer, lr_schedule, accelerator.scaler, average)
    if found:
        state.load(found)
    state.check_space(output, optimizers.state_bytes(args))

    batches = loader.Loader(data, order, latents, prompts, args, seed, accelerator)
    log = meter.Meter(output, trackers, state, steps, args.logging_steps, device.type, layers.record(args, networks, batches))
    guard = spikes.SpikeGuard(args.spike_guard, args.spike_factor, state, accelerator.scaler, output, log.counts)
    stop = signals.StopRequest()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def on_device(batch):
        """A batch of the loader, with prompts encoded that are not cached."""
        return encoders.complete({name: values.to(device, non_blocking=True) for name, values in batch.items()})

    def show_and_save(step):
        """Validation images, evaluation loss and a model ready to use, where they fall due after this step."""
        if held_out and (step == steps or plan.due(order, step, args.eval_steps_interval, None)):
            with optimizers.evaluated(optimizer):
                evaluation.run(lambda batch: training_loss(transformer, batch, schedule, "uniform", args), held_out,
                               args.num_eval_images, args.eval_timesteps, [*networks.values()], average, step, output, trackers,
                               accelerator, on_device)
        if args.validation_prompt and (step == steps or plan.due(order, step, args.validation_steps, args.validation_epochs)):
            pipeline = sd3_output.make_pipeline(base, transformer, encoders.vae)
            shown = encoders.shown(args, prompts)
            with optimizers.evaluated(optimizer):
                validation.run(args, seed, pipeline, shown, transformer, average, step, output, trackers, accelerator,
                               **skip_layers)
        for name in plan.model_names(args, order, step) if step < steps else ():
            with optimizers.evaluated(optimizer):
                sd3_output.save_model(output / name, args, base, networks, average)

    if found:    # the run may have been stopped between the checkpoint and this
        with log.paused():
            show_and_save(state.step)
    for batch in log.waiting(batches.batches(state.step, steps)):
        with accelerator.accumulate(*wrapped):
            batch = on_device(batch)
            loss = training_loss(wrapped[0], batch, schedule, density, args)
            accelerator.backward(loss)
            spike = False
            if accelerator.sync_gradients and (args.max_grad_norm or guard.on):
                norm = sharding.clip_grad_norm(accelerator, parameters, args.max_grad_norm or math.inf)
                spike = guard.refuses(norm, state.step + 1)
                if not spike:
                    log.add_norm(norm)
            if not spike:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.add(loss, len(batch["latents"]), spike)    # stays on the device: no wait for it here
        if not accelerator.sync_gradients:
            continue

        # one optimizer step is done
        state.step += 1
        log.step(state.step, order.epoch_of(state.step), lr_schedule.get_last_lr()[0])
        lr_schedule.step()
        if average:
            average.update(transformer)
        stopping = stop.after_step() or guard.stops
        with log.paused():
            if state.step % args.checkpointing_steps == 0 or state.step == steps or stopping:
                state.unlogged = log.unlogged() | guard.state()
                state.save(output, facts, vars(args), args.checkpoints_total_limit)
            if stopping:
                break
            show_and_save(state.step)
    log.close()
    latents.close()
    prompts.close()
    if guard.stops:
        raise errors.UserError(f"--spike_guard stop: {guard.told}. All before it is saved, and --resume_from_checkpoint latest "
                               "goes on behind it: with a lower --learning_rate or --max_grad_norm, or a larger batch")
    if state.step < steps:
        return running.say(f"stopped after step {state.step} of {steps}; --resume_from_checkpoint latest goes on from there")

    name = args.output_name if args.save_model_as != "diffusers" else ""
    with optimizers.evaluated(optimizer):
        written = sd3_output.save_model(output / name, args, base, networks, average)
    if accelerator.is_main_process:
        written += [report.write_loss_curve(output), report.write_report(
            output, title=output.resolve().name, command=running.command(), versions=running.versions(device),
            notes=notes + data.notes + guard.notes(), style=dataset_report.STYLE,
            summary=dataset_report.summary_html(data, findings.find(data)))]
    running.publish(args, output)
    trackers.close()
    for path in written:
        running.say(f"wrote {path}")


if __name__ == "__main__":
    with errors.exit_on_user_error("train_sd3.py"):
        main(ARGS)
