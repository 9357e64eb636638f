"""What is cached is found again exactly when it would come out the same: the keys of latents and of prompts."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from files import png, replace_quietly
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import make_images

import train_sdxl
from library.data import dataset
from library.data.prepare import latent_key, load_pixels, prompt_key
from library.models import sdxl
from library.models.encoders import Encoders

WEIGHTS = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
WEIGHTS |= {part: f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")}
WEIGHTS |= {part: f"{part}/vocab.json" for part in ("tokenizer", "tokenizer_2")}


def make_base(folder: Path) -> Path:
    """The files of a model, as far as their hashes go."""
    for number, part in enumerate(sdxl.PARTS):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
        if part in WEIGHTS:
            for name in (WEIGHTS[part], WEIGHTS[part].replace(".", ".fp16."), f"{part}/merges.txt"):
                (folder / name).write_bytes(save({"weight": torch.full((50,), float(number))}))
    return folder


class Place:
    """A folder with a model and images, and the keys that a run there would use."""

    def __init__(self, root: Path):
        self.root, self.base = root, make_base(root / "base")
        self.images = make_images(root / "images", [(80, 64), (64, 80), (64, 64), (130, 70)])

    def run(self, *flags: str, seed: int = 0, images: Path | None = None, base: Path | None = None):
        args = train_sdxl.parse_args([f"--pretrained_model_name_or_path={base or self.base}", "--resolution=64",
                                      f"--train_data_dir={images or self.images}", *flags])
        data = dataset.load(args, seed, self.root / "index", decode=False)
        accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=args.mixed_precision or "no")
        return args, data, data.table, Encoders(sdxl, args, sdxl.find_base(args), accelerator)

    def latents(self, *flags: str, **options) -> dict[str, list[bytes]]:
        """Keys of each image's cuts, by the content of the image."""
        args, data, table, encoders = self.run(*flags, **options)
        recipe = encoders.latent_recipe(self.root / "memo.json", args.image_interpolation_mode)
        return {hashlib.md5(data.read(row)).hexdigest(): [
            latent_key(table, row, number, recipe) for number in range(table.variants(row, args.cache_variants))]
            for row in range(len(table))}

    def prompt(self, *flags: str, text: str = "a cat", **options) -> bytes:
        encoders = self.run(*flags, **options)[3]
        return prompt_key(text, encoders.prompt_recipe(self.root / "memo.json"))

    def change(self, part: str) -> None:
        """Other weights in a file of the same size and date."""
        path = self.base / WEIGHTS[part]
        replace_quietly(path, path.read_bytes()[:-1] + b"\x7f")


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def values_of(keys: dict[str, list[bytes]]) -> set[bytes]:
    return {key for several in keys.values() for key in several}


# what makes the latents

CENTRE = ("--center_crop",)


@pytest.mark.parametrize("flags", [
    ("--resolution=72", "--center_crop"), ("--resolution=64,72", "--center_crop"), ("--vae_dtype=bf16", "--center_crop"),
    ("--center_crop", "--image_interpolation_mode=bicubic"), ("--center_crop", "--pretrained_vae_model_name_or_path=OTHER"),
    ("--center_crop", "--variant=fp16")], ids=lambda flags: flags[0] + flags[1])
def test_flags_that_change_all_latents(place, flags):
    make_base(place.root / "other")
    (place.root / "other/vae/more.json").write_text("{}")
    flags = [flag.replace("OTHER", str(place.root / "other")) for flag in flags]
    assert not values_of(place.latents(*CENTRE)) & values_of(place.latents(*flags))


def test_a_bucket_of_another_shape_changes_the_latents_in_it(place):
    square, bucket = place.latents(*CENTRE), place.latents("--enable_bucket", "--min_bucket_reso=32", "--bucket_reso_steps=8")
    changed = [one != other for one, other in zip(square.values(), bucket.values(), strict=True)]
    assert changed == [True, True, False, True]    # the square image is cut from the same place of the same picture


def test_a_resize_by_one_pixel_more_has_another_key(place):
    """130 x 70 becomes 118 x 64 as diffusers rounds and 119 x 64 as kohya does; both are cut from the same place."""
    one = ("--enable_bucket", "--min_bucket_reso=64", "--max_bucket_reso=64")
    tables = [place.run(*flags)[2] for flags in (CENTRE, one)]
    assert [table.resized[3].tolist() for table in tables] == [[118, 64], [119, 64]]
    assert tables[0].cut(3, 0) == tables[1].cut(3, 0) == (27, 0, False, None)
    (*same, rounded), (*others, other) = place.latents(*CENTRE).values(), place.latents(*one).values()
    assert same == others and rounded != other


def test_cuts_and_mirrored_images_have_keys_of_their_own(place):
    centre, mirrored, cuts = (place.latents(*flags) for flags in (CENTRE, (*CENTRE, "--random_flip"), ("--random_flip",)))
    assert [len(keys) for keys in mirrored.values()] == [2] * 4 and [len(keys) for keys in cuts.values()] == [4, 4, 2, 4]
    assert all(len(set(keys)) == len(keys) for keys in [*mirrored.values(), *cuts.values()])
    assert all(centre[image][0] in mirrored[image] for image in centre)


def test_other_content_changes_its_own_keys_alone(place):
    before = place.latents(*CENTRE)
    replace_quietly(place.images / "image000.png", png(77, (80, 64)))
    after = place.latents(*CENTRE)
    assert len(values_of(before) & values_of(after)) == 3 and len(values_of(before) | values_of(after)) == 5


def test_other_weights_of_the_vae_change_all_latents_and_no_prompt(place):
    latents, prompt = place.latents(*CENTRE), place.prompt()
    place.change("vae")
    assert not values_of(latents) & values_of(place.latents(*CENTRE))
    assert place.prompt() == prompt


# what does not

ELSEWHERE = ["--learning_rate=0.5", "--seed=7", "--train_batch_size=3", "--max_train_steps=9", "--output_dir=elsewhere",
             "--mixed_precision=bf16", "--shuffle_caption", "--optimizer=adafactor", "--snr_gamma=5", "--use_ema",
             "--vae_batch_size=9", "--text_encoder_batch_size=2", "--proportion_empty_prompts=0.5", "--noise_offset=0.1",
             "--gradient_checkpointing", "--dataloader_num_workers=3", "--max_token_length=225", "--prediction_type=v_prediction"]


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_flags_that_change_no_latents(place, flag):
    assert place.latents(flag, seed=3) == place.latents()


def test_more_variants_keep_the_first_ones(place):
    few, many = place.latents("--cache_variants=2"), place.latents("--cache_variants=6")
    assert all(many[image][:len(keys)] == keys for image, keys in few.items())


def test_images_renamed_moved_touched_and_added(place, tmp_path):
    before = place.latents()
    (place.images / "image000.png").rename(place.images / "zebra.png")
    (place.images / "image000.txt").rename(place.images / "zebra.txt")
    (place.images / "image001.png").touch()
    (place.images / "image002.txt").write_text("another caption")
    make_images(place.images / "more", [(90, 64)] * 3)
    moved = place.images.rename(tmp_path / "moved")
    after = place.latents(images=moved)
    assert len(after) == 7 and before.items() <= after.items()


def test_a_model_moved_or_trained_further_elsewhere(place, tmp_path):
    latents, prompt = place.latents(), place.prompt()
    place.change("unet")
    (place.base / WEIGHTS["vae"]).touch()
    moved = Path(shutil.move(place.base, tmp_path / "moved"))
    assert place.latents(base=moved) == latents and place.prompt(base=moved) == prompt


MADE_BY: dict[bytes, bytes] = {}    # key -> hash of the pixels that were encoded
KEY_OF: dict[tuple, bytes] = {}    # all that the latents depend on -> key
SETTINGS = st.fixed_dictionaries({}, optional={
    "resolution": st.sampled_from(["64", "72", "64,48"]), "image_interpolation_mode": st.sampled_from(["lanczos", "box"]),
    "vae_dtype": st.sampled_from(["fp32", "bf16"]), "random_flip": st.just("true"), "center_crop": st.just("true"),
    "cache_variants": st.sampled_from(["1", "3"]), "learning_rate": st.sampled_from(["1", "2"]), "seed": st.just("3"),
    "enable_bucket": st.just("true"), "bucket_reso_steps": st.just("16"), "max_train_samples": st.just("2")})


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@given(SETTINGS, st.integers(0, 3))
def test_one_key_for_one_tensor(shared_place, settings, seed):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    args, data, table, encoders = shared_place.run("--min_bucket_reso=32", "--bucket_reso_steps=8", *flags, seed=seed)
    recipe = encoders.latent_recipe(shared_place.root / "memo.json", args.image_interpolation_mode)
    for row in range(len(table)):
        content = data.read(row)
        for number in range(table.variants(row, args.cache_variants)):
            key = latent_key(table, row, number, recipe)
            pixels = load_pixels(data, row, number, args.image_interpolation_mode).tobytes()
            assert MADE_BY.setdefault(key, hashlib.md5(pixels).digest()) == hashlib.md5(pixels).digest()
            parts = (content, tuple(table.resized[row]), table.buckets[table.bucket_of[row]], table.cut(row, number),
                     args.image_interpolation_mode, args.vae_dtype)
            assert KEY_OF.setdefault(parts, key) == key
    assert len(set(KEY_OF.values())) == len(KEY_OF)


# prompts

@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_other_text_encoders_and_tokenizers_change_the_prompts_and_no_latents(place, part):
    latents, prompt = place.latents(), place.prompt()
    place.change(part)
    assert place.prompt() != prompt and place.latents() == latents


@pytest.mark.parametrize("flags, text", [
    ((), "a cat "), ((), ""), (("--max_token_length=150",), "a cat"), (("--mixed_precision=bf16",), "a cat"),
    (("--variant=fp16",), "a cat")])
def test_what_changes_a_prompt(place, flags, text):
    assert place.prompt(*flags, text=text) != place.prompt()


@pytest.mark.parametrize("flag", ["--resolution=72", "--vae_dtype=bf16", "--seed=3", "--learning_rate=0.1", "--center_crop",
                                  "--shuffle_caption", "--proportion_empty_prompts=0.5", "--text_encoder_batch_size=2"])
def test_what_changes_no_prompt(place, flag):
    assert place.prompt(flag, seed=3) == place.prompt()


@given(st.lists(st.text(max_size=8), min_size=2, max_size=8, unique=True))
def test_every_prompt_has_a_key_of_its_own(prompts):
    keys = {prompt_key(prompt, recipe) for prompt in prompts for recipe in ("x", "y")}
    assert len(keys) == 2 * len(prompts)
