"""Images of the class for prior preservation, drawn by the base model where the user has too few."""

from pathlib import Path

from tqdm import tqdm

from library.data.images import EXTENSIONS
from library.errors import UserError
from library.training import agreement, processes
from library.training.accelerator import say
from library.validation import images


def count(folder: str | Path) -> int:
    """How many images a folder has, subfolders included; 0 if it is not there."""
    return sum(path.suffix.lower() in EXTENSIONS and path.is_file() for path in Path(folder).rglob("*"))


def missing(folder: str | Path, wanted: int, seed: int) -> list[int]:
    """Numbers of the images to draw until the folder has `wanted`; it is made if it is not there. All processes call this.

    Image n is drawn with seed + n and named by both, so that a run that was stopped goes on where it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lacking = max(0, wanted - count(folder))
    numbers = [number for number in range(wanted) if not (folder / _name(seed, number)).exists()][:lacking]
    # all have counted before one draws
    agreement.check("--class_data_dir", {"the images to draw": len(numbers)}, "Name a folder that all machines share")
    if numbers and len(processes.team(folder)) < processes.world():
        raise UserError(f"--class_data_dir {folder} is to be filled, and is not one folder for all processes: name one that all "
                        "machines share")
    return numbers


def draw(folder: str | Path, numbers: list[int], pipeline, prompt, negative, size: tuple[int, int], seed: int,
         accelerator) -> None:
    """Draw these images; processes share the work. Nothing that is there is touched.

    pipeline, prompt, negative: as for `images.draw`, with diffusers' 50 steps at guidance 5. size: width and height. What the
    model makes NaN of is told and left out.
    """
    folder, failed = Path(folder), 0
    mine = numbers[processes.rank()::processes.world()]
    for number in tqdm(mine, desc="draw class images", disable=not processes.is_main()):
        drawn = images.draw(pipeline, [prompt], negative, [size], count=1, steps=50, guidance=5.0, seed=seed + number,
                            autocast=accelerator.autocast, device=accelerator.device)
        (_, image), = drawn.values()
        if image is None:
            failed += 1
            continue
        partial = folder / f".{_name(seed, number)}.tmp"
        image.save(partial, "PNG")
        partial.replace(folder / _name(seed, number))
    if failed:
        say(f"--class_data_dir: {failed} of {len(mine)} images came out NaN and are left out: use --mixed_precision bf16 or no")
    processes.meet()


def _name(seed: int, number: int) -> str:
    return f"class-{seed}-{number:05d}.png"
