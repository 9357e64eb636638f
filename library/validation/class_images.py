"""Images of the class for prior preservation, drawn by the base model where the user has too few."""

from pathlib import Path

from tqdm import tqdm

from library.data.images import EXTENSIONS
from library.training import processes
from library.validation import images


def count(folder: str | Path) -> int:
    """How many images a folder has. It is made if it is not there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return sum(path.suffix.lower() in EXTENSIONS for path in Path(folder).rglob("*"))


def fill(folder: str | Path, wanted: int, pipeline, prompt, negative, *, size: tuple[int, int], seed: int,
         autocast, device) -> None:
    """Draw until the folder has `wanted` images; processes share the work. Nothing that is there is touched.

    Image n is drawn with seed + n and named by both, so that a run that was stopped goes on where it was. pipeline, prompt,
    negative, autocast, device: as for `images.draw`, with diffusers' 50 steps at guidance 5.
    """
    folder = Path(folder)
    there = count(folder)
    missing = [number for number in range(wanted) if not (folder / _name(seed, number)).exists()][:wanted - there]
    mine = missing[processes.rank()::processes.world()]
    for number in tqdm(mine, desc="draw class images", disable=not processes.is_main()):
        drawn = images.draw(pipeline, [prompt], negative, [size], count=1, steps=50, guidance=5.0, seed=seed + number,
                            autocast=autocast, device=device)
        (_, image), = drawn.values()
        if image is not None:
            partial = folder / f".{_name(seed, number)}.tmp"
            image.save(partial, "PNG")
            partial.replace(folder / _name(seed, number))
    processes.meet()


def _name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"
