"""Which samples an optimizer step sees: a function of (bucket sizes, seed, step, global batch) and nothing else.

Not of the number of processes, of workers or of what was loaded before; so a restart computes instead of replaying.

Construction, with bucket sizes n_b and global batch G: epoch e holds floor((e+1) n_b / G) - floor(e n_b / G)
batches of bucket b, shuffled by (seed, e). The j-th batch of bucket b takes the positions jG .. jG+G-1 of b's
endless stream; position q is entry q mod n_b of the permutation keyed by (seed, b, q div n_b), and q div n_b is
the sample's *visit*. So every image is seen equally often, none is dropped, and a batch has one shape.

Several data sets share a bucket's stream in proportion to (images x rate): of its first q positions, the first set
has floor(q w_1 / w), and of those left over the next one has its share in the same way. Each set's part is an endless
stream of passes of its own; a rate (repeats x probability) scales n_b.
"""

import math
from functools import lru_cache

import numpy as np

from library.data.draws import ORDER, PASS, generator
from library.errors import UserError

_FINE = 10_000    # a rate that is no whole number is kept to four decimals


class Sampler:
    """The order of samples.

    bucket_of: [N] index of each row's bucket. seed >= 0. global_batch: samples of one optimizer step (G), one number, or
    one for each bucket index. set_of: [N] index of each row's data set; rates: how often each set is seen an epoch.
    batch_sizes: [used buckets] samples of one step. Raises `UserError` for no rows at all.
    """

    def __init__(self, bucket_of: np.ndarray, seed: int, global_batch, set_of: np.ndarray | None = None, rates=(1.0,)):
        if not len(bucket_of):
            raise UserError("there is no image to train on")
        self.seed = seed
        whole = all(float(rate).is_integer() for rate in rates)
        self._unit = 1 if whole else _FINE    # sizes are counted in 1/unit images
        rates = [max(1, round(rate * self._unit)) for rate in rates]
        set_of = np.zeros(len(bucket_of), np.int16) if set_of is None else set_of
        by_bucket = np.lexsort((set_of, bucket_of)).astype(np.int32)
        self.buckets, starts = np.unique(bucket_of[by_bucket], return_index=True)
        self._parts = [_Parts(rows, set_of[rows], rates) for rows in np.split(by_bucket, starts[1:])]
        self._sizes = np.array([parts.total for parts in self._parts], np.int64)
        self.batch_sizes = np.broadcast_to(np.asarray(global_batch, np.int64), int(self.buckets[-1]) + 1)[self.buckets]
        # each stream is used a pass at a time: keep this pass and the next, for all of them
        self._pass_order = lru_cache(maxsize=2 * sum(len(parts.rows) for parts in self._parts))(self._pass_order)
        self._epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def _before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket in the first `epoch` epochs."""
        return epoch * self._sizes // (self.batch_sizes * self._unit)

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps in the first `epoch` epochs."""
        return int(self._before(epoch).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch that optimizer step `step` (from 0) belongs to."""
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def batch(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Optimizer step `step` -> (bucket, rows [G], visits [G])."""
        epoch = self.epoch_of(step)
        order, rank = self._epoch_order(epoch)
        index = step - self.steps_before(epoch)
        which = int(order[index])
        size = int(self.batch_sizes[which])
        first = (int(self._before(epoch)[which]) + int(rank[index])) * size
        parts = self._parts[which]
        rows, visits = np.empty(size, np.int64), np.empty(size, np.int64)
        for part, (places, entries) in enumerate(parts.split(np.arange(first, first + size))):
            of_part = parts.rows[part]
            visits[places], entries = np.divmod(entries, len(of_part))
            for visit in np.unique(visits[places]):
                of_visit = visits[places] == visit
                rows[places[of_visit]] = of_part[self._pass_order(which, part, int(visit))[entries[of_visit]]]
        return int(self.buckets[which]), rows, visits

    def visits(self, steps: int, sets: int = 1) -> list[int]:
        """How often the first `steps` optimizer steps can at most show an image of each data set; at least once."""
        taken = self._before(self.epoch_of(max(steps - 1, 0)) + 1) * self.batch_sizes
        most = [1] * sets
        for parts, positions in zip(self._parts, taken.tolist(), strict=True):
            for each, rows, share in zip(parts.sets, parts.rows, parts.shares, strict=True):
                shown = min(positions, positions * share // parts.total + len(parts.rows))    # a split rounds once a set
                most[each] = max(most[each], -(-shown // len(rows)))
        return most

    def _pass_order(self, which: int, part: int, visit: int) -> np.ndarray:
        parts = self._parts[which]
        draw = generator(self.seed, int(self.buckets[which]) | parts.sets[part] << 32, visit, PASS)
        return draw.permutation(len(parts.rows[part])).astype(np.int32)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled buckets of an epoch's batches, and for each how many of its bucket came before."""
        counts = self._before(epoch + 1) - self._before(epoch)
        order = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        order = generator(self.seed, 0, epoch, ORDER).permutation(order)
        by_bucket = np.argsort(order, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[by_bucket] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return order, rank


class _Parts:
    """The data sets of one bucket: their rows, and how its stream is dealt to them."""

    def __init__(self, rows: np.ndarray, set_of: np.ndarray, rates: list[int]):
        sets, starts = np.unique(set_of, return_index=True)
        self.sets, self.rows = sets.tolist(), np.split(rows, starts[1:])
        self.shares = [len(of_set) * rates[each] for each, of_set in zip(self.sets, self.rows, strict=True)]
        self.total = sum(self.shares)

    def split(self, positions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions of the stream [G] -> for each set, (which of them are its own, their places in its own stream)."""
        found, places, left = [], np.arange(len(positions)), positions
        common = math.gcd(*self.shares)
        shares = [share // common for share in self.shares]
        if sum(shares) >= 2**31:    # products with a position must fit 64 bits
            shares = [max(1, share * 2**30 // sum(shares)) for share in shares]
        for number, share in enumerate(shares):
            whole = sum(shares[number:])
            taken = left * share // whole
            own = (left + 1) * share // whole > taken
            found.append((places[own], taken[own]))
            places, left = places[~own], (left - taken)[~own]
        return found
