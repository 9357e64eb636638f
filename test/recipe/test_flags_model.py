"""Each flag of the groups `model` and `embedding cache` changes what it says it changes."""

import json
import shutil

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from pieces import CPU, make, note_calls
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPMLP

from library.errors import UserError
from library.models import sdxl
from library.models.encoders import Encoders
from library.models.single_file import save_single_file


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("other"), seed=1, prediction_type="v_prediction")


def same(network, folder, kind=UNet2DConditionModel) -> bool:
    theirs = kind.from_pretrained(folder).state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in network.state_dict().items())


def base_of(parse, *flags) -> sdxl.Base:
    return sdxl.find_base(parse(*flags))


def test_base_model(parse, tiny_model, other_model):
    for folder, other in ((tiny_model, other_model), (other_model, tiny_model)):
        base = base_of(parse, "--pretrained_model_name_or_path", folder)
        unet = sdxl.load_part(base, "unet", torch.float32)
        assert same(unet, folder / "unet") and not same(unet, other / "unet")
        kind = "epsilon" if folder == tiny_model else "v_prediction"
        assert sdxl.load_schedule(base, None, False).config.prediction_type == kind


def test_vae(parse, tmp_path, other_model):
    recipes = set()
    for flags in ((), ("--pretrained_vae_model_name_or_path", other_model), ("--vae", other_model / "vae")):
        encoders = make(parse(*flags, "--embedding_cache_dir", tmp_path), tmp_path).encoders
        assert same(encoders.vae, other_model / "vae", AutoencoderKL) == bool(flags)
        recipes.add(encoders.latent_recipe(tmp_path / "weights.json", "lanczos"))
    assert len(recipes) == 2    # latents of the other VAE are never taken for this one's


def test_revision(parse, tmp_path, monkeypatch, tiny_model, other_model):
    """From the hub's cache on this machine, where two revisions of a model lie."""
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--tiny--sdxl"
    (repository / "refs").mkdir(parents=True)
    for name, digit, folder in (("main", "a", tiny_model), ("second", "b", other_model)):
        (repository / "refs" / name).write_text(digit * 40)
        shutil.copytree(folder, repository / "snapshots" / (digit * 40))
    flags = ("--pretrained_model_name_or_path", "tiny/sdxl")
    assert same(sdxl.load_part(base_of(parse, *flags), "unet", torch.float32), tiny_model / "unet")
    changed = base_of(parse, *flags, "--revision", "second")
    assert same(sdxl.load_part(changed, "unet", torch.float32), other_model / "unet")
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: tiny/sdxl is neither a folder here nor"):
        base_of(parse, *flags, "--revision", "third")


def test_variant(parse, tmp_path, tiny_model, other_model):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for weights in other_model.glob("*/*.safetensors"):
        shutil.copy(weights, folder / weights.parent.name / f"{weights.stem}.fp16.safetensors")
    flags = ("--pretrained_model_name_or_path", folder)
    for variant, wanted in (((), tiny_model), (("--variant", "fp16"), other_model)):
        base = base_of(parse, *flags, *variant)
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
            assert same(sdxl.load_part(base, part, torch.float32), wanted / part, kind)


def test_single_file_config(parse, tmp_path, tiny_model):
    parts = {part: sdxl.load_part(base_of(parse), part, torch.float32) for part in sdxl.PARTS[:4]}
    file = tmp_path / "model.safetensors"
    save_single_file(file, {part: network.state_dict() for part, network in parts.items()}, parts["unet"].config)
    configs = shutil.copytree(tiny_model, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((configs / "scheduler" / "scheduler_config.json").read_text())
    (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {"beta_end": 0.02}))
    flags = ("--pretrained_model_name_or_path", file, "--single_file_config")
    ends = [sdxl.load_schedule(base_of(parse, *flags, folder), None, False).config.beta_end for folder in (tiny_model, configs)]
    assert ends == [0.012, 0.02]
    with pytest.raises(UserError, match="--single_file_config: there is no file or folder ./nowhere"):
        base_of(parse, *flags, "./nowhere")


@pytest.mark.parametrize(("flag", "changed"), [("--tokenizer1_path", "input_ids"), ("--tokenizer2_path", "input_ids_2")])
def test_tokenizers(parse, tmp_path, flag, changed):
    tiny.make_tokenizer(tmp_path / "own", "b")    # pads with another token
    before, after = ({name: ids.tolist() for name, ids in
                      Encoders(sdxl, args, sdxl.find_base(args), CPU).tokenize(["red cat"]).items()}
                     for args in (parse(), parse(flag, tmp_path / "own")))
    assert {name for name in before if before[name] != after[name]} == {changed}


@pytest.mark.parametrize(("length", "read"), [(75, 77), (77, 77), (150, 152), (225, 227), (512, 452)])
def test_max_token_length(parse, tmp_path, length, read):
    made = make(parse("--max_token_length", length, "--embedding_cache_dir", tmp_path), tmp_path)
    batch = made.loader.compose(0, 0)
    assert batch["prompt_embeds"].shape == (2, read, 48)
    one = made.encoders.encode_prompts(["cat " * 80])["hidden"]
    other = made.encoders.encode_prompts(["cat " * 80 + "dog"])["hidden"]
    assert torch.equal(one, other) == (read == 77)


def test_vae_dtype(parse, tmp_path):
    moments = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        made = make(parse("--vae_dtype", name, "--embedding_cache_dir", tmp_path), tmp_path)
        assert made.encoders.vae.dtype == dtype
        moments.append(made.loader.compose(0, 0)["latents"])
        assert moments[-1].dtype == torch.float32
    for half in moments[1:]:
        assert 0 < (half - moments[0]).abs().max() < 0.1 * moments[0].abs().max()


def test_gradient_checkpointing(train, tmp_path):
    """The blocks of all trained networks run again in the backward pass, and the numbers stay the same."""
    kinds, calls, losses = (ResnetBlock2D, BasicTransformerBlock, CLIPMLP), {}, {}
    for on in (False, True):
        count = dict.fromkeys(kinds, 0)

        def note(module, inputs, count=count):
            if type(module) in kinds and module.training:
                count[type(module)] += 1

        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        try:
            out = train(f"--gradient_checkpointing={on}", "--train_text_encoder", "--output_dir", tmp_path / str(on))
        finally:
            hook.remove()
        calls[on] = count
        losses[on] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    for kind in kinds:
        assert calls[True][kind] > 1.2 * calls[False][kind] > 0, kind
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


def shards(folder) -> int:
    return len(list(folder.glob("*.safetensors")))


def test_cache_latents(parse, tmp_path):
    seen = []
    for on in (True, False):
        made = make(parse(f"--cache_latents={on}"), tmp_path / str(on))
        batch = made.loader.compose(0, 0)
        assert bool(shards(tmp_path / str(on) / "latents")) == on
        seen.append(batch["latents"])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_cache_text_encoder_outputs(parse, tmp_path):
    seen = []
    for on in (True, False):
        made = make(parse(f"--cache_text_encoder_outputs={on}"), tmp_path / str(on))
        batch = made.loader.compose(0, 0)
        assert ("prompt_embeds" in batch) == on and ("input_ids" in batch) == (not on)
        assert bool(shards(tmp_path / str(on) / "prompts")) == on
        seen.append(made.encoders.complete(batch))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-5, atol=1e-5)


def test_embedding_cache_dir(train, tmp_path):
    out = train("--embedding_cache_dir", tmp_path / "kept", "--max_train_steps", 1)
    assert shards(tmp_path / "kept" / "latents") and shards(tmp_path / "kept" / "prompts") and not (out / "cache").exists()
    out = train("--output_dir", tmp_path / "own", "--max_train_steps", 1, without=["embedding_cache_dir"])
    assert shards(out / "cache" / "latents") and shards(out / "cache" / "prompts")


@pytest.mark.parametrize("count", [1, 3])
def test_cache_variants(parse, tmp_path, count):
    flags = ("--cache_variants", count, "--max_train_steps", 60, "--embedding_cache_dir", tmp_path)
    crops = make(parse(*flags), tmp_path)
    cuts = {row: {crops.table.cut(row, visit % count) for visit in range(9)} for row in range(len(crops.table))}
    assert max(len(kept) for kept in cuts.values()) == count
    assert len(crops.latents.stores[0]._keys) == sum(map(len, cuts.values()))
    tags = make(parse(*flags, "--shuffle_caption"), tmp_path)
    shown = [{tags.loader.prompt(row, visit) for visit in range(40)} for row in range(6)]
    assert max(map(len, shown)) == count


def test_batch_sizes_of_the_encoders(parse, tmp_path, monkeypatch):
    images, prompts = (note_calls(monkeypatch, Encoders, name) for name in ("encode_images", "encode_prompts"))
    for size in (1, 3):
        images.clear(), prompts.clear()
        flags = ("--vae_batch_size", size, "--text_encoder_batch_size", size + 1, "--center_crop")
        make(parse(*flags), tmp_path / str(size))
        assert max(len(given[1]) for given, _ in images) == size and sum(len(given[1]) for given, _ in images) == 6
        assert max(len(given[1]) for given, _ in prompts) == size + 1
