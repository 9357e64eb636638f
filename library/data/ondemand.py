"""A cache that is filled as training meets what it lacks."""

import threading

import torch

from library.data.cache import Store, Writer


class OnDemand:
    """The store of one folder, and what was made since it was opened. Many threads may read.

    What is collected is written as `Writer` writes: a crash loses at most a minute or 64 MB of it. Processes do not wait
    for each other: two that meet one image at the same time both encode it.
    """

    def __init__(self, store: Store):
        self.store, self._writer, self._fresh = store, Writer(store.folder), {}
        self._lock = threading.Lock()

    def read(self, key: bytes, field: str, make) -> torch.Tensor:
        """One tensor. make() -> {field: tensor} is called where it is neither on disk nor fresh."""
        with self._lock:
            while True:
                if key in self._fresh:
                    return self._fresh[key][field]
                try:
                    return self.store.read(key, field)
                except KeyError:
                    self._fresh[key] = make()
                if self._writer.add(key, **self._fresh[key]):    # a shard was written: from now on it is read from there
                    self.store.refresh()
                    self._fresh.clear()

    def close(self) -> None:
        """Write what is left."""
        with self._lock:
            self._writer.flush()
