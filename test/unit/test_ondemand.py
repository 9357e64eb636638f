"""The cache that fills as training meets what it lacks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from library.data import cache
from library.data.cache import Store, make_key
from library.data.ondemand import OnDemand


class Maker:
    """Makes an entry, and counts."""

    def __init__(self):
        self.made = []

    def __call__(self, number: int):
        def make():
            self.made.append(number)
            return {"moments": torch.full((4,), float(number))}
        return make


def read(store: OnDemand, make: Maker, number: int) -> float:
    return store.read(make_key(number), "moments", make(number))[0].item()


def test_what_is_lacking_is_made_once_and_kept(tmp_path):
    make, store = Maker(), OnDemand(Store(tmp_path))
    assert [read(store, make, number) for number in (1, 2, 1, 2)] == [1, 2, 1, 2] and make.made == [1, 2]
    store.close()
    again = OnDemand(Store(tmp_path))
    assert [read(again, make, number) for number in (2, 3, 1)] == [2, 3, 1] and make.made == [1, 2, 3]


def test_a_crash_loses_only_what_is_not_yet_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 3 * 16)    # three entries a shard
    make, store = Maker(), OnDemand(Store(tmp_path))
    for number in range(7):
        assert read(store, make, number) == number
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert [read(store, make, number) for number in range(7)] == list(range(7)) and len(make.made) == 7    # the shards are read
    after = OnDemand(Store(tmp_path))    # `store` was never closed
    assert [read(after, make, number) for number in range(7)] == list(range(7)) and make.made[7:] == [6]


def test_many_threads_make_each_entry_once(tmp_path):
    make, store = Maker(), OnDemand(Store(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: read(store, make, number % 20), range(400)))
    assert found == [float(number % 20) for number in range(400)] and sorted(make.made) == list(range(20))


def test_what_cannot_be_made_is_not_kept(tmp_path):
    store = OnDemand(Store(tmp_path))

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError):
        store.read(make_key(1), "moments", fail)
    assert read(store, Maker(), 1) == 1
