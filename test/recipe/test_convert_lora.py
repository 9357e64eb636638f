"""convert_lora.py on a tiny model: what its files do is what the originals did, and no input is ever touched."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from test_generate import KINDS, make_adapters, pixels

import convert_lora
import generate
from library import errors
from library.models import adapter_files, adapters, sd3_file
from library.models.adapter_settings import Settings

PROMPT = ["--prompt", "a red cat", "--steps", "2", "--size", "64"]


@pytest.fixture
def files(tiny_model):
    """Kind -> a file of such an adapter."""
    return {kind: file for kind, (file, _) in make_adapters(tiny_model).items()}


@pytest.fixture
def run(tiny_model, capsys):
    """`run(command, *flags)` -> what is printed. The tiny model has fewer blocks than SDXL: --config numbers them."""
    def run(command, *flags):
        capsys.readouterr()
        convert_lora.main(convert_lora.parse_args([command, *map(str, flags), "--config", str(tiny_model)]))
        return capsys.readouterr().out
    return run


@pytest.fixture
def refused(run, capsys):
    """`refused(words, command, *flags)`: it ends with status 2 and one sentence that has these words."""
    def refused(words, *flags):
        with pytest.raises(SystemExit) as left, errors.exit_on_user_error("convert_lora.py"):
            run(*flags)
        said = capsys.readouterr().err.splitlines()[-1]
        assert left.value.code == 2 and said.startswith(("convert_lora.py: error: ", "pytest", "__main__"))
        assert all(word in said for word in words.split()), said
    return refused


def draw(model, output, *loras, config=None) -> np.ndarray:
    generate.main(generate.parse_args(["--model", str(model), *PROMPT, "--output_dir", str(output), *(
        ["--lora", *map(str, loras)] if loras else []), *(["--config", str(config)] if config else [])]))
    return pixels(Image.open(output / "000-0.png"))


def contents(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= 1


def hashes(folder: Path) -> dict:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_show(run, files, tiny_model):
    shown = json.loads(run("show", *files.values(), "--json"))
    assert [Path(each["file"]).stem for each in shown] == list(files)
    for each, (kind, (settings, fmt)) in zip(shown, KINDS.items(), strict=True):
        raw, metadata = contents(files[kind])
        assert (each["kind"], each["format"]) == ("lora" if kind == "second" else kind, fmt) and each["metadata"] == metadata
        assert each["bytes"] == files[kind].stat().st_size and each["dtype"] == ["float32"]
        assert set(each["networks"]) == {"unet", "text_encoder", "text_encoder_2"}
        adapter = adapter_files.read(files[kind], config_of(tiny_model))
        assert each["family"] == "SDXL" and each["networks"]["unet"]["modules"] == len(adapter.part("unet"))
        if settings.kind == "lora":
            assert each["networks"]["unet"]["ranks"] == {str(settings.rank): len(adapter.part("unet"))}
            assert each["networks"]["unet"]["alphas"] == {str(settings.alpha): len(adapter.part("unet"))}
            norm = sum((own["lora_up.weight"] @ own["lora_down.weight"] * settings.alpha / settings.rank).square().sum()
                       for own in adapter.part("unet").values()).sqrt().item()
            assert each["networks"]["unet"]["norm"] == pytest.approx(norm, rel=1e-4)
    text = run("show", files["lora"])
    assert "lora, diffusers, SDXL, float32" in text and "rank 4, alpha 3, norm of the update" in text
    assert 'flags: {"seed": 1}' in text
    assert "not known without the base" in run("show", files["oft"])


def config_of(model: Path) -> dict:
    return json.loads((model / "unet" / "config.json").read_text())


@pytest.mark.parametrize("kind, formats", [("lora", ("kohya", "diffusers", "kohya")), ("dora", ("kohya", "diffusers")),
                                           ("second", ("diffusers", "kohya"))])
def test_there_and_back_every_bit_is_the_same(run, files, tmp_path, kind, formats):
    at = files[kind]
    for number, fmt in enumerate(formats):
        (tmp_path / str(number)).mkdir()
        out = tmp_path / str(number) / at.name
        run("convert", at, "--lora_format", fmt, "--output", out)
        at = out
    if formats[-1] != KINDS[kind][1]:
        run("convert", at, "--lora_format", KINDS[kind][1], "--output", tmp_path / at.name)
        at = tmp_path / at.name
    (before, header), (after, other) = contents(files[kind]), contents(at)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert header == other
    run("convert", at, "--precision", "bf16", "--output", tmp_path / "half.safetensors")
    half, _ = contents(tmp_path / "half.safetensors")
    assert all(torch.equal(half[name], value if name.endswith("alpha") else value.bfloat16()) for name, value in before.items())


def test_merged_into_a_model_it_draws_what_was_drawn_with_them(run, files, tiny_model, tmp_path):
    """DoRA counts on the weights below it, LoRA beside them, in whichever order they are named."""
    before = hashes(tiny_model), hashes(files["lora"].parent)
    named = [f"{files['lora']}=0.7", files["dora"], f"{files['second']}=-1"]
    want = draw(tiny_model, tmp_path / "want", *named)
    said = run("merge", *named, "--into", tiny_model, "--output", tmp_path / "folder")
    assert np.abs(draw(tmp_path / "folder", tmp_path / "a") - want).max() <= 1 and "3 adapters" in said
    for part in ("vae", "tokenizer"):
        assert list(hashes(tmp_path / "folder" / part).values()) == list(hashes(tiny_model / part).values())
    run("merge", *named, "--into", tiny_model, "--output", tmp_path / "one.safetensors")
    assert np.abs(draw(tmp_path / "one.safetensors", tmp_path / "b", config=tiny_model) - want).max() <= 1

    # from one file: another adapter on top, into one file and into a folder; and beside its weights
    want = draw(tmp_path / "folder", tmp_path / "c", files["loha"])
    assert np.abs(draw(tmp_path / "one.safetensors", tmp_path / "d", files["loha"], config=tiny_model) - want).max() <= 1
    for name in ("two.safetensors", "two"):
        run("merge", files["loha"], "--into", tmp_path / "one.safetensors", "--output", tmp_path / name)
        assert np.abs(draw(tmp_path / name, tmp_path / "e", config=tiny_model) - want).max() <= 1
    assert (hashes(tiny_model), hashes(files["lora"].parent)) == before


def test_a_merged_model_keeps_its_precision_or_gets_another(run, files, tiny_model, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        path = next((half / part).glob("*.safetensors"))
        tensors, header = contents(path)
        safetensors.torch.save_file({name: tensor.half() for name, tensor in tensors.items()}, path, header)
    run("merge", files["lora"], "--into", half, "--output", tmp_path / "a.safetensors")
    run("merge", files["lora"], "--into", half, "--output", tmp_path / "b", "--precision", "fp32")
    tensors, _ = contents(tmp_path / "a.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.startswith("first_stage")} == {torch.float16}
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("first_stage")} == {torch.float32}
    whole, _ = contents(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert whole[name].dtype == torch.float32 and not torch.equal(whole[name], whole[name].half().float())    # not rounded first


def test_merged_with_each_other_they_draw_the_same(run, files, tiny_model, tmp_path):
    named = [f"{files['lora']}=0.5", f"{files['second']}=-2"]
    want = draw(tiny_model, tmp_path / "want", *named)
    said = run("merge", *named, "--output", tmp_path / "both.safetensors")
    assert np.abs(draw(tiny_model, tmp_path / "a", tmp_path / "both.safetensors") - want).max() <= 1
    assert "rank 2 to 6" in said and "100% of the sum" in said
    both = adapter_files.read(tmp_path / "both.safetensors", config_of(tiny_model))
    assert both.format == "diffusers" and both.metadata["modelspec.merged_from"] == "lora.safetensors=0.5, second.safetensors=-2"

    # with --rank, also of kinds that do not add up, against the base
    named = [files["dora"], f"{files['lycoris']}=0.5", files["loha"]]
    said = run("merge", *named, "--base", tiny_model, "--rank", 999, "--output", tmp_path / "full.safetensors", "--lora_format",
               "kohya")
    assert "have become LoRA" in said and "less than rank 999" in said and "100% of the sum" in said
    for file in named[:1]:    # one alone is the same as in the weights
        run("merge", file, "--base", tiny_model, "--rank", 999, "--output", tmp_path / "dora.safetensors")
        want = draw(tiny_model, tmp_path / "want", file)
        assert np.abs(draw(tiny_model, tmp_path / "a", tmp_path / "dora.safetensors") - want).max() <= 1


def test_an_extract_of_full_rank_draws_what_the_tuned_model_draws(run, refused, files, tiny_model, tmp_path):
    tuned = tmp_path / "tuned"
    run("merge", files["lora"], files["second"], "--into", tiny_model, "--output", tuned)
    want, models = draw(tuned, tmp_path / "want"), ("--base", tiny_model, "--tuned", tuned)
    said = run("extract", *models, "--rank", 999, "--text_encoders", "--lora_targets", "attention-ff", "--output",
               tmp_path / "whole.safetensors")
    assert np.abs(draw(tiny_model, tmp_path / "a", tmp_path / "whole.safetensors") - want).max() <= 1
    assert said.count("100% of its difference (sum of squares) lies") == 3
    said = run("extract", *models, "--energy", 0.8, "--rank", 5, "--output", tmp_path / "most.safetensors", "--precision", "fp16")
    most = adapter_files.read(tmp_path / "most.safetensors", config_of(tiny_model))
    assert most.kind == "lora" and not most.part("text_encoder") and 1 <= most.rank <= 5 and "100% of its" not in said
    run("extract", *models, "--energy", 0.9999, "--output", tmp_path / "all.safetensors")    # as many as were trained
    assert {adapter_files.rank_of(own) for own in adapter_files.read(
        tmp_path / "all.safetensors", config_of(tiny_model)).modules.values()} <= {4, 5, 6}
    refused("do not differ --lora_targets", "extract", "--base", tiny_model, "--tuned", tiny_model, "--rank", 4, "--output",
            tmp_path / "none.safetensors")
    refused("to_qq to_q", "extract", *models, "--rank", 4, "--lora_targets", "to_qq", "--output", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_resize(run, refused, files, tiny_model, tmp_path):
    run("resize", files["lora"], "--rank", 4, "--output", tmp_path / "same.safetensors")
    (before, _), (after, _) = contents(files["lora"]), contents(tmp_path / "same.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    said = run("resize", files["lora"], "--rank", 2, "--output", tmp_path / "less.safetensors")
    less = adapter_files.read(tmp_path / "less.safetensors", config_of(tiny_model))
    assert (less.rank, less.alpha, less.format) == (2, 1.5, "diffusers") and "of rank 2, " in said
    assert json.loads(less.metadata["flags"]) == {"seed": 1} and "adapter_settings" not in less.metadata
    half, less = tmp_path / "half.safetensors", tmp_path / "less.safetensors"
    run("convert", files["lora"], "--precision", "bf16", "--output", half)
    for flags, dtype in (((), torch.float32), (("--precision", "fp16"), torch.float16)):
        run("resize", half, "--rank", 2, "--output", less, "--overwrite", *flags)
        tensors, _ = contents(less)
        assert {tensor.dtype for tensor in tensors.values() if tensor.ndim} == {dtype}
    want = draw(tiny_model, tmp_path / "want", files["loha"])
    said = run("resize", files["loha"], "--energy", 1, "--output", tmp_path / "lora.safetensors", "--lora_format", "diffusers")
    assert "have become LoRA" in said
    assert contents(tmp_path / "lora.safetensors")[1]["ss_network_module"] == "networks.lora"
    assert np.abs(draw(tiny_model, tmp_path / "a", tmp_path / "lora.safetensors") - want).max() <= 1


def test_what_cannot_be_is_refused(refused, run, files, tiny_model, tmp_path):
    out = tmp_path / "out.safetensors"
    for words, *flags in (
            ("loha kohya", "convert", files["loha"], "--lora_format", "diffusers", "--output", out),
            ("text encoder kohya", "convert", files["lora"], "--lora_format", "lycoris", "--output", out),
            ("ends in .safetensors", "convert", files["lora"], "--lora_format", "kohya", "--output", tmp_path / "a.ckpt"),
            ("is one of the inputs", "resize", files["lora"], "--rank", 2, "--output", files["lora"], "--overwrite"),
            ("is one of the inputs", "merge", files["lora"], "--into", tiny_model, "--output", tiny_model, "--overwrite"),
            ("is a folder", "resize", files["lora"], "--rank", 2, "--output", tmp_path),
            ("a folder that holds something", "merge", files["lora"], "--into", tiny_model, "--output", files["lora"].parent),
            ("only LoRAs add up --rank", "merge", files["lora"], files["lokr"], "--output", out),
            ("depends on the weights --base", "merge", files["lora"], files["dora"], "--rank", 4, "--output", out),
            ("--base MODEL --rank N", "resize", files["oft"], "--rank", 4, "--output", out),
            ("no adapter /nowhere.safetensors", "show", "/nowhere.safetensors"),
            ("--into: there is no file or folder", "merge", files["lora"], "--into", "/nowhere/model", "--output", out),
            ("has no up_blocks", "extract", "--base", tiny_model, "--tuned", smaller(tiny_model, tmp_path), "--rank", 4,
             "--output", out)):
        refused(words, *flags)
    run("convert", files["lora"], "--lora_format", "kohya", "--output", out)
    refused("exists --overwrite", "convert", files["second"], "--lora_format", "kohya", "--output", out)
    run("convert", files["second"], "--lora_format", "kohya", "--output", out, "--overwrite")
    assert contents(out)[0].keys() == contents(files["second"])[0].keys()
    flux = tmp_path / "flux.safetensors"
    safetensors.torch.save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 4)}, flux)
    refused("Flux not of SDXL", "show", flux)
    large = tmp_path / "large.safetensors"
    raw, header = contents(files["second"])
    safetensors.torch.save_file({name: tensor * (1e9 if "lora_up" in name else 1) for name, tensor in raw.items()}, large, header)
    refused("too large for fp16", "convert", large, "--precision", "fp16", "--output", tmp_path / "half.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"flux.safetensors", "large.safetensors", "out.safetensors", "smaller"}


def smaller(model: Path, folder: Path) -> Path:
    """A UNet that lacks a part of its last block."""
    (folder / "smaller" / "unet").mkdir(parents=True)
    tensors, header = contents(model / "unet" / "diffusion_pytorch_model.safetensors")
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("up_blocks.2")},
                                folder / "smaller" / "unet" / "diffusion_pytorch_model.safetensors", header)
    shutil.copy(model / "unet" / "config.json", folder / "smaller" / "unet")
    return folder / "smaller"


@pytest.mark.parametrize("words, flags", [
    ("--output FILE", ["convert", "a", "--precision", "fp16"]),
    ("--lora_format or --precision", ["convert", "a", "--output", "b"]),
    ("one FILE", ["resize", "a", "b", "--rank", "3", "--output", "c"]), ("--rank or --energy", ["resize", "a", "--output", "b"]),
    ("--base and --tuned", ["extract", "--base", "a", "--rank", "3", "--output", "b"]), ("a FILE or more", ["show"]),
    ("--tuned is not for merge, but for extract", ["merge", "a", "--tuned", "b", "--output", "c"]),
    ("--rank is for merging files", ["merge", "a", "--into", "b", "--rank", "3", "--output", "c"]),
    ("--base needs --rank", ["merge", "a", "--base", "b", "--output", "c"]), ("at most 1", ["resize", "a", "--energy", "95"]),
    ("did you mean --energy", ["resize", "a", "--enregy", "0.9"]), ("invalid choice: 'mrege'", ["mrege", "a"])])
def test_flags_that_do_not_go_together(capsys, words, flags):
    with pytest.raises(SystemExit) as left:
        convert_lora.parse_args(flags)
    assert left.value.code == 2 and words in capsys.readouterr().err


# SD 3

SD3_KINDS = {"lora": (Settings("lora", 4, 3.0, "attention-ff"), "diffusers"), "dora": (Settings("dora", 4, 3.0), "diffusers"),
             "lokr": (Settings("lokr", 4, 3.0), "kohya"), "t5": (Settings("lora", 2, 1.0, "kohya"), "kohya")}
SD3_PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The folder of a tiny SD 3.5 Medium, whose CLIP ViT-L projects nothing, as one file has it."""
    folder = tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")
    clip = StableDiffusion3Pipeline.from_pretrained(folder).text_encoder
    torch.nn.init.eye_(clip.text_projection.weight)
    clip.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def of_sd3(sd3):
    """Kind -> a file of such an adapter of the transformer and both CLIPs; "t5" also of T5."""
    made = {}
    for seed, (kind, (settings, fmt)) in enumerate(SD3_KINDS.items()):
        pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
        networks = {part: getattr(pipeline, part) for part in SD3_PARTS[:4 if kind == "t5" else 3]}
        adapters.add(pipeline.transformer, [*networks.values()][1:], settings, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for tensor in (tensor for network in networks.values() for tensor in adapters.trained(network).values()):
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=draw)
        made[kind] = adapter_files.save(sd3.parent / f"{kind}.safetensors", networks, settings, fmt, {"flags": {"seed": 1}})
    return made


@pytest.fixture
def convert(capsys):
    """`convert(command, *flags)` -> what is printed. Nothing says that it is SD 3, but for the files."""
    def convert(*flags):
        capsys.readouterr()
        convert_lora.main(convert_lora.parse_args([*map(str, flags)]))
        return capsys.readouterr().out
    return convert


def test_sd3_shown_and_there_and_back(convert, of_sd3, tmp_path):
    """Also of text encoders alone, by the header; beside a file of SDXL each is what it is."""
    shown = json.loads(convert("show", *of_sd3.values(), "--json"))
    assert [each["family"] for each in shown] == ["SD 3"] * 4 and [*shown[3]["networks"]] == [*SD3_PARTS]
    assert shown[0]["networks"]["transformer"]["ranks"].keys() == {"4"}
    assert "dora, diffusers, SD 3" in convert("show", of_sd3["dora"])
    tensors, header = contents(of_sd3["t5"])
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_te")}
    safetensors.torch.save_file(text, tmp_path / "text.safetensors", header)
    assert json.loads(convert("show", tmp_path / "text.safetensors", "--json"))[0]["family"] == "SD 3"
    for kind, formats in (("lora", ("kohya", "diffusers")), ("dora", ("kohya", "diffusers"))):
        at = of_sd3[kind]
        for fmt in formats:
            (tmp_path / f"{kind} {fmt}").mkdir()
            convert("convert", at, "--lora_format", fmt, "--output", at := tmp_path / f"{kind} {fmt}" / at.name)
            fused = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in contents(at)[0]
            assert fused == (fmt == "kohya")
        (before, header), (after, other) = contents(of_sd3[kind]), contents(at)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert header == other


def test_sd3_merged_into_a_model_draws_what_was_drawn_with_adapters(convert, of_sd3, sd3, tmp_path):
    before = hashes(sd3)
    named = [f"{of_sd3['lora']}=0.7", of_sd3["dora"], f"{of_sd3['t5']}=-1"]
    want = draw(sd3, tmp_path / "want", *named)
    said = convert("merge", *named, "--into", sd3, "--output", tmp_path / "folder")
    assert_close(draw(tmp_path / "folder", tmp_path / "a"), want)
    assert "text_encoder, text_encoder_2, text_encoder_3, transformer with 3 adapters" in said and hashes(sd3) == before
    for part in ("vae", "tokenizer_3"):
        assert list(hashes(tmp_path / "folder" / part).values()) == list(hashes(sd3 / part).values())
    convert("merge", *named, "--into", sd3, "--output", tmp_path / "one.safetensors")
    assert sd3_file.parts_in(tmp_path / "one.safetensors") == tuple(sd3_file.PREFIXES)
    assert_close(draw(tmp_path / "one.safetensors", tmp_path / "b", config=sd3), want)
    assert np.abs(draw(sd3, tmp_path / "c") - want).max() > 1

    # from one file in half precision, with T5 or without, into one that is the same in this, and into a folder
    whole, header = contents(tmp_path / "one.safetensors")
    half = {name: tensor.half() for name, tensor in whole.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors", header)
    lean = {name: tensor for name, tensor in half.items() if "t5xxl" not in name}
    safetensors.torch.save_file(lean, tmp_path / "lean.safetensors", header)
    lean_file, written = tmp_path / "lean.safetensors", tmp_path / "x.safetensors"
    convert("merge", of_sd3["lora"], "--into", lean_file, "--config", sd3, "--output", written)
    assert contents(written)[0].keys() == lean.keys()
    more = ("merge", of_sd3["lokr"], "--into", tmp_path / "half.safetensors", "--config", sd3)
    convert(*more, "--output", tmp_path / "two.safetensors")
    two, _ = contents(tmp_path / "two.safetensors")
    assert two.keys() == half.keys() and {tensor.dtype for tensor in two.values()} == {torch.float16}
    changed = {name.split(".")[0] for name in two if not torch.equal(two[name], half[name])}
    assert changed == {"model", "text_encoders"}    # not the VAE
    want = draw(tmp_path / "half.safetensors", tmp_path / "d", of_sd3["lokr"], config=sd3)
    assert np.abs(draw(tmp_path / "two.safetensors", tmp_path / "e", config=sd3) - want).max() <= 4    # of fp16
    convert(*more, "--output", tmp_path / "back", "--precision", "fp32")
    assert_close(draw(tmp_path / "back", tmp_path / "f"), want)


def test_sd3_merged_extracted_and_resized(convert, of_sd3, sd3, tmp_path):
    named = [f"{of_sd3['lora']}=0.5", f"{of_sd3['t5']}=-2"]
    want = draw(sd3, tmp_path / "want", *named)
    said = convert("merge", *named, "--output", tmp_path / "both.safetensors")    # diffusers has no T5: then kohya
    assert_close(draw(sd3, tmp_path / "a", tmp_path / "both.safetensors"), want)
    both = adapter_files.read(tmp_path / "both.safetensors")
    assert "rank 2 to 6" in said and (both.format, both.family) == ("kohya", "SD 3")
    convert("merge", of_sd3["dora"], "--base", sd3, "--rank", 99, "--output", tmp_path / "dora.safetensors")
    assert_close(draw(sd3, tmp_path / "b", tmp_path / "dora.safetensors"), draw(sd3, tmp_path / "c", of_sd3["dora"]))
    said = convert("resize", of_sd3["lokr"], "--energy", 1, "--lora_format", "diffusers", "--output",
                   tmp_path / "lora.safetensors")
    assert_close(draw(sd3, tmp_path / "d", tmp_path / "lora.safetensors"), draw(sd3, tmp_path / "e", of_sd3["lokr"]))
    assert "have become LoRA" in said

    # what was merged, taken out again: of folders and of one file, in each order
    for suffix in ("", ".safetensors"):
        convert("merge", of_sd3["lora"], "--into", sd3, "--output", tmp_path / f"tuned{suffix}")
    assert tiny.write_one_file(tmp_path / "base.safetensors", StableDiffusion3Pipeline.from_pretrained(sd3), *SD3_PARTS[1:])
    want = draw(sd3, tmp_path / "want", of_sd3["lora"])
    found = []
    pairs = ((sd3, "tuned"), ("base.safetensors", "tuned.safetensors"), (sd3, "tuned.safetensors"))
    for number, (base, tuned) in enumerate(pairs):
        file = tmp_path / f"out{number}.safetensors"
        said = convert("extract", "--base", tmp_path / base, "--tuned", tmp_path / tuned, "--energy", 0.9999, "--text_encoders",
                       "--lora_targets", "attention-ff", "--output", file, "--config", sd3)
        assert said.count("100% of its difference (sum of squares) lies") == 3
        found.append(contents(file)[0])
        assert adapter_files.read(file).rank == 4
    assert_close(draw(sd3, tmp_path / "f", file), want)
    assert all(each.keys() == found[0].keys() and all(torch.equal(each[name], found[0][name]) for name in each) for each in found)


def test_what_of_sd3_cannot_be_is_refused(convert, files, of_sd3, sd3, tiny_model, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    half = tiny.make_sd3(tmp_path / "medium", "medium")
    for words, *flags in (
            ("adapter of SDXL one of SD 3", "merge", files["lora"], of_sd3["lora"], "--output", out),
            ("adapter of SDXL, not of SD 3", "merge", files["lora"], "--into", sd3, "--output", out),
            ("adapter of SD 3, not of SDXL", "merge", of_sd3["lora"], "--into", tiny_model, "--output", out),
            ("--tuned one of SDXL", "extract", "--base", sd3, "--tuned", tiny_model, "--rank", 4, "--output", out),
            ("another architecture norm1.linear", "extract", "--base", half, "--tuned", sd3, "--rank", 4, "--output", out),
            ("SD 3 has no such convolutions", "extract", "--base", sd3, "--tuned", sd3, "--conv_rank", 4, "--rank", 4, "--output",
             out),
            ("no loader T5 --lora_format kohya", "convert", of_sd3["t5"], "--lora_format", "diffusers", "--output", out),
            ("is written as .safetensors", "merge", of_sd3["lora"], "--into", sd3, "--output", tmp_path / "out.ckpt"),
            ("made for another model attn2", "merge", of_sd3["lora"], "--into", half, "--output", out)):
        with pytest.raises(SystemExit) as left, errors.exit_on_user_error("convert_lora.py"):
            convert(*flags)
        said = capsys.readouterr().err.splitlines()[-1]
        assert left.value.code == 2 and all(word in said for word in words.split()), said
    assert not list(tmp_path.glob("out*"))
