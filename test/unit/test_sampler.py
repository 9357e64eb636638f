"""The order of samples and the random numbers of each: functions of (data, seed, step, global batch) alone."""

from collections import Counter
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.data import draws
from library.data.loader import Loader
from library.data.sampler import Sampler
from library.errors import UserError

# sizes of buckets, by their index; an index without images is skipped, as empty buckets are
BUCKETS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)
GLOBAL_BATCH = st.integers(1, 7)
SEED = st.integers(0, 2**63 - 1)


def rows_of(sizes, seed: int = 0) -> np.ndarray:
    """[N] bucket of each row, in no order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def sampler(sizes, seed=0, global_batch=4) -> Sampler:
    return Sampler(rows_of(sizes), seed, global_batch)


def steps_in(sizes, global_batch: int, epoch: int) -> int:
    """Batches in the first `epoch` epochs, counted one epoch at a time in exact arithmetic."""
    return sum(int(Fraction((e + 1) * n, global_batch)) - int(Fraction(e * n, global_batch)) for e in range(epoch) for n in sizes)


def same(one, other) -> bool:
    return one[0] == other[0] and np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2])


@given(BUCKETS, GLOBAL_BATCH, SEED)
def test_whole_passes_show_every_image_equally_often(sizes, global_batch, seed):
    bucket_of, order = rows_of(sizes), sampler(sizes, seed, global_batch)
    steps = order.steps_before(global_batch)    # after G epochs, n_b batches of G from each bucket
    assert steps == sum(sizes)
    seen, shown = Counter(), Counter()
    for step in range(2 * steps):
        bucket, rows, visits = order.batch(step)
        assert len(rows) == len(visits) == global_batch
        assert (bucket_of[rows] == bucket).all()    # one shape
        for row, visit in zip(rows.tolist(), visits.tolist(), strict=True):
            assert visit == seen[row]    # the visits of an image count up from 0
            seen[row] += 1
        shown[bucket] += 1
        counts = [seen[row] for row in np.flatnonzero(bucket_of == bucket).tolist()]
        assert max(counts) - min(counts) <= 1
        if step + 1 == steps:
            assert seen == dict.fromkeys(range(sum(sizes)), global_batch)
    assert seen == dict.fromkeys(range(sum(sizes)), 2 * global_batch)
    assert shown == {bucket: 2 * n for bucket, n in enumerate(sizes) if n}


@given(BUCKETS, GLOBAL_BATCH, st.integers(1, 12))
def test_at_every_epochs_end_all_buckets_are_as_far_as_a_batch_allows(sizes, global_batch, epochs):
    order = sampler(sizes, global_batch=global_batch)
    taken = Counter(order.batch(step)[0] for step in range(order.steps_before(epochs)))
    for bucket, n in enumerate(sizes):
        assert 0 <= epochs * n - global_batch * taken[bucket] < global_batch


@given(BUCKETS, GLOBAL_BATCH, SEED, st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_a_batch_is_a_function_of_seed_step_and_global_batch(sizes, global_batch, seed, steps):
    order = sampler(sizes, seed, global_batch)
    found = [order.batch(step) for step in steps]
    for step, batch in reversed(list(zip(steps, found, strict=True))):
        assert same(order.batch(step), batch)
        assert same(sampler(sizes, seed, global_batch).batch(step), batch)


def test_a_distant_step_is_what_replaying_gives():
    order, sizes = sampler([13, 5, 1], 7, 4), [13, 5, 1]
    for step in range(400):
        last = order.batch(step)
    assert same(sampler(sizes, 7, 4).batch(399), last)


def test_seeds_passes_and_epochs_are_shuffled():
    order = sampler([40, 40], global_batch=4)
    steps = order.steps_before(1)
    buckets = [[order.batch(step)[0] for step in range(epoch * steps, (epoch + 1) * steps)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in buckets}) == 3
    assert all(epoch != sorted(epoch) for epoch in buckets)
    passes = [[row for step in range(epoch * steps, (epoch + 1) * steps) if order.batch(step)[0] == 0
               for row in order.batch(step)[1].tolist()] for epoch in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) != passes[0]
    assert not same(order.batch(0), sampler([40, 40], 1, 4).batch(0))


def test_all_places_in_a_pass_are_equally_likely():
    firsts = Counter(int(Sampler(np.zeros(6, int), seed, 6).batch(0)[1][0]) for seed in range(3000))
    assert all(abs(firsts[row] - 500) < 100 for row in range(6))    # five standard deviations


@given(BUCKETS, GLOBAL_BATCH, st.integers(0, 30))
def test_epochs_and_steps_agree(sizes, global_batch, epoch):
    order = sampler(sizes, global_batch=global_batch)
    first, after = steps_in(sizes, global_batch, epoch), steps_in(sizes, global_batch, epoch + 1)
    assert order.steps_before(epoch) == first
    for step in range(first, after):
        assert order.epoch_of(step) == epoch


@given(BUCKETS, GLOBAL_BATCH, st.integers(0, 10**9))
def test_the_epoch_of_a_distant_step(sizes, global_batch, step):
    order = sampler(sizes, global_batch=global_batch)
    epoch = order.epoch_of(step)
    assert order.steps_before(epoch) <= step < order.steps_before(epoch + 1)


@given(BUCKETS, GLOBAL_BATCH, st.integers(1, 40))
def test_no_visit_is_beyond_the_last_one(sizes, global_batch, steps):
    order = sampler(sizes, global_batch=global_batch)
    highest = max(int(order.batch(step)[2].max()) for step in range(steps))
    assert highest <= order.visits(steps)[0] - 1
    ended = order.steps_before(order.epoch_of(steps - 1) + 1)    # and by the end of the epoch it is reached
    assert max(int(order.batch(step)[2].max()) for step in range(ended)) == order.visits(steps)[0] - 1


def test_one_image_with_a_batch_of_sixteen():
    order = Sampler(np.array([3]), 0, 16)
    for step in range(5):
        bucket, rows, visits = order.batch(step)
        assert bucket == 3 and rows.tolist() == [0] * 16
        assert visits.tolist() == list(range(16 * step, 16 * step + 16))
    assert order.steps_before(16) == 1 and order.steps_before(15) == 0


def test_a_thin_bucket_beside_a_thick_one_stops_nothing():
    order = sampler([1, 1000], global_batch=16)
    batches = [order.batch(step)[0] for step in range(order.steps_before(16))]
    assert batches.count(0) == 1 and batches.count(1) == 1000


def test_no_images_at_all():
    with pytest.raises(UserError, match="no image"):
        Sampler(np.zeros(0, int), 0, 4)


# what each process takes

def loader(order: Sampler, rank: int, world: int, accumulation: int) -> Loader:
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, dataloader_num_workers=0, image_interpolation_mode="lanczos")
    return Loader(SimpleNamespace(table=None), order, None, None, args, 0, accelerator)


@given(BUCKETS, SEED, st.integers(0, 50))
def test_processes_and_micro_steps_share_one_batch(sizes, seed, step):
    order = sampler(sizes, seed, 24)
    bucket, rows, visits = order.batch(step)
    whole = list(zip(rows.tolist(), visits.tolist(), strict=True))
    for world, accumulation in product((1, 2, 3), (1, 2, 4)):
        dealt = []
        for micro, rank in product(range(accumulation), range(world)):
            mine, at, where = loader(order, rank, world, accumulation).samples(step, micro)
            assert where == bucket and len(mine) == len(at) == 24 // (world * accumulation)
            dealt += zip(mine.tolist(), at.tolist(), strict=True)
        assert len(set(dealt)) == 24    # no sample twice: the visit tells two of one image apart
        assert dealt == whole    # and every run adds them up in the same order


# the numbers of a sample

def first(*key: int) -> tuple:
    return tuple(draws.generator(*key).random(4))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 63))
def test_every_bit_of_the_key_counts(key, place, bit):
    other = list(key)
    other[place] ^= 1 << bit
    assert first(*key) == first(*key)
    assert first(*key) != first(*other)


def test_streams_of_neighbours_do_not_overlap():
    numbers = [number for key in product(range(3), range(3), range(3), range(8))
               for number in draws.generator(*key).integers(0, 2**63, 50).tolist()]
    assert len(set(numbers)) == len(numbers)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as in table 2 and figure 4 of Salmon et al., 2011."""
    (k0, k1), (a, b, c, d), mask = key, counter, 2**64 - 1
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & mask, (left >> 64) ^ d ^ k1, left & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


@given(*[st.integers(0, 2**64 - 1)] * 4)
def test_the_generator_is_philox(seed, sample, visit, purpose):
    drawn = draws.generator(seed, sample, visit, purpose).bit_generator.random_raw(8).tolist()
    assert drawn == philox((seed, sample), (1, 0, visit, purpose)) + philox((seed, sample), (2, 0, visit, purpose))


RATES = st.sampled_from([1, 2, 3, 0.5, 0.25, 1.5])
SETS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), RATES), min_size=1, max_size=4)


def of_sets(sets, global_batch, seed=1):
    """A sampler of sets of (buckets, images a bucket, rate); and each row's set."""
    bucket_of = np.concatenate([np.repeat(np.arange(buckets), images) for buckets, images, _ in sets])
    set_of = np.repeat(np.arange(len(sets)), [buckets * images for buckets, images, _ in sets])
    return Sampler(bucket_of, seed, global_batch, set_of, [rate for *_, rate in sets]), bucket_of, set_of


@given(SETS, st.integers(1, 5))
def test_sets_are_seen_in_proportion_to_their_rates(sets, global_batch):
    order, bucket_of, set_of = of_sets(sets, global_batch)
    epochs = 8
    seen = np.zeros(len(bucket_of), int)
    for step in range(order.steps_before(epochs)):
        bucket, rows, visits = order.batch(step)
        assert (bucket_of[rows] == bucket).all() and len(rows) == global_batch
        for row, visit in zip(rows, visits, strict=True):
            assert visit <= seen[row] + 1    # its visits come in turn, but for the order inside one batch
            seen[row] += 1
    for number, (*_, rate) in enumerate(sets):
        for bucket in np.unique(bucket_of):
            of = seen[(set_of == number) & (bucket_of == bucket)]
            if len(of):    # a batch may be open, and each set rounds once
                assert abs(of.sum() - epochs * rate * len(of)) <= global_batch + len(sets)
                assert of.max() - of.min() <= 1    # none of a set is favoured


@given(SETS, st.integers(1, 5), st.integers(1, 60))
def test_no_visit_of_a_set_is_beyond_what_is_promised(sets, global_batch, steps):
    order, _, set_of = of_sets(sets, global_batch)
    promised = order.visits(steps, len(sets))
    for step in range(steps):
        _, rows, visits = order.batch(step)
        assert (visits < np.array(promised)[set_of[rows]]).all()


def test_sets_are_mixed_within_a_batch_as_evenly_as_can_be():
    order, _, set_of = of_sets([(1, 10, 3), (1, 30, 1)], 4)    # as many of one as of the other
    assert all(sorted(set_of[order.batch(step)[1]]) == [0, 0, 1, 1] for step in range(60))


def test_each_bucket_has_its_own_batch_size():
    order = Sampler(np.repeat([0, 1], 12), 1, np.array([2, 3]))
    assert {(bucket, len(rows)) for bucket, rows, _ in map(order.batch, range(10))} == {(0, 2), (1, 3)}
    assert order.steps_before(1) == 6 + 4
