"""prepare_dataset.py: it says of a data set what training then finds, touches none of it, and needs no model."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from browser import columns_of
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from transformers import T5TokenizerFast

import prepare_dataset
import train_lora_sd3
import train_lora_sdxl
import train_sd3
from library import errors
from library.data import dataset

REPOSITORY = Path(__file__).resolve().parents[2]


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def images(tiny_images, tmp_path):
    return shutil.copytree(tiny_images, tmp_path / "pictures")


@pytest.fixture
def prepare(tmp_path, capsys):
    """`prepare(images, *flags)` -> the words of the page, what its script reads, and the sentence it ended on, if any."""
    def prepare(images, *flags):
        args = prepare_dataset.parse_args(["--train_data_dir", str(images), "--output_dir", str(tmp_path / "out"), "--seed", "1",
                                           "--resolution", "64", "--train_batch_size", "2", *map(str, flags)])
        before, ended = snapshot(Path(images)), None
        path = tmp_path / "out" / "dataset_report.html"
        path.unlink(missing_ok=True)
        try:
            prepare_dataset.main(args)
        except errors.UserError as error:
            ended = str(error)
        assert snapshot(Path(images)) == before
        if not path.exists():
            return "", {}, ended
        page = path.read_text("utf-8")
        text = re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.S))
        return text, columns_of(path), ended
    return prepare


def spoil(folder: Path) -> None:
    """A file of each kind that is no image, and two images without a usable caption."""
    for name, content in (("bad1.png", b"<html>"), ("bad2.jpg", b""), ("cut.png", (folder / "image000.png").read_bytes()[:300])):
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a photo")
    tiny.picture(64, 64, 50).save(folder / "silent.png")
    tiny.picture(64, 64, 51).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))


BAD = {"bad1.png", "bad2.jpg", "cut.png", "silent.png", "latin.png"}


def test_a_good_data_set(prepare, images):
    text, columns, ended = prepare(images, "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128")
    assert ended is None and "would not start" not in text and "Images 6 of 6 found; 0 are left out" in text
    assert columns["name"] == sorted(path.name for path in images.glob("*.png")) and all(columns["thumb"])
    assert columns["prompt"] == [path.read_text() for path in sorted(images.glob("*.txt"))]
    assert "No tokenizer was named" in text


def test_all_faults_are_shown_at_once_and_training_would_not_start(prepare, images, capsys):
    spoil(images)
    text, columns, ended = prepare(images)
    assert "Training would not start" in text and "Images 6 of 11 found; 5 are left out" in text
    assert "5 images cannot be used" in ended and "without a caption: 1" in ended and "--skip_bad_images" in ended
    left_out = {name: reason for name, reason in zip(columns["name"], columns["reason"], strict=True) if reason}
    assert left_out.keys() == BAD and left_out["bad2.jpg"] == "the file is empty" and "UTF-8" in left_out["latin.png"]
    pictures = {name for name, thumb in zip(columns["name"], columns["thumb"], strict=True) if thumb}
    assert pictures >= {"silent.png", "latin.png"} and not pictures & {"bad1.png", "bad2.jpg", "cut.png"}    # what can be seen is
    text, columns, ended = prepare(images, "--skip_bad_images")
    assert ended is None and "would not start" not in text and {name for name, reason in zip(
        columns["name"], columns["reason"], strict=True) if reason} == BAD


def test_what_has_no_image_at_all_ends_without_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(errors.UserError, match="--train_data_dir"):
            prepare_dataset.main(prepare_dataset.parse_args([f"--train_data_dir={tmp_path / folder}", "--output_dir=out"]))
    assert not Path("out").exists()


@pytest.mark.parametrize("case, flags", [
    ("good", ()), ("spoilt", ()), ("spoilt", ("--skip_bad_images",)), ("silent", ()), ("good", ("--train_batch_size=50",)),
    ("good", ("--masked_loss",))], ids=str)
def test_training_agrees_on_whether_it_would_start(prepare, train, images, case, flags):
    if case == "spoilt":
        spoil(images)
    elif case == "silent":
        (images / "image002.txt").unlink()
    once = ("--num_train_epochs=1", "--lr_warmup_steps=0", f"--train_data_dir={images}", *flags)
    started = True
    try:
        output = train(*once, without=("max_train_steps",))
    except errors.UserError:
        started = False
    text, _, ended = prepare(images, *once)
    assert (ended is None) == started
    if started:
        steps = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert f"Steps of the run {steps} " in text and f"Steps an epoch {steps} " in text


@pytest.mark.parametrize("flags", [
    ("--random_flip", "--center_crop"), ("--shuffle_caption", "--cache_variants=3"),
    ("--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--random_crop", "--cache_variants=2")], ids=str)
def test_the_caches_are_as_large_as_it_says(prepare, train, images, tmp_path, flags):
    cache, epochs = tmp_path / "cache", "--num_train_epochs=4"
    train(f"--train_data_dir={images}", f"--embedding_cache_dir={cache}", epochs, *flags, without=("max_train_steps",))
    kept = {"moments": [0, 0], "hidden": [0, 0]}
    for shard in cache.rglob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            for key in opened.keys():
                if (name := key.rsplit(".")[-1]) in kept:
                    kept[name][0] += 1
                    kept[name][1] += opened.get_tensor(key).nbytes
    text, columns, _ = prepare(images, epochs, *flags)
    (latents, latent_mb), (prompts, prompt_mb) = ((int(many), float(size)) for many, size in re.findall(
        r"(?:latents|prompts) (\d+) ([\d.]+) MB", text))
    sizes = [width * height // 64 * 8 * 4 for width, height in (columns["buckets"][bucket] for bucket in columns["bucket"])]
    assert latents == sum(map(len, columns["cuts"]))
    assert latent_mb == round(sum(len(cuts) * size for cuts, size in zip(columns["cuts"], sizes, strict=True)) / 1e6, 1)
    distinct = [len(set(map(tuple, cuts))) for cuts in columns["cuts"]]    # so small an image has few places to cut
    assert kept["moments"] == [sum(distinct), sum(cuts * size for cuts, size in zip(distinct, sizes, strict=True))]
    assert prompts == kept["hidden"][0] and prompt_mb == round(prompts * (77 * 2048 + 1280) * 4 / 1e6, 1)    # the true SDXL's


@pytest.mark.parametrize("flags, floats, size", [
    (("--mixed_precision=bf16",), 77 * 2048 + 1280, 2), (("--max_token_length=225",), 227 * 2048 + 1280, 4)], ids=str)
def test_prompts_take_what_their_precision_and_length_take(prepare, images, flags, floats, size):
    text, _, _ = prepare(images, "--mixed_precision=no", *flags)
    assert f"prompts 7 {7 * floats * size / 1e6:.1f} MB" in text    # the empty one, too


def test_what_is_not_cached_takes_no_disk(prepare, images):
    text, _, _ = prepare(images, "--vae_cache_disable", "--train_text_encoder")
    assert "Caches 0.0 MB" in text and "latents" not in text and "prompts" not in text


def test_duplicates_are_found(prepare, images):
    shutil.copy(images / "image001.png", images / "copy.png")
    tiny.picture(96, 64, 1).resize((190, 130)).save(images / "larger.jpg", quality=80)
    for name in ("copy", "larger"):
        (images / f"{name}.txt").write_text("the same again")
    text, columns, _ = prepare(images)
    assert "Same file twice 2" in text and "Near-duplicate 1" in text
    row = {name: number for number, name in enumerate(columns["name"])}
    assert columns["twin"][row["image001.png"]] == columns["twin"][row["copy.png"]] >= 0
    assert columns["near"][row["larger.jpg"]] == columns["near"][row["copy.png"]] >= 0 > columns["near"][row["image000.png"]]
    text, columns, _ = prepare(images, "--near_duplicates=0")
    assert "Same file twice 2" in text and "Pictures were not compared" in text and set(columns["near"]) == {-1}


def test_captions_are_measured_by_the_models_tokenizers_alone(prepare, images, tiny_model, tmp_path):
    (images / "image003.txt").write_text("red cat " * 50)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_model / name, tmp_path / "words" / name)    # nothing else of the model is there
    text, columns, ended = prepare(images, f"--pretrained_model_name_or_path={tmp_path / 'words'}")
    assert ended is None and "Long caption 1" in text
    tokens, read, cut = columns["long"][3]
    assert tokens == 100 and len(read.split()) == 75 and len(cut.split()) == 25
    text, columns, _ = prepare(images, f"--pretrained_model_name_or_path={tmp_path / 'words'}", "--max_token_length=150")
    assert "Long caption 0" in text and columns["long"] == [None] * 6
    shutil.rmtree(tmp_path / "words" / "tokenizer_2")
    assert "tokenizer_2" in prepare(images, f"--pretrained_model_name_or_path={tmp_path / 'words'}")[2]


def test_fix_writes_beside_the_data_what_trains(prepare, images, tmp_path):
    spoil(images)
    (images / "image004.txt").write_text("")
    shutil.copy(images / "image001.png", images / "twin.png")
    (images / "twin.txt").write_text("the same file")
    prepare(images, "--fix")
    folder = tmp_path / "out" / "dataset_fix"
    dropped = dict(line.split("\t") for line in (folder / "dropped.txt").read_text().splitlines())
    assert dropped.keys() == BAD | {"twin.png"} and dropped["twin.png"] == "the same file as image001.png"
    assert set((folder / "captions_missing.txt").read_text().split()) == {"silent.png", "image004.png"}
    good = {line["file_name"]: line["text"] for line in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())}
    assert good == {f"image{row:03d}.png": (images / f"image{row:03d}.txt").read_text() for row in (0, 1, 2, 3, 5)}
    # as kohya's metadata it is the good part of the data set
    table = folder / "metadata.jsonl"
    args = prepare_dataset.parse_args([f"--train_data_dir={images}", f"--in_json={table}", "--skip_bad_images"])
    data = dataset.load(args, 0, tmp_path / "scan", decode=True)
    assert {str(data.table.name[row]): data.table.texts(row)[0] for row in range(len(data.table))} == good
    # beside the good images, as the metadata of a folder
    for name in good:
        (tmp_path / "good").mkdir(exist_ok=True)
        shutil.copy(images / name, tmp_path / "good")
    shutil.copy(folder / "metadata.jsonl", tmp_path / "good")
    data = dataset.load(prepare_dataset.parse_args([f"--train_data_dir={tmp_path / 'good'}"]), 0, tmp_path / "scan", decode=True)
    assert {str(data.table.name[row]): data.table.texts(row)[0] for row in range(len(data.table))} == good
    (folder / "dropped.txt").write_text("mine")
    prepare(images, "--fix")
    assert (folder / "dropped.txt").read_text() == "mine" and (tmp_path / "out" / "dataset_fix-2" / "dropped.txt").exists()


def test_fix_of_several_data_sets_names_them(prepare, images, tmp_path):
    sets = tmp_path / "sets"
    for name, rows in (("2_cat", (0, 1, 2)), ("1_dog", (3, 4, 5))):
        (sets / name).mkdir(parents=True)
        for row in rows:
            for end in ("png", "txt"):
                shutil.copy(images / f"image{row:03d}.{end}", sets / name)
    (sets / "1_dog" / "bad.png").write_bytes(b"")
    text, columns, _ = prepare(sets, "--fix")
    assert len(columns["sets"]) == 2 and "Data sets" in text
    folder = tmp_path / "out" / "dataset_fix"
    assert {path.name for path in folder.iterdir()} == {"dropped.txt", "captions_missing.txt", "metadata-1-1_dog.jsonl",
                                                        "metadata-2-2_cat.jsonl"}
    assert (folder / "dropped.txt").read_text().rstrip("\n").split("\t")[1:] == ["bad.png", "the file is empty"]


def test_fix_writes_nothing_into_the_data(images):
    before = snapshot(images)
    for output in (images, images / "out"):
        args = prepare_dataset.parse_args([f"--train_data_dir={images}", f"--output_dir={output}", "--fix"])
        with pytest.raises(errors.UserError, match="--output_dir .* lies in the data's own folder"):
            prepare_dataset.main(args)
    assert snapshot(images) == before


def test_the_prompts_are_those_of_the_seed(prepare, images):
    for path in images.glob("*.txt"):
        path.write_text("one, two, three, four, five, six")
    flags = ("--shuffle_caption", "--caption_prefix=so:", "--proportion_empty_prompts=0.5")
    shown = [prepare(images, *flags, f"--seed={seed}")[1]["prompt"] for seed in (1, 1, 2)]
    assert shown[0] == shown[1] != shown[2]
    assert all(prompt.startswith("so:") for prompt in shown[0]) and {len(prompt) for prompt in shown[0]} == {3, 36}
    text = prepare(images, *flags)[0]
    assert "those of seed 0" not in text


def test_the_command_and_config_of_training_do(images, tmp_path, parse):
    """Every flag of the training scripts is taken, whether it matters here or not; the model need not be there."""
    (tmp_path / "config.toml").write_text(
        f'train_data_dir = "{images}"\noutput_dir = "{tmp_path / "out"}"\nlearning_rate = 1e-5\nuse_ema = true\n'
        'resolution = "64"\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\ntrain_batch_size = 2\n')
    ours = vars(prepare_dataset.parse_args([f"--config_file={tmp_path / 'config.toml'}"]))
    theirs = vars(parse()) | vars(train_lora_sdxl.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x"]))
    assert theirs.keys() <= ours.keys() and ours["learning_rate"] == 1e-5
    assert ours.keys() - theirs.keys() == {"report_images", "near_duplicates", "num_processes", "fix"}
    command = [sys.executable, "prepare_dataset.py", "--config_file", str(tmp_path / "config.toml")]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"wrote {tmp_path / 'out' / 'dataset_report.html'}" in done.stdout
    (images / "image000.txt").unlink()
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("prepare_dataset.py: error: training would not start: ")


# SD3

@pytest.fixture(scope="module")
def sd3_model(tmp_path_factory):
    return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")


def test_the_command_of_sd3_is_known_by_its_model_or_its_flags(sd3_model, tiny_model, tmp_path):
    def of_sd3(*flags):
        return hasattr(prepare_dataset.parse_args(["--train_data_dir=x", *map(str, flags)]), "weighting_scheme")

    model = "--pretrained_model_name_or_path"
    file = tiny.write_one_file(tmp_path / "one.safetensors", StableDiffusion3Pipeline.from_pretrained(sd3_model))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "config.toml").write_text('model_family = "sd3"\n')
    for flags in ((model, sd3_model), (model, file), (f"{model}=stabilityai/stable-diffusion-3.5-large",), ("--no_t5",),
                  ("--training_shift=2",), ("--weighting_scheme", "mode"), ("--model_family=sd3", "--model_flavour=medium"),
                  ("--config_file", tmp_path / "config.toml")):
        assert of_sd3(*flags), flags
    for flags in ((), (model, tiny_model), (model, tmp_path / "cut.safetensors"), ("--snr_gamma=5",), (model, "me/my-model"),
                  ("--model_family=sdxl",)):
        assert not of_sd3(*flags), flags
    needed = ["--pretrained_model_name_or_path=x", "--train_data_dir=x"]
    theirs = vars(train_sd3.parse_args(needed)) | vars(train_lora_sd3.parse_args(needed))
    ours = vars(prepare_dataset.parse_args([*needed, "--no_t5"]))
    assert theirs.keys() <= ours.keys()
    assert ours.keys() - theirs.keys() == {"report_images", "near_duplicates", "num_processes", "fix"}


def test_of_sd3_it_says_what_t5_reads_and_what_its_cache_takes(prepare, images, sd3_model):
    """In the true widths of its text encoders."""
    model = f"--pretrained_model_name_or_path={sd3_model}"
    (images / "image000.txt").write_text(" ".join(["dog"] * 90))
    (images / "image001.txt").write_text(" ".join(["cat"] * 160))
    text, columns, ended = prepare(images, model, "--mixed_precision=bf16", "--t5_padding=zero", "--resolution=256",
                                   "--center_crop")
    assert ended is None and "1 captions are longer than the 75 tokens of CLIP: T5 alone reads their ends" in text
    assert "Long caption 1" in text
    tokenizer = T5TokenizerFast.from_pretrained(sd3_model / "tokenizer_3")
    prompts = {"", *(path.read_text() for path in images.glob("*.txt"))}
    t5 = sum(min(154, len(tokenizer(prompt)["input_ids"])) for prompt in prompts) * 4096
    clips = len(prompts) * (77 * (768 + 1280) + 768 + 1280)
    assert f"prompts {len(prompts)} {(clips + t5) * 2 / 1e6:.1f} MB" in text
    assert f"latents 6 {6 * 32 * 32 * 2 * 16 * 4 / 1e6:.1f} MB" in text
    for flags, numbers in (((), clips + len(prompts) * 154 * 4096), (("--no_t5",), clips),
                           (("--train_text_encoder",), len(prompts) * 154 * 4096)):
        text, _, _ = prepare(images, model, "--mixed_precision=no", *flags)
        assert f"prompts {len(prompts)} {numbers * 4 / 1e6:.1f} MB" in text, flags
    assert "Long caption 2" in prepare(images, model, "--no_t5")[0]


def test_sizes_that_sd3_does_not_take(images, tmp_path):
    """Of the flags, and of a data set that says its own."""
    with pytest.raises(SystemExit):
        prepare_dataset.parse_args(["--train_data_dir=x", "--resolution=72", "--no_t5"])
    toml = tmp_path / "sets.toml"
    toml.write_text(f'[[datasets]]\nresolution = 72\n[[datasets.subsets]]\nimage_dir = "{images}"\n')
    args = prepare_dataset.parse_args([f"--dataset_config={toml}", "--no_t5", f"--output_dir={tmp_path / 'out'}", "--seed=1"])
    with pytest.raises(errors.UserError, match="images of 72 x 72 pixels: sides must be multiples of 16; change resolution"):
        prepare_dataset.main(args)


def test_only_the_first_of_many_processes_looks(images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare_dataset.main(prepare_dataset.parse_args([f"--train_data_dir={images}", f"--output_dir={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [0, 2])
def test_dreambooth_before_its_class_images_are_drawn(images, tmp_path, there):
    kind = tmp_path / "class"
    if there:
        tiny.make_images(kind, [(64, 64)] * there, captions=False)
    prepare_dataset.main(prepare_dataset.parse_args([
        "--instance_data_dir", str(images), "--instance_prompt", "a photo of sks cat", "--with_prior_preservation", "--rank", "4",
        "--class_data_dir", str(kind), "--class_prompt", "a photo of a cat", "--num_class_images", "5", "--resolution", "64",
        "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--near_duplicates", "0"]))
    page = (tmp_path / "out" / "dataset_report.html").read_text()
    assert f"training begins with drawing {5 - there} images of the class into {kind}" in page
    assert kind.exists() == bool(there) and ("a photo of a cat" in page.partition("<script")[2]) == bool(there)
