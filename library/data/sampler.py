"""Which samples an optimizer step sees: a function of (bucket sizes, seed, step, global batch) and nothing else.

Not of the number of processes, of workers or of what was loaded before; so a restart computes instead of replaying.

Construction, with bucket sizes n_b and global batch G: epoch e holds floor((e+1) n_b / G) - floor(e n_b / G)
batches of bucket b, shuffled by (seed, e). The j-th batch of bucket b takes the positions jG .. jG+G-1 of b's
endless stream; position q is entry q mod n_b of the permutation keyed by (seed, b, q div n_b), and q div n_b is
the sample's *visit*. So every image is seen equally often, none is dropped, and a batch has one shape.
"""

from functools import lru_cache

import numpy as np

from library.data.draws import ORDER, PASS, generator
from library.errors import UserError


class Sampler:
    """The order of samples.

    bucket_of: [N] index of each row's bucket. seed >= 0. global_batch: samples of one optimizer step (G).
    Raises `UserError` for no rows at all.
    """

    def __init__(self, bucket_of: np.ndarray, seed: int, global_batch: int):
        if not len(bucket_of):
            raise UserError("there is no image to train on")
        self.seed, self.global_batch = seed, global_batch
        by_bucket = np.argsort(bucket_of, kind="stable").astype(np.int32)
        self.buckets, starts = np.unique(bucket_of[by_bucket], return_index=True)
        self._rows = np.split(by_bucket, starts[1:])
        self._sizes = np.array([len(rows) for rows in self._rows], np.int64)
        # each bucket's stream is used a pass at a time: keep this pass and the next, for all of them
        self._pass_order = lru_cache(maxsize=2 * len(self._rows))(self._pass_order)
        self._epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps in the first `epoch` epochs."""
        return int((epoch * self._sizes // self.global_batch).sum())

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
        first = (epoch * int(self._sizes[which]) // self.global_batch + int(rank[index])) * self.global_batch
        position = np.arange(first, first + self.global_batch)
        visits, entries = np.divmod(position, self._sizes[which])
        rows = np.empty(self.global_batch, np.int64)
        for visit in np.unique(visits):
            of_visit = visits == visit
            rows[of_visit] = self._rows[which][self._pass_order(which, int(visit))[entries[of_visit]]]
        return int(self.buckets[which]), rows, visits

    def last_visit(self, steps: int) -> int:
        """The highest visit that the first `steps` optimizer steps can reach, in any bucket."""
        taken = (self.epoch_of(max(steps - 1, 0)) + 1) * self._sizes // self.global_batch * self.global_batch
        return int(np.maximum((taken - 1) // self._sizes, 0).max())

    def _pass_order(self, which: int, visit: int) -> np.ndarray:
        draw = generator(self.seed, int(self.buckets[which]), visit, PASS)
        return draw.permutation(len(self._rows[which])).astype(np.int32)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled buckets of an epoch's batches, and for each how many of its bucket came before."""
        counts = (epoch + 1) * self._sizes // self.global_batch - epoch * self._sizes // self.global_batch
        order = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        order = generator(self.seed, 0, epoch, ORDER).permutation(order)
        by_bucket = np.argsort(order, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[by_bucket] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return order, rank
