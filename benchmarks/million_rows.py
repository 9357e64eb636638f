"""A data set of a million images: seconds and MB to bucket and shuffle it and to name the first batch.

    python benchmarks/million_rows.py

Sizes and hashes are drawn instead of read from files (reading them is bound by the disk); every row has a caption of
its own. From there on it is what a run does: buckets, table, order of samples, rows and prompts of the first step.
"""

import argparse
import resource
import sys
import time

import psutil
from measured import HERE

PIECE = 10_000    # rows made at once, so that making them is not what takes the memory


def most_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def megabytes() -> float:
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    sys.path.insert(0, str(HERE.parent))
    import numpy as np

    from library.data import captions
    from library.data.sampler import Sampler
    from library.data.scan import RECORD
    from library.data.specs import Buckets, Origin, Spec
    from library.data.table import Text, build

    empty, draw = megabytes(), np.random.default_rng(0)
    records, names, texts = np.zeros(rows, RECORD), np.empty(rows, Text), np.empty(rows, Text)
    for first in range(0, rows, PIECE):
        piece = range(first, min(first + PIECE, rows))
        part = slice(piece.start, piece.stop)
        records["width"][part], records["height"][part] = draw.integers(400, 3000, (2, len(piece)))
        records["content"][part] = [b"%032x" % number for number in piece]
        names[part] = [f"folder/image{number:07d}.jpg" for number in piece]
        texts[part] = [f"a photograph of thing number {number}, seen from afar" for number in piece]
    scanned, begin = megabytes(), time.perf_counter()
    rules = captions.Rules(shuffle=True, keep=1, empty=0.1)
    spec = Spec("set", Origin("folder", "folder"), Buckets((1024, 1024), 512, 2048), rules)
    table, _ = build(spec, records, names, texts, np.arange(rows + 1))
    built = time.perf_counter()
    del records    # as a run does
    order = Sampler(table.bucket_of, 0, 16)
    steps = order.steps_before(10)
    most, = order.visits(steps)
    bucket, first, visits = order.batch(0)
    prompts = [captions.pick(table.texts(row), rules, 0, int(row), int(visit), most)
               for row, visit in zip(first, visits, strict=True)]
    ids = [table.time_ids(int(row), int(visit)) for row, visit in zip(first, visits, strict=True)]
    end = time.perf_counter()
    print(f"{rows:,} rows in {len(np.unique(table.bucket_of))} buckets: table {built - begin:.2f} s, order and first batch of "
          f"{len(prompts)} in bucket {table.buckets[bucket]} {end - built:.2f} s, together {end - begin:.2f} s")
    print(f"memory: {most_megabytes():.0f} MB at the most ({empty:.0f} MB Python and packages, {scanned - empty:.0f} MB the rows "
          f"as scanned, {most_megabytes() - scanned:.0f} MB for this); {megabytes() - empty:.0f} MB stay while training")
    assert len(ids) == len(prompts)


if __name__ == "__main__":
    main()
