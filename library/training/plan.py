"""How long a run is, and what falls due after which step. Everything counts optimizer steps."""

from library.data.sampler import Sampler
from library.errors import UserError


def total_steps(order: Sampler, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the run: `max_steps`, or so many that every image is seen `epochs` times.

    Raises `UserError` when the images do not fill a single batch.
    """
    steps = max_steps or order.steps_before(epochs)
    if not steps:
        raise UserError(f"the images do not fill one batch of {order.batch_sizes.min()} in {epochs} epochs: lower "
                        "--train_batch_size or --gradient_accumulation_steps, or raise --num_train_epochs")
    return steps


def due(order: Sampler, step: int, every_steps: int | None, every_epochs: int | None) -> bool:
    """Whether something done every N optimizer steps, or else every N epochs, is due after step number `step`."""
    if every_steps:
        return step % every_steps == 0
    return bool(every_epochs) and order.epoch_of(step) // every_epochs > order.epoch_of(step - 1) // every_epochs


def model_names(args, order: Sampler, step: int) -> list[str]:
    """Names of the models that are due after step number `step`, in kohya's numbering."""
    names = []
    if args.save_every_n_steps and step % args.save_every_n_steps == 0:
        names.append(f"{args.output_name}-step{step:08d}")
    if due(order, step, None, args.save_every_n_epochs):
        names.append(f"{args.output_name}-{order.epoch_of(step):06d}")
    return names
