"""Images a second of the caching pass, against the VAE encoder alone on ready batches.

    python benchmarks/make_data.py out/bench
    python benchmarks/vae_caching.py out/bench --model tiny

The pass reads, decodes, resizes and crops the photographs in other threads, encodes them and writes the cache; the
encoder alone gets the same pixels from memory. Wall-clock time with one thread for the encoder: give the process a
second core for the decoding (--cores 0 1). Both take turns; the best and the median round are shown. On a machine
that others use, too, the processor time of the encoding thread alone is the steadier figure: also shown.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measured import OURS, environment, flags


@contextlib.contextmanager
def clocked(into: list):
    """Append (wall-clock seconds, processor seconds of this thread) of what runs inside."""
    begin, busy = time.perf_counter(), time.thread_time()
    yield
    into.append((time.perf_counter() - begin, time.thread_time() - busy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of make_data.py")
    parser.add_argument("--model", default="tiny", choices=("tiny", "small"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--cores", type=int, nargs="+", help="keep the process on these cores")
    args = parser.parse_args()
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, args.cores)
    os.environ.update(environment())
    sys.path.insert(0, str(OURS.parent))
    import numpy as np
    import torch

    import train_sdxl
    from library.data import dataset, prepare
    from library.data.cache import Store
    from library.models import sdxl
    from library.models.encoders import Encoders
    from library.training import accelerator as running
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        run = train_sdxl.parse_args(flags(args.data, args.model, Path(folder) / "out"))
        accelerator = running.start(run)
        encoders = Encoders(sdxl, run, sdxl.find_base(run), accelerator)
        data = dataset.load(run, 0, Path(folder) / "scan", decode=False)
        table = data.table
        mode, size, seconds = run.image_interpolation_mode, args.batch_size, {"encoder": [], "pass": []}
        pixels = [prepare.load_pixels(data, row, 0, mode) for row in range(len(table))]
        ready = [torch.from_numpy(np.stack(pixels[start:start + size])) for start in range(0, len(pixels), size)]
        encoders.encode_images(ready[0])    # loads the VAE
        for number in range(args.rounds + 1):
            with clocked(seconds["encoder"]):
                for batch in ready:
                    encoders.encode_images(batch)
            store = Store(Path(folder) / f"latents{number}")
            with clocked(seconds["pass"]):
                prepare.cache_latents(data, np.arange(len(table)), store, "recipe", [1], size, mode,
                                      lambda: encoders.encode_images)

    for kind, label in enumerate(("wall clock", "encoding thread")):
        encoder, whole = ([len(table) / pair[kind] for pair in seconds[name][1:]] for name in ("encoder", "pass"))
        ratios = [one / other for one, other in zip(whole, encoder, strict=True)]
        print(f"{label:15}  encoder alone {max(encoder):6.2f} images/s, pass {max(whole):6.2f} images/s (best);  "
              f"ratio {max(whole) / max(encoder):.3f} of the best, {statistics.median(ratios):.3f} median of pairs")


if __name__ == "__main__":
    main()
