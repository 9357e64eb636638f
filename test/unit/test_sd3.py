"""SD 3's side of a run: prompts as StableDiffusion3Pipeline encodes them, what is kept of them, and what each flag changes."""

import itertools
import json
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pieces
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import save_file
from test_parity import LONG, kohya

import train_sd3
from library.data import draws, prepare
from library.data.cache import Store
from library.diffusion.latents import latent_scale
from library.errors import UserError
from library.models import sd3
from library.models.encoders import Encoders

PROMPTS = ["", "a photo of a red cat", "blue dog, green house, number 7!", " ".join(["dog"] * 75), " ".join(["cat"] * 76), LONG]
L, G, T5, HIDDEN = 16, 32, 64, 77    # widths of the tiny text encoders; tokens of a CLIP
ZERO = ("--sd3_clip_uncond_behaviour=zero", "--sd3_t5_uncond_behaviour=zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusion3Pipeline.from_pretrained(folder)


@pytest.fixture
def parse(folder, tiny_images, tmp_path):
    """`parse(*flags)`: the arguments of a small run of train_sd3.py."""
    usual = {"pretrained_model_name_or_path": folder, "train_data_dir": tiny_images, "output_dir": tmp_path / "out",
             "resolution": 64, "train_batch_size": 3, "max_train_steps": 4, "seed": 1, "report_to": "none"}
    return lambda *flags: train_sd3.parse_args([*(f"--{name}={value}" for name, value in usual.items()), *map(str, flags)])


@pytest.fixture
def made(parse):
    """`made(*flags)`: the encoders of a run."""
    def make(*flags, precision="no", **options):
        args = parse(*flags)
        accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
        return Encoders(sd3, args, sd3.find_base(args), accelerator, **options)
    return make


@pytest.fixture
def batch_of(parse, tmp_path):
    """`batch_of(*flags)`: the batches of a run's steps, with their prompts encoded; caches lie in folders of their own."""
    number = itertools.count()

    def batches(*flags):
        run = pieces.make(parse(*flags), tmp_path / f"cache{next(number)}", sd3)
        run.encoders.free(vae=True, text=run.prompts.whole)
        run.batches = [run.encoders.complete(run.loader.compose(step, 0)) for step in range(4)]
        run.samples = [list(zip(*(part.tolist() for part in run.loader.samples(step, 0)[:2]), strict=True)) for step in range(4)]
        return run
    return batches


def theirs(pipeline, prompts, length: int = 154) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes of prompts."""
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                      max_sequence_length=length)
    return hidden, pooled


def embeds(run) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([batch[name] for batch in run.batches]).detach() for name in ("prompt_embeds", "pooled_prompt_embeds"))


def encoded(encoders, prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    """As training calls them: encoded together, then put together prompt by prompt."""
    fields = encoders.encode_prompts(prompts)
    both = [encoders.assemble({name: values[place] for name, values in fields.items()}, {}, ()) for place in range(len(prompts))]
    return tuple(torch.stack([each[name] for each in both]) for name in ("prompt_embeds", "pooled_prompt_embeds"))


# prompts

@pytest.mark.parametrize("length", [77, 154, 256])
def test_embeddings_are_those_of_the_pipeline(made, pipeline, length):
    encoders = made(f"--tokenizer_max_length={length}")
    hidden, pooled = theirs(pipeline, PROMPTS, length)
    assert hidden.shape == (len(PROMPTS), HIDDEN + length, T5) and pooled.shape == (len(PROMPTS), L + G)
    ours, ours_pooled = encoded(encoders)
    torch.testing.assert_close(ours, hidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours_pooled, pooled, rtol=1e-6, atol=1e-6)
    for prompt, alone, own in zip(encoders.prompts(PROMPTS), hidden, pooled, strict=True):
        torch.testing.assert_close((prompt.hidden[0], prompt.pooled[0]), (alone, own), rtol=1e-5, atol=1e-5)
    t5 = {prompt for prompt in PROMPTS if len(pipeline.tokenizer_3(prompt).input_ids) > length}
    assert encoders.truncated == {"--max_token_length 77 (CLIP)": set(PROMPTS[-2:]), f"--tokenizer_max_length {length} (T5)": t5}
    assert LONG in t5 and (PROMPTS[-2] in t5) == (length < 77)


def test_bf16_encodes_as_the_pipeline_in_bf16(made, folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    hidden, pooled = theirs(pipeline, PROMPTS[:3])
    ours, ours_pooled = encoded(made(precision="bf16"), PROMPTS[:3])
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, hidden) and torch.equal(ours_pooled, pooled)


def test_without_t5_there_are_zeros_in_its_place(made, folder, tmp_path):
    """The pipeline's, too; and neither T5 nor its tokenizer need be there."""
    lean = shutil.copytree(folder, tmp_path / "lean", ignore=shutil.ignore_patterns("*_3"))
    with pytest.raises(UserError, match="no text_encoder_3, .* --no_t5"):
        made(f"--pretrained_model_name_or_path={lean}")
    encoders = made(f"--pretrained_model_name_or_path={lean}", "--no_t5")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    hidden, pooled = theirs(pipeline, PROMPTS)
    ours, ours_pooled = encoded(encoders)
    assert not ours[:, HIDDEN:].any() and len(encoders.text_encoders) == 2
    torch.testing.assert_close((ours, ours_pooled), (hidden, pooled), rtol=1e-6, atol=1e-6)


def test_padding_of_t5(made, pipeline):
    hidden, zeroed = encoded(made("--t5_padding=unmodified"))[0], encoded(made("--t5_padding=zero"))[0]
    for row, prompt in enumerate(PROMPTS):
        end = HIDDEN + min(154, len(pipeline.tokenizer_3(prompt).input_ids))
        assert torch.equal(zeroed[row, :end], hidden[row, :end]) and not zeroed[row, end:].any()
        assert hidden[row, end:].any(-1).all()    # what padding becomes is no zeros


def test_masks_hide_padding_within_the_encoders(made, pipeline):
    """As kohya's strategy_sd3.py: the tokenizer's attention mask goes into the encoder, and what padding becomes stays."""
    plain, clip, t5 = (encoded(made(*flags)) for flags in ((), ("--apply_lg_attn_mask",), ("--apply_t5_attn_mask",)))
    columns = {"tokenizer": slice(0, L), "tokenizer_2": slice(L, L + G)}
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            for name, own in columns.items():
                read = getattr(pipeline, name)(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
                output = getattr(pipeline, name.replace("tokenizer", "text_encoder"))(**read, output_hidden_states=True)
                torch.testing.assert_close(clip[0][row, :HIDDEN, own], output.hidden_states[-2][0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(clip[1][row, own], output.text_embeds[0], rtol=1e-5, atol=1e-5)
            read = pipeline.tokenizer_3(prompt, padding="max_length", max_length=154, truncation=True, return_tensors="pt")
            torch.testing.assert_close(t5[0][row, HIDDEN:], pipeline.text_encoder_3(**read)[0][0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(clip[0][:, :HIDDEN], plain[0][:, :HIDDEN]) and torch.equal(clip[0][:, HIDDEN:], plain[0][:, HIDDEN:])
    assert torch.equal(t5[0][:, :HIDDEN], plain[0][:, :HIDDEN]) and torch.equal(t5[1], plain[1])
    assert not torch.allclose(t5[0][:-1, HIDDEN:], plain[0][:-1, HIDDEN:], atol=1e-2)
    torch.testing.assert_close(t5[0][-1], plain[0][-1])    # a prompt that fills every place has no padding


@pytest.mark.parametrize("length", [150, 225])
def test_long_prompts_are_cut_in_pieces_for_the_clips(made, length):
    encoders = made(f"--max_token_length={length}")
    hidden, pooled = encoded(encoders)
    assert hidden.shape == (len(PROMPTS), length + 2 + 154, T5)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            (one, first), (two, second) = (kohya(prompt, *pair, length) for pair in
                                           zip(encoders.tokenizers[:2], encoders.text_encoders[:2], strict=True))
        torch.testing.assert_close(hidden[row, :length + 2, :L + G], torch.cat([one, two], dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[row], torch.cat([first, second]), rtol=1e-5, atol=1e-5)
    assert not hidden[:, :length + 2, L + G:].any()


# what is kept, and what of it reaches a batch

CHOICES = [(), ("--apply_lg_attn_mask", "--apply_t5_attn_mask", "--t5_padding=zero"),
           ("--clip_l_dropout_rate=0.5", "--clip_g_dropout_rate=0.3", "--t5_dropout_rate=0.6", "--t5_padding=zero"),
           ("--clip_g_dropout_rate=0.5", "--t5_dropout_rate=0.5", "--proportion_empty_prompts=0.4", *ZERO),
           ("--no_t5", "--clip_l_dropout_rate=0.5", "--sd3_clip_uncond_behaviour=zero", "--max_token_length=150")]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda flags: " ".join(flags) or "default")
def test_cached_is_not_cached(batch_of, flags):
    """... nor is it with CLIPs that are trained, while T5 is cached and gone."""
    cached, asked = batch_of(*flags), batch_of(*flags, "--cache_text_encoder_outputs=false")
    torch.testing.assert_close(embeds(cached), embeds(asked), rtol=1e-5, atol=1e-5)
    assert cached.prompts.whole and not asked.prompts.whole and cached.encoders._text_encoders == {}
    trained = batch_of(*flags, "--train_text_encoder")
    torch.testing.assert_close(embeds(trained), embeds(cached), rtol=1e-5, atol=1e-5)
    assert trained.encoders._text_encoders.keys() == {"text_encoder", "text_encoder_2"}
    assert trained.encoders.kept == (() if "--no_t5" in flags else ("t5",))


def test_a_cached_caption_takes_what_it_is_long(made, tmp_path):
    """In true widths: 20 tokens of T5 and EOS, in bf16."""
    encoders = made("--t5_padding=zero", precision="bf16")
    store = Store(tmp_path)
    prepare.cache_prompts(["", *PROMPTS], store, "", 4, lambda: encoders.encode_kept)
    for prompt in PROMPTS:
        tokens = min(154, len(encoders.tokenizers[2](prompt).input_ids))
        assert store.read(prepare.prompt_key(prompt, ""), "t5").shape == (tokens, T5)
    rows = torch.randn(2, 154, 4096).bfloat16()
    rows[0, 21:], rows[1, 154:] = 0, 0
    rows[0, 3] = 0    # a row of zeros between others stays
    options = {"t5_padding": "zero", "t5_length": 154, "no_t5_width": None}
    short, long = sd3.kept({"t5": rows}, **options)["t5"]
    assert short.nbytes <= 25 * 4096 * 2 and short.shape == (21, 4096) and long.shape == (154, 4096)
    assert torch.equal(sd3.assemble({"t5": short}, **options)["t5"], rows[0])
    path = tmp_path / "one"
    path.mkdir()
    prepare.cache_prompts(["x"], Store(path), "", 1, lambda: lambda prompts: {"t5": [short]})
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) <= 25 * 4096 * 2


def test_the_store_holds_no_zeros_of_the_clips(made, tmp_path):
    encoders = made()
    prepare.cache_prompts(PROMPTS, Store(tmp_path), "", 4, lambda: encoders.encode_kept)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        shapes = {name.split(".")[1]: file.get_tensor(name).shape for name in file.keys()}
    assert shapes == {"clip_l": (HIDDEN, L), "pooled_l": (L,), "clip_g": (HIDDEN, G), "pooled_g": (G,), "t5": (154, T5)}


@pytest.mark.parametrize("behaviour", ["empty_string", "zero"])
def test_dropout_of_each_encoder(batch_of, made, behaviour):
    rates = {"clip_l": 0.5, "clip_g": 0.25, "t5": 0.75}
    flags = [f"--sd3_clip_uncond_behaviour={behaviour}", f"--sd3_t5_uncond_behaviour={behaviour}"]
    full = batch_of(*flags)
    run = batch_of(*flags, *(f"--{name}_dropout_rate={rate}" for name, rate in rates.items()))
    assert run.samples == full.samples
    (hidden, pooled), (plain, plain_pooled) = embeds(run), embeds(full)
    empty = made().prompts([""])[0]
    gone, gone_pooled = empty.hidden[0], empty.pooled[0]
    if behaviour == "zero":
        gone, gone_pooled = torch.zeros_like(gone), torch.zeros_like(gone_pooled)
    places = {"clip_l": ((slice(0, HIDDEN), slice(0, L)), slice(0, L)),
              "clip_g": ((slice(0, HIDDEN), slice(L, L + G)), slice(L, L + G)), "t5": ((slice(HIDDEN, None), slice(None)), None)}
    seen = []
    for at, (row, visit) in enumerate(itertools.chain(*run.samples)):
        drawn = draws.generator(1, row, visit, draws.ENCODERS).random(3) < list(rates.values())
        seen.append(tuple(drawn))
        for (part, of_pooled), silent in zip(places.values(), drawn, strict=True):
            torch.testing.assert_close(hidden[at][part], (gone if silent else plain[at])[part], rtol=1e-5, atol=1e-5)
            if of_pooled:
                torch.testing.assert_close(pooled[at][of_pooled], (gone_pooled if silent else plain_pooled[at])[of_pooled])
    assert len(set(seen)) > 3    # each by itself


def test_dropout_is_as_frequent_as_asked():
    run = pieces.loader.PromptSource(None, "", [], None, [], dropout=(0.2, 0.0, 0.9))
    drawn = np.array([run.silent("x", 11, row, visit) for row in range(60) for visit in range(60)])
    assert np.abs(drawn.mean(axis=0) - [0.2, 0, 0.9]).max() < 0.03 and abs((drawn[:, 0] & drawn[:, 2]).mean() - 0.18) < 0.03
    assert run.silent("", 3, 0, 0) == (True,) * 3 and run.silent("x", 3, 5, 5) == run.silent("y", 3, 5, 5)


@pytest.mark.parametrize(("flags", "clip", "t5"), [
    ((), True, True), (ZERO[:1], False, True), (ZERO[1:], True, False), (ZERO, False, False)])
def test_what_the_empty_prompt_is(made, batch_of, flags, clip, t5):
    """In training and in validation alike, cached or not; a prompt with words stays as it is."""
    encoders, (plain, words) = made(*flags), made().prompts(["", "a red cat"])
    empty, again = encoders.prompts(["", "a red cat"])
    wanted = torch.cat([plain.hidden[:, :HIDDEN] * clip, plain.hidden[:, HIDDEN:] * t5], dim=1)
    assert torch.equal(empty.hidden, wanted) and torch.equal(empty.pooled, plain.pooled * clip)
    assert torch.equal(again.hidden, words.hidden) and torch.equal(again.pooled, words.pooled)
    run = batch_of(*flags, "--proportion_empty_prompts=1", "--validation_prompt=a red cat")
    hidden, pooled = embeds(run)
    torch.testing.assert_close(hidden, wanted.expand_as(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, empty.pooled.expand_as(pooled), rtol=1e-5, atol=1e-5)
    (shown,), negative = run.encoders.shown(SimpleNamespace(validation_prompt=["a red cat"], validation_negative_prompt=None),
                                            run.prompts)
    torch.testing.assert_close((negative.hidden, shown.hidden), (wanted, words.hidden), rtol=1e-5, atol=1e-5)


def test_evaluation_drops_no_encoder(parse, tmp_path):
    run = pieces.make(parse("--t5_dropout_rate=1", "--clip_l_dropout_rate=1", *ZERO), tmp_path / "cache", sd3)
    assert not embeds(SimpleNamespace(batches=[run.loader.compose(0, 0)]))[0][:, HIDDEN:].any()
    held_out = pieces.caching.cache_evaluation(parse(), run.encoders, run.data, run.prompts, pieces.CPU, tmp_path / "cache")
    assert all(batch["prompt_embeds"][:, HIDDEN:].any() for _, batch in held_out.one_by_one(2))


def test_what_makes_prompts_stale(made, folder, tmp_path):
    recipe = made().prompt_recipe(tmp_path / "memo")
    changes = ["--tokenizer_max_length=77", "--t5_padding=zero", "--apply_lg_attn_mask", "--apply_t5_attn_mask",
               "--max_token_length=150", "--no_t5", "--train_text_encoder"]
    others = [made(flag).prompt_recipe(tmp_path / "memo") for flag in changes]
    others.append(made(precisions=["no_change", "no_change", "int8-quanto"]).prompt_recipe(tmp_path / "memo"))
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "text_encoder_3/more.json").write_text("{}")
    others.append(made(f"--pretrained_model_name_or_path={changed}").prompt_recipe(tmp_path / "memo"))
    assert len({recipe, *others}) == 1 + len(others)
    for same in (ZERO, ("--t5_dropout_rate=0.5",), ("--weighting_scheme=mode",)):
        assert made(*same).prompt_recipe(tmp_path / "memo") == recipe
    without = {made("--no_t5", f"--pretrained_model_name_or_path={place}").prompt_recipe(tmp_path / "memo")
               for place in (folder, changed)}
    assert len(without) == 1


# the encoders in memory

def test_encoders_leave_memory(made):
    encoders = made("--train_text_encoder")
    clip, _, t5 = held = [weakref.ref(encoder) for encoder in encoders.text_encoders]
    encoders.free(vae=True, text=True)
    assert t5() is None and clip() is not None
    encoders = made()
    held = [weakref.ref(encoder) for encoder in [*encoders.text_encoders, encoders.vae]]
    encoders.free(vae=True, text=True)
    assert [each() for each in held] == [None] * 4


def test_trained_clips_have_gradients_and_are_float32(made):
    encoders = made("--train_text_encoder", "--learning_rate_te1=0", precision="bf16")
    networks = sd3.trainable_text_encoders(None, encoders)
    assert networks.keys() == {"text_encoder_2"} and encoders.frozen == ("text_encoder", "text_encoder_3")
    assert encoders.kept == ("clip_l", "pooled_l", "t5")
    ids = encoders.tokenize(PROMPTS[:2], parts=encoders.trained)
    assert ids.keys() == {"input_ids_2", "zeros"}
    kept = encoders.encode_kept(PROMPTS[:2])
    assert kept["t5"].dtype == torch.bfloat16
    batch = encoders.complete(ids | encoders.model.assemble(kept, **encoders.options))
    (batch["prompt_embeds"].square().mean() + batch["pooled_prompt_embeds"].square().mean()).backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in networks["text_encoder_2"].parameters())


def test_a_quantised_t5(made):
    encoders, plain = made(precisions=["no_change", "no_change", "int8-quanto"]), made()
    (ours, pooled), (hidden, plain_pooled) = encoded(encoders), encoded(plain)
    assert torch.equal(ours[:, :HIDDEN], hidden[:, :HIDDEN]) and torch.equal(pooled, plain_pooled)
    error = (ours - hidden).norm() / hidden[:, HIDDEN:].norm()
    assert 0 < error < 0.05


def test_t5_with_an_adapter_is_asked_in_every_step_and_drops_nothing(parse, made):
    args = parse("--train_text_encoder")
    args.learning_rate_te3 = 1e-4
    assert sd3.trained_parts(args) == sd3.TEXT_ENCODERS and sd3.trained_parts(parse()) == ()
    encoders = made("--train_text_encoder", adapted=True)
    encoders.trained = sd3.TEXT_ENCODERS
    t5 = sd3.adapted_text_encoders(args, encoders)["text_encoder_3"].train()
    batch = [encoders.complete(encoders.tokenize(PROMPTS[:2]))["prompt_embeds"] for _ in range(2)]
    assert torch.equal(*batch) and t5.training


# latents, and the networks

def test_latents_are_shifted_and_scaled_as_the_pipeline_shifts_and_scales_them(batch_of, pipeline):
    run = batch_of("--no_t5")
    row, visit = run.samples[0][0]
    pixels = torch.from_numpy(prepare.load_pixels(run.data, row, run.loader._number(row, visit), "lanczos"))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
    draw = draws.generator(1, row, visit, draws.LATENT).standard_normal((16, 8, 8), dtype=np.float32)
    ours = run.batches[0]["latents"][0]
    vae = pipeline.vae.config
    assert ours.shape == (16, 8, 8) and vae.shift_factor == 0.0609
    back = ours / vae.scaling_factor + vae.shift_factor    # StableDiffusion3Pipeline, before it decodes
    torch.testing.assert_close(back, (posterior.mean + posterior.std * torch.from_numpy(draw))[0], rtol=1e-4, atol=1e-5)


def test_an_own_mean_of_each_channel_goes_before_the_shift_factor():
    config = {"latent_channels": 2, "scaling_factor": 2.0, "shift_factor": 0.5}
    assert latent_scale(config)[0].flatten().tolist() == [0.5, 0.5]
    assert latent_scale(config | {"shift_factor": None})[0].flatten().tolist() == [0, 0]
    assert latent_scale(config | {"latents_mean": [0.1, 0.2]})[0].flatten().tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("flavour", list(tiny.SD3))
def test_every_flavour_loads_from_a_folder_and_from_one_file(parse, tmp_path, flavour):
    folder = tiny.make_sd3(tmp_path / "model", flavour, seed=3)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    text_encoders = {"medium": sd3.TEXT_ENCODERS, "3.5-medium": (), "3.5-large": sd3.TEXT_ENCODERS[:2]}[flavour]
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)    # a file has none of CLIP ViT-L
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    file = tiny.write_one_file(tmp_path / "one.safetensors", pipeline, *text_encoders)
    lean = shutil.copytree(folder, tmp_path / "lean")
    for part in ("transformer", "vae", *text_encoders):    # configs alone are taken of what the file holds
        for weights in (lean / part).glob("*.safetensors"):
            weights.unlink()
    bases = [sd3.find_base(parse(f"--pretrained_model_name_or_path={place}", f"--single_file_config={lean}"))
             for place in (folder, file)]
    assert bases[1].apart == tuple(part for part in sd3.TEXT_ENCODERS if part not in text_encoders)
    for base in bases:
        for part in sd3.PARTS[:5]:
            network, wanted = sd3.load_part(base, part, torch.float32), getattr(pipeline, part).state_dict()
            assert network.state_dict().keys() == wanted.keys() and not network.training
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items()), part
            assert not any(p.requires_grad for p in network.parameters())
    transformer = sd3.load_part(bases[0], "transformer", torch.float32)
    assert sd3.empty_transformer(bases[1]).state_dict().keys() == transformer.state_dict().keys()
    assert sd3.load_schedule(bases[1]).config.shift == 3.0 and sd3.vae_config(bases[1])["shift_factor"] == 0.0609
    given = {"hidden_states": torch.randn(2, 16, 8, 12), "timestep": torch.tensor([700.0, 20.0]),
             "encoder_hidden_states": torch.randn(2, 100, T5), "pooled_projections": torch.randn(2, L + G)}
    for each in (transformer, pipeline.transformer):
        each.requires_grad_(True)(**given).sample.square().mean().backward()
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in
               zip(transformer.parameters(), pipeline.transformer.parameters(), strict=True))


# mistakes

def test_parts_that_do_not_belong_together(parse, folder, tmp_path, pipeline):
    def edit(part, **changes):
        made = shutil.copytree(folder, tmp_path / f"{part}{len(list(tmp_path.iterdir()))}")
        path = made / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return made
    for made, message in ((edit("text_encoder_2", projection_dim=40), "their pooled embeddings have 56 numbers, and it takes 48"),
                          (edit("text_encoder_3", d_model=48), "makes 48 numbers of a token, and 64 are taken")):
        with pytest.raises(UserError, match=message):
            sd3.find_base(parse(f"--pretrained_model_name_or_path={made}"))
    other = edit("transformer", num_layers=2)
    with pytest.raises(UserError, match="holds another transformer .*: num_layers is 2 instead of 3"):
        sd3.check_same_transformer(sd3.find_base(parse()), other)
    sd3.check_same_transformer(sd3.find_base(parse()), folder)
    file = tiny.write_one_file(tmp_path / "one.safetensors", pipeline)
    base = sd3.find_base(parse(f"--pretrained_model_name_or_path={file}", f"--single_file_config={other}"))
    with pytest.raises(UserError, match="is not one of .*--single_file_config"):
        sd3.load_part(base, "transformer", torch.float32)


@pytest.mark.parametrize(("content", "message"), [
    (b"x" * 100, "damaged or cut short"), (None, "holds no transformer of SD 3 or 3.5")])
def test_files_that_are_no_sd3(parse, tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        sd3.find_base(parse(f"--pretrained_model_name_or_path={path}"))


def test_what_cannot_be_had():
    args = SimpleNamespace(text_encoder_3_precision="int8-quanto")
    assert sd3.text_precisions(args, "cpu") == ["no_change", "no_change", "int8-quanto"]
    with pytest.raises(UserError, match="--text_encoder_3_precision int8-quanto does not run on npu"):
        sd3.text_precisions(args, "npu")
