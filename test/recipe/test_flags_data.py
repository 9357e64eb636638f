"""Each flag of the group `data` changes what it says it changes."""

import threading

import datasets
import numpy as np
import pytest
import tiny
from pieces import make, note_calls
from PIL import Image

from library.data import dataset, prepare
from library.data.images import MODES
from library.errors import UserError


@pytest.fixture
def load(parse, tmp_path):
    """`load(*flags)` -> the data of these flags."""

    def load(*flags, without=()):
        args = parse(*flags, without=without)
        return dataset.load(args, args.seed, tmp_path / "scan", decode=False)

    return load


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A folder with small.parquet (4 rows) and large.parquet (5), and configs of these names."""
    folder = tmp_path_factory.mktemp("parquet")
    for name, rows in (("small", 4), ("large", 5)):
        columns = {"image": [tiny.picture(64, 64, row) for row in range(rows)], "text": [f"row {row}" for row in range(rows)],
                   "photo": [tiny.picture(96, 64, 9 + row) for row in range(rows)], "titre": [["un", "deux"]] * rows}
        made = datasets.Dataset.from_dict(columns)
        for column in ("image", "photo"):
            made = made.cast_column(column, datasets.Image())
        made.to_parquet(folder / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_train_data_dir(load, tmp_path):
    tiny.make_images(tmp_path / "own", [(64, 64), (80, 80)])
    assert load("--train_data_dir", tmp_path / "own").table.name.tolist() == ["image000.png", "image001.png"]
    assert len(load().table) == 6


def test_dataset_name_its_config_and_cache(load, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "default")
    for number, (flags, rows) in enumerate([(("--dataset_name", parquet / "small.parquet"), 4),
                                            (("--dataset_name", parquet, "--dataset_config_name", "small"), 4),
                                            (("--dataset_name", parquet, "--dataset_config_name", "large"), 5)]):
        cache = tmp_path / f"cache{number}"
        table = load(*flags, "--cache_dir", cache, without=["train_data_dir"]).table
        assert [table.texts(row) for row in range(rows)] == [[f"row {row}"] for row in range(rows)]
        assert list(cache.rglob("*.arrow")) and not (tmp_path / "default").exists()


def test_columns(load, parquet, tmp_path):
    flags = ("--dataset_name", parquet / "small.parquet", "--cache_dir", tmp_path)
    table = load(*flags, "--image_column", "photo", "--caption_column", "titre", without=["train_data_dir"]).table
    assert table.size.tolist() == [[96, 64]] * 4 and table.texts(0) == ["un", "deux"]
    table = load(*flags, without=["train_data_dir"]).table
    assert table.size.tolist() == [[64, 64]] * 4 and table.texts(0) == ["row 0"]
    for flag in ("--image_column", "--caption_column"):
        with pytest.raises(UserError, match=f"{flag}: .*no column 'nothing'; it has image, text, photo, titre"):
            load(*flags, flag, "nothing", without=["train_data_dir"])


def test_caption_extension(load, tmp_path):
    folder = tiny.make_images(tmp_path / "own", [(64, 64)])
    (folder / "image000.tags").write_text("one, two")
    assert load("--train_data_dir", folder, "--caption_extension", ".tags").table.texts(0) == ["one, two"]
    assert load("--train_data_dir", folder).table.texts(0) == [(folder / "image000.txt").read_text()]


def test_max_train_samples(load):
    chosen = {seed: load("--max_train_samples", 3, "--seed", seed).table.name.tolist() for seed in range(6)}
    assert all(len(set(names)) == 3 for names in chosen.values()) and len({tuple(names) for names in chosen.values()}) > 1
    assert load("--max_train_samples", 3, "--seed", 4).table.name.tolist() == chosen[4]


def test_resolution(parse, tmp_path):
    made = make(parse("--resolution", "128,64", "--cache_latents=false"), tmp_path)
    assert made.table.buckets == [(128, 64)]
    assert made.loader.compose(0, 0)["latents"].shape == (2, 4, 8, 16)
    assert made.loader.compose(0, 0)["time_ids"][:, 4:].tolist() == [[64, 128]] * 2


def cuts(table, visits: int = 8) -> list[set]:
    return [{table.cut(row, visit)[:2] for visit in range(visits)} for row in range(len(table))]


def test_center_crop(load):
    table = load("--center_crop").table
    trims = (table.resized - np.array(table.buckets)[table.bucket_of]).tolist()
    assert cuts(table) == [{(round(wide / 2), round(high / 2))} for wide, high in trims]
    free = load().table
    assert max(map(len, cuts(free))) > 4 and any(max(trim) for trim in trims)
    assert all(0 <= left <= wide and 0 <= top <= high for places, (wide, high) in zip(cuts(free), trims, strict=True)
               for left, top in places)


def test_random_crop(load):
    flags = ("--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 128)
    assert max(map(len, cuts(load(*flags).table))) == 1
    assert max(map(len, cuts(load(*flags, "--random_crop").table))) > 1


def test_random_flip(parse, tmp_path):
    still, flipping = (make(parse(f"--random_flip={on}", "--center_crop"), tmp_path) for on in (False, True))
    trims = (still.table.resized - 64)[:, 0]
    for row in np.flatnonzero(trims % 2 == 0):    # an odd trim has no middle: mirrored, the cut is one pixel beside
        pixels = [[prepare.load_pixels(made.data, row, visit, "lanczos") for visit in range(2)]
                  for made in (still, flipping)]
        assert (pixels[0][0] == pixels[0][1]).all()
        upright, mirrored = pixels[1] if (pixels[1][0] == pixels[0][0]).all() else pixels[1][::-1]
        assert (upright == pixels[0][0]).all() and (mirrored == upright[:, ::-1]).all() and (mirrored != upright).any()


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_image_interpolation_mode(parse, tmp_path, tiny_images, mode):
    recipes, flags = [], ("--resolution", 48, "--center_crop", "--image_interpolation_mode", mode)
    made = make(parse(*flags, "--cache_latents=false"), tmp_path)
    for row in made.loader.samples(0, 0)[0]:
        with Image.open(tiny_images / str(made.table.name[row])) as image:
            left, top, *_ = made.table.cut(row, 0)
            wanted = image.convert("RGB").resize(tuple(made.table.resized[row].tolist()), MODES[mode])
            wanted = np.asarray(wanted.crop((left, top, left + 48, top + 48)))
        assert (prepare.load_pixels(made.data, row, 0, mode) == wanted).all()
    for other in (flags, ("--resolution", 48, "--image_interpolation_mode", "box" if mode != "box" else "lanczos")):
        args = parse(*other)
        recipes.append(made.encoders.latent_recipe(tmp_path / "weights.json", args.image_interpolation_mode))
    assert recipes[0] == made.latents.recipe != recipes[1]    # another key in the cache


def test_bucket_flags(load):
    flags = ("--enable_bucket", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32)

    def used(*more):
        table = load(*more).table
        return {table.buckets[bucket] for bucket in table.bucket_of}, table

    assert used()[0] == {(64, 64)}
    assert len(used(*flags)[0]) > 1
    all_sides = {side for pair in used(*flags)[1].buckets for side in pair}
    assert min(all_sides) == 32 and max(all_sides) == 96 and not any(side % 32 for side in all_sides)
    for name, value, low, high in (("--min_bucket_reso", 64, 64, 64), ("--max_bucket_reso", 64, 32, 64)):
        sides = {side for pair in used(*flags, name, value)[1].buckets for side in pair}
        assert (min(sides), max(sides)) == (low, high)
    finer = {side for pair in used(*flags, "--bucket_reso_steps", 8)[1].buckets for side in pair}
    assert {40, 48, 88} < finer
    enlarged, kept = used(*flags, "--resolution", 96)[1], used(*flags, "--resolution", 96, "--bucket_no_upscale")[1]
    assert (enlarged.resized > enlarged.size).any() and not (kept.resized > kept.size).any()


def test_shuffle_caption_and_keep_tokens(parse, tmp_path):
    folder = tiny.make_images(tmp_path / "own", [(64, 64)] * 4)
    for number in range(4):
        (folder / f"image{number:03d}.txt").write_text("a, b, c, d, e")
    flags = ("--train_data_dir", folder, "--cache_text_encoder_outputs=false")

    def shown(*more):
        loader = make(parse(*flags, *more), tmp_path / "cache").loader
        return {tuple(loader.prompt(row, visit).split(", ")) for row in range(4) for visit in range(40)}

    assert shown() == {("a", "b", "c", "d", "e")}
    free, kept = shown("--shuffle_caption"), shown("--shuffle_caption", "--keep_tokens", 3)
    assert len(free) > 30 and all(sorted(tags) == list("abcde") for tags in free) and {tags[0] for tags in free} == set("abcde")
    assert kept == {("a", "b", "c", "d", "e"), ("a", "b", "c", "e", "d")}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_proportion_empty_prompts(parse, tmp_path, share):
    loader = make(parse("--proportion_empty_prompts", share), tmp_path).loader
    empty = np.mean([loader.prompt(row, visit) == "" for row in range(6) for visit in range(200)])
    assert abs(empty - share) < 0.06 and (0 < share < 1 or empty == share)


def test_skip_bad_images(load, tmp_path):
    folder = tiny.make_images(tmp_path / "own", [(64, 64), (64, 64), (64, 64)])
    (folder / "image001.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="1 of 3 images .*\n  image001.png: .*\n.*--skip_bad_images"):
        load("--train_data_dir", folder)
    data = load("--train_data_dir", folder, "--skip_bad_images")
    table, notes = data.table, data.notes
    assert table.name.tolist() == ["image000.png", "image002.png"]
    assert any("1 of 3 images" in note and "image001.png" in note for note in notes)


def test_dataloader_num_workers(parse, tmp_path, monkeypatch):
    """Who prepares the batches, and how many ahead of the one that is trained on; the batches stay the same."""
    taken = []
    for workers in (0, 3):
        made = make(parse("--dataloader_num_workers", workers, "--max_train_steps", 8), tmp_path)
        threads, compose = [], made.loader.compose
        monkeypatch.setattr(made.loader, "compose", lambda *job, threads=threads, compose=compose: (
            threads.append(threading.current_thread()), compose(*job))[1])
        batches = made.loader.batches(0, 8)
        first = next(batches)
        rest = list(batches)
        taken.append([first, *rest])
        assert (set(threads) == {threading.main_thread()}) == (workers == 0) and len(threads) == 8
        ahead = note_calls(monkeypatch, made.loader, "compose")
        asked = made.loader.batches(0, 8)
        next(asked)
        asked.close()
        assert len(ahead) <= 1 + workers and (workers or len(ahead) == 1)
    for one, other in zip(*taken, strict=True):
        assert all((one[name] == other[name]).all() for name in one)
