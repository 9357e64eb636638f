"""The data samples of SimpleTuner's quickstarts and the LAION layout of Ascend's guide, as they stand there, paths apart."""

import json
import tarfile

import pytest
import tiny
from seeds import SD3, SDXL
from test_data_sets import losses


@pytest.mark.parametrize("sample, kept", [(SDXL, ["a_brown_dog", "a_red_cat"]), (SD3, ["a_brown_dog", "a_red_cat", "too_small"])],
                         ids=["sdxl", "sd3"])
def test_simpletuners_data_samples(train, tmp_path, monkeypatch, capsys, sample, kept):
    images = tmp_path / "datasets" / "pseudo-camera-10k"
    images.mkdir(parents=True)
    for number, (name, size) in enumerate({"a_red_cat": (1300, 900), "a_brown_dog": (800, 640), "too_small": (500, 400)}.items()):
        tiny.picture(*size, number).save(images / f"{name}.png")
    monkeypatch.chdir(tmp_path)    # the caches' folders are relative there
    config = tmp_path / "multidatabackend.json"
    config.write_text(sample.replace("/home/user/simpletuner", str(tmp_path)))
    out = train("--data_backend_config", config, "--max_train_steps", 2, "--train_batch_size", 1, "--resolution", 1024,
                without=["train_data_dir", "resolution"])
    assert len(losses(out)) == 2
    said = capsys.readouterr().out
    assert f"{len(kept)} images in 1 bucket" in said
    assert ("too_small" in kept) or "minimum_image_size" in said
    folders = [entry.get("cache_dir_vae") or entry["cache_dir"] for entry in json.loads(config.read_text())]
    assert all(list((tmp_path / folder).glob("*.safetensors")) for folder in folders)


def test_the_laion_layout_of_ascends_guide(train, tmp_path, capsys):
    """000xx.tar of 000xxxxx.jpg, 000xxxxx.json and train-0001.txt, with 000xx.parquet and 000xx_stats.json beside."""
    root = tmp_path / "dataset"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                tiny.picture(80, 64, number).save(tmp_path / f"{key}.jpg")
                (tmp_path / f"{key}.json").write_text(json.dumps({"caption": f"picture {key}", "url": "http://x", "width": 1}))
                for suffix in (".jpg", ".json"):
                    tar.add(tmp_path / f"{key}{suffix}", f"{key}{suffix}")
            (tmp_path / "train-0001.txt").write_text("of no image")
            tar.add(tmp_path / "train-0001.txt", "train-0001.txt")
        (root / f"{shard:05d}.parquet").write_bytes(b"")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    flags = ("--train_data_dir", root, "--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 128)
    assert len(losses(train(*flags, "--max_train_steps", 3))) == 3
    said = capsys.readouterr().out
    assert "6 images" in said and "train-0001" in said    # what belongs to no image is named
