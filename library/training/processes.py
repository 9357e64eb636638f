"""This process among the others of the run: rank, share of the work, exchange. One process without a launcher."""

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if _running() else 0


def world() -> int:
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    return rank() == 0


def gather(values: list) -> list:
    """The lists of all processes joined in the order of ranks; on every process. A point where all meet."""
    if not _running():
        return values
    parts = [None] * world()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def meet() -> None:
    """Wait until every process is here."""
    gather([])


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
