"""The store of cached tensors: what is written comes back, what is damaged is noticed and made again, nothing is half."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from files import replace_quietly
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import make_images

import train_sdxl
from library.data import cache, dataset, prepare
from library.data.cache import KEY, Store, Writer, make_key
from library.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = st.tuples(st.lists(st.integers(0, 4), max_size=3),
                  st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]))


def tensor(number: int, shape=(4, 6), dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 100).to(dtype)


def write(folder: Path, numbers) -> dict[bytes, torch.Tensor]:
    entries = {make_key(number): tensor(number) for number in numbers}
    with Writer(folder) as writer:
        for key, value in entries.items():
            writer.add(key, moments=value)
    return entries


def keys(entries) -> np.ndarray:
    return np.array(list(entries), KEY)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Type, shape and every bit."""
    bits = [value.contiguous().reshape(-1).view(torch.uint8).tolist() for value in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]


# round trip

@given(st.dictionaries(st.integers(0, 999), st.dictionaries(st.sampled_from("ab"), KINDS, min_size=1), max_size=6),
       st.integers(1, 300))
def test_what_is_written_is_read(tmp_path_factory, entries, shard_bytes):
    folder = tmp_path_factory.mktemp("store")
    made = {make_key(number): {field: tensor(number, *kind) for field, kind in fields.items()}
            for number, fields in entries.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", shard_bytes)
        with Writer(folder) as writer:
            for key, fields in made.items():
                writer.add(key, **fields)
    store = Store(folder)
    assert store.damaged == []
    assert store.has(keys([*made, make_key("another")])).tolist() == [True] * len(made) + [False]
    assert all(same(store.read(key, field), value) for key, fields in made.items() for field, value in fields.items())


def test_views_and_transposed_tensors(tmp_path):
    whole = tensor(0, (6, 8))
    parts = {"first": whole[:, 1:3], "second": whole.T, "third": whole.to(memory_format=torch.contiguous_format)[::2]}
    with Writer(tmp_path) as writer:
        writer.add(make_key(0), **parts)
    assert all(same(Store(tmp_path).read(make_key(0), name), part.contiguous()) for name, part in parts.items())


def test_what_is_not_there(tmp_path):
    store = Store(tmp_path / "new")
    assert store.has(keys([make_key(1)])).tolist() == [False] and store.has(keys([])).tolist() == []
    with pytest.raises(KeyError, match=make_key(1).decode()):
        store.read(make_key(1), "moments")


def test_large_caches_are_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1000)
    write(tmp_path, range(100))    # of 96 bytes
    assert len(list(tmp_path.glob("*.safetensors"))) == 10 and not list(tmp_path.glob("*.tmp"))


def test_an_unchanged_shard_is_checked_once(tmp_path, monkeypatch):
    entries = write(tmp_path, range(3))
    Store(tmp_path)
    monkeypatch.setattr(cache, "_checksum", lambda tensor: pytest.fail("checked again"))
    assert Store(tmp_path).has(keys(entries)).all()


# damage

@pytest.mark.parametrize("seen", [False, True], ids=["new", "seen"])
@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(path.read_bytes()[:20]),
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(np.random.default_rng(0).bytes(2000)),
    lambda path: path.write_text("no tensors"), lambda path: save_file({"a": torch.zeros(3)}, path),
    lambda path: save_file({"a": torch.zeros(3)}, path, metadata={"crc32": "no JSON"}),
    lambda path: replace_quietly(path, path.read_bytes()[:-1] + b"?"),
    lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))])    # the same bytes as another type
def test_a_damaged_shard_is_named_and_its_entries_are_missing(tmp_path, spoil, seen):
    kept = write(tmp_path, range(100, 103))
    before = set(tmp_path.glob("*.safetensors"))
    lost = write(tmp_path, range(3))
    shard, = set(tmp_path.glob("*.safetensors")) - before
    if seen:
        assert Store(tmp_path).damaged == []
    spoil(shard)
    store = Store(tmp_path)
    assert len(store.damaged) == 1 and shard.name in store.damaged[0]
    assert not store.has(keys(lost)).any() and store.has(keys(kept)).all()
    write(tmp_path, range(3))
    store = Store(tmp_path)
    assert store.damaged == [] and all(same(store.read(key, "moments"), value) for key, value in (lost | kept).items())


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_any_flipped_bits_of_any_byte_are_noticed(tmp_path_factory, place, bits):
    folder = tmp_path_factory.mktemp("store")
    entries = write(folder, range(2))
    shard, = folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[place % len(data)] ^= bits
    shard.write_bytes(data)
    store = Store(folder)
    if store.damaged:
        assert not store.has(keys(entries)).any()
    else:    # padding, say: nothing that matters
        assert all(same(store.read(key, "moments"), value) for key, value in entries.items())


def test_what_a_killed_run_left_half_written_is_no_entry_and_goes_away(tmp_path):
    entries = write(tmp_path, range(2))
    old, living = tmp_path / "0000-a.tmp", tmp_path / "0000-b.tmp"
    for partial in (old, living):
        partial.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert Store(tmp_path).damaged == [] and Store(tmp_path).has(keys(entries)).all()
    assert not old.exists() and living.exists()


# filling a cache from a table

@pytest.fixture
def data(tmp_path):
    folder = make_images(tmp_path / "images", [(80, 64), (64, 80), (90, 64), (64, 64), (64, 99)])
    args = train_sdxl.parse_args(["--pretrained_model_name_or_path=x", f"--train_data_dir={folder}", "--resolution=64"])
    return dataset.load(args, 0, tmp_path / "index", False)


def encoder(seen: list, spoil=lambda moments, batch: moments):
    def encode(batch):
        seen.append(batch.clone())
        return {"moments": spoil(batch[:, ::8, ::8].permute(0, 3, 1, 2).float(), batch)}
    return lambda: encode


def fill(data, store, seen, **options):
    return prepare.cache_latents(data, np.arange(len(data.table)), store, "recipe", [3], 2, "lanczos", encoder(seen, **options))


def jobs_of(data) -> list[tuple[int, int]]:
    return [(row, number) for row in range(len(data.table)) for number in range(data.table.variants(row, 3))]


def test_only_what_is_missing_is_encoded(tmp_path, data, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)    # a shard an entry
    store, seen = Store(tmp_path / "store"), []
    assert fill(data, store, seen) == ({}, 13)    # the square image has one cut
    assert sum(map(len, seen)) == 13 and max(map(len, seen)) == 2
    for row, number in jobs_of(data):
        pixels = torch.tensor(prepare.load_pixels(data, row, number, "lanczos"))
        cached = store.read(prepare.latent_key(data.table, row, number, "recipe"), "moments")
        assert same(cached, pixels[::8, ::8].permute(2, 0, 1).float())
    again = []
    assert fill(data, Store(tmp_path / "store"), again) == ({}, 0) and again == []

    spoilt = sorted((tmp_path / "store").glob("*.safetensors"))[5]
    spoilt.write_bytes(b"")
    store = Store(tmp_path / "store")
    assert len(store.damaged) == 1 and fill(data, store, again) == ({}, 1)
    lone, = again    # encoded in the company it had before: the numbers are those of the first time, to the last bit
    assert any(torch.equal(lone, batch) for batch in seen)
    assert store.has(keys(prepare.latent_key(data.table, row, number, "recipe") for row, number in jobs_of(data))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_name_their_image(tmp_path, data, value):
    wanted = prepare.load_pixels(data, 2, 1, "lanczos")

    def spoil(moments, batch):
        for place, pixels in enumerate(batch.numpy()):
            if np.array_equal(pixels, wanted):
                moments[place, 0, 3, 3] = value
        return moments

    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match=r"image002\.png.*--vae_dtype fp32"):
        fill(data, store, [], spoil=spoil)
    store.refresh()
    assert not store.has(keys([prepare.latent_key(data.table, 2, 1, "recipe")])).any()


def test_images_that_cannot_be_decoded_are_returned_and_the_others_are_cached(tmp_path, data):
    path = tmp_path / "images" / "image001.png"
    path.write_bytes(path.read_bytes()[:300])
    store = Store(tmp_path / "store")
    faults, count = fill(data, store, [])
    assert list(faults) == [1] and "truncated" in faults[1]
    there = [row for row, number in jobs_of(data) if store.has(keys([prepare.latent_key(data.table, row, number, "recipe")]))[0]]
    assert set(there) == {0, 2, 3, 4}


def test_prompts(tmp_path):
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"hidden": torch.tensor([[float(len(prompt))] for prompt in prompts]).to(torch.bfloat16)}

    for prompts, count in ((["a", "bb", "a", ""], 3), (["bb", "ccc"], 1)):
        assert prepare.cache_prompts(prompts, Store(tmp_path), "recipe", 2, lambda: encode) == count
    assert asked == ["", "a", "bb", "bb", "ccc"]    # the second time, bb keeps company
    for prompt in asked:
        assert Store(tmp_path).read(prepare.prompt_key(prompt, "recipe"), "hidden").tolist() == [len(prompt)]


# a full disk, and several processes

FULL = """
import resource, sys, torch
from pathlib import Path
from library.data.cache import Store, Writer, make_key
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with Writer(folder) as writer:
        writer.add(make_key(1), moments=torch.ones(1000))
        writer.flush()
        writer.add(make_key(2), moments=torch.ones(100_000))
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
print(sorted(path.suffix for path in folder.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
store = Store(folder)
print(store.damaged, store.read(make_key(1), "moments").sum().item())
"""

SHARE = """
import json, sys
from pathlib import Path
import numpy as np, torch.distributed as dist
import train_sdxl
from library.data import cache, dataset, prepare
root, rank, done = Path(sys.argv[1]), int(sys.argv[2]), []
dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
args = train_sdxl.parse_args(["--pretrained_model_name_or_path=x", f"--train_data_dir={root}/images", "--resolution=64"])
data = dataset.load(args, 0, root / "index", True)
store = cache.Store(root / "store")
def encode(batch):
    done.append(len(batch))
    return {"moments": batch[:, ::8, ::8].permute(0, 3, 1, 2).float()}
result = prepare.cache_latents(data, np.arange(5), store, "recipe", [3], 2, "lanczos", lambda: encode)
jobs = [(row, number) for row in range(5) for number in range(data.table.variants(row, 3))]
keys = [prepare.latent_key(data.table, *job, "recipe") for job in jobs]
print(json.dumps([result, sum(done), store.has(np.array(keys, cache.KEY)).tolist()]))
"""


def start(program: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def output_of(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def test_a_full_disk_leaves_no_shard_and_spoils_none(tmp_path):
    lines = output_of(start(FULL, tmp_path)).splitlines()
    assert lines[0].startswith("OSError 27 ") and str(tmp_path) in lines[0]    # EFBIG
    assert lines[1:] == ["['.safetensors']", "[] 1000.0"]


def test_two_processes_share_the_work_and_see_it_all(tmp_path, data):
    outputs = [json.loads(output_of(process)) for process in [start(SHARE, tmp_path, rank) for rank in range(2)]]
    assert [(result, there) for result, _, there in outputs] == [([{}, 13], [True] * 13)] * 2
    assert sorted(done for _, done, _ in outputs) == [6, 7]    # no image twice
    alone, shared = Store(tmp_path / "alone"), Store(tmp_path / "store")
    fill(data, alone, [])
    for key in (prepare.latent_key(data.table, *job, "recipe") for job in jobs_of(data)):
        assert same(alone.read(key, "moments"), shared.read(key, "moments"))
