"""--layer_statistics and tools/compare_runs.py on whole runs: faults put into one of two are found, and nothing else is."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import tiny
from forks import flags, run, together
from safetensors.torch import load_file, save_file

from library.training import run_records
from library.validation import compare_runs

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS, LAYER = 3, "mid_block.attentions.0.transformer_blocks.1.ff.net.2"
FEW = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_train_steps", STEPS, "--lr_warmup_steps", 0)
EACH = ("--layer_statistics", 1)


def compared(a: Path, b: Path) -> compare_runs.Comparison:
    runs = compare_runs.open_run(a), compare_runs.open_run(b)
    return compare_runs.compare(*runs, compare_runs.tolerance_of(*runs, None, 0.0))


def scale(path: Path, name: str, factor: float = 1.001) -> None:
    """A model's file with one weight scaled."""
    weights = load_file(path)
    weights[name] = weights[name] * factor
    save_file(weights, path, {"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(place, tiny_model, tiny_images, shared_cache):
    """`trained(name, *flags, model=)`: a run of train_sdxl.py -> its output folder."""
    def trained(name, *more, model=tiny_model, statistics=True):
        run(flags(model, tiny_images, place / name, "--embedding_cache_dir", shared_cache, *FEW, *(EACH if statistics else ()),
                  *more), place / f"{name}.log")
        return place / name

    return functools.cache(trained)


@pytest.fixture(scope="module")
def altered(place, tiny_model):
    """`altered(part, weight)`: a copy of the model with that weight scaled by 1.001."""
    def altered(part, weight, factor=1.001):
        copy = shutil.copytree(tiny_model, place / f"model_{part}")
        scale(copy / part / WEIGHTS, weight, factor)
        return copy

    return altered


def test_a_second_run_is_equal_with_checkpointing_too(trained):
    a, b = trained("a"), trained("b", "--gradient_checkpointing")
    done = compared(a, b)
    assert done.first is None and compare_runs.headline(done).startswith(f"EQUAL within tolerance: {STEPS} steps; losses differ")
    assert done.recorded == [1, 2, 3] and done.apart["output"].max() < 1e-6 and list(done.flags) == ["gradient_checkpointing"]
    record = run_records.read(a, 2)
    assert record.layers == run_records.read(b, 2).layers and len(set(record.layers)) == len(record.layers) > 300
    assert record.layers[-1] == "unet" and record.layers.index("unet.conv_in") < record.layers.index("unet.mid_block")
    metrics = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    assert record.arrays["loss"].mean() == pytest.approx(metrics[1]["loss"], rel=1e-6)
    assert record.arrays["grad_norm"][0] == pytest.approx(metrics[1]["grad_norm"], rel=1e-6)
    whole = sum(norm**2 for norm in record.arrays["weight_gradient"][:, 0]) ** 0.5
    assert whole == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)    # before it was clipped


def test_a_run_without_the_flag_trains_the_same_and_is_compared_by_its_log(trained):
    a, without = trained("a"), trained("without", statistics=False)
    ours, theirs = (load_file(folder / "unet" / WEIGHTS) for folder in (without, a))
    assert all((ours[name] == theirs[name]).all() for name in ours) and not (without / run_records.FOLDER).exists()
    done = compared(a, without)
    assert done.first is None and (done.loss[0] == done.loss[1]).all() and "B has no layer statistics" in done.notes


def test_a_weight_that_was_scaled_is_named(trained, altered):
    done = compared(trained("a"), trained("weight", model=altered("unet", f"{LAYER}.weight")))
    assert done.first == 1
    assert compare_runs.headline(done).startswith(f"DIFFER from step 1: the weights of unet.{LAYER} differ by")
    assert {each.place for each in done.findings if each.stage == "weight"} == {f"unet.{LAYER}"}
    first = next(each for each in done.findings if each.stage == "forward")
    assert first.place == f"unet.{LAYER}" and first.before == 0 and 3e-4 < first.difference < 2e-3


def test_a_fault_from_the_third_step_on_is_named(trained, place, train, tiny_images, shared_cache, monkeypatch):
    import train_sdxl
    load_part, calls = train_sdxl.sdxl.load_part, []

    def faulty(base, part, *rest):
        network = load_part(base, part, *rest)
        if part == "unet":    # two micro steps a step; the hook comes before the recorder's
            network.get_submodule(LAYER).register_forward_hook(
                lambda module, args, output: calls.append(1) or (output * 1.001 if len(calls) > 4 else output))
        return network

    monkeypatch.setattr(train_sdxl.sdxl, "load_part", faulty)
    out = train("--output_dir", place / "third", *FEW, *EACH)
    assert len(calls) == 2 * STEPS
    done = compared(trained("a"), out)
    assert done.first == 3 and (done.findings[0].stage, done.findings[0].place) == ("forward", f"unet.{LAYER}")
    said = compare_runs.headline(done)
    assert said.startswith(f"DIFFER from step 3: forward pass, unet.{LAYER}: its input is the same")
    assert said.endswith("In step 2 there was none")


def test_other_data_are_called_data(trained, altered):
    done = compared(trained("a"), trained("seed", "--seed", 2, "--max_train_steps", 1))
    assert compare_runs.headline(done).startswith("DIFFER from step 1: data, not arithmetic: other samples are trained on")
    assert done.flags["seed"] == (1, 2) and any("A has 3 steps and B 1: the first 1 are compared" in note for note in done.notes)
    other = altered("vae", "encoder.conv_in.weight", 1.1)    # the same images, other latents
    done = compared(trained("a"), trained("vae", "--max_train_steps", 1, model=other))
    assert compare_runs.headline(done).startswith("DIFFER from step 1: data, not arithmetic: the same samples, but other values")
    assert {each.place for each in done.findings if each.stage == "loaded"} == {"latents"}
    assert any("not bit for bit the same was loaded: latents" in note for note in done.notes)


def test_two_processes_are_compared_position_by_position(trained, place, tiny_model, tiny_images, shared_cache):
    a = trained("a")
    both = together(flags(tiny_model, tiny_images, place / "both", "--embedding_cache_dir", shared_cache, *FEW, *EACH,
                          "--gradient_accumulation_steps", 1), place / "both.log", 2)
    assert [one.wait(300) for one in both] == [0, 0], both[0].text()[-3000:]
    done = compared(a, place / "both")
    assert done.first is None and done.apart["output"].max() < 1e-4 and not any("portions" in note for note in done.notes)
    ours, theirs = (run_records.read(folder, 1) for folder in (a, place / "both"))
    assert ours.samples == theirs.samples and (ours.arrays["checksum"] == theirs.arrays["checksum"]).all()


@pytest.fixture(scope="module")
def sd3(place):
    return tiny.make_sd3(place / "sd3", "3.5-medium")


def test_sd3(sd3, place, tiny_images, one_process, monkeypatch):
    import train_sd3
    layer = "transformer_blocks.1.attn.to_out.0"
    copy = shutil.copytree(sd3, place / "sd3_altered")
    scale(copy / "transformer" / WEIGHTS, f"{layer}.weight")
    monkeypatch.setattr(train_sd3.report, "write_loss_curve", lambda folder: folder)
    monkeypatch.setattr(train_sd3.report, "write_report", lambda folder, **_: folder)
    for name, model in (("a", sd3), ("b", copy)):
        one_process()
        train_sd3.main(train_sd3.parse_args(flags(model, tiny_images, place / f"sd3_{name}", "--embedding_cache_dir",
                                                  place / "sd3_cache", *FEW, *EACH, "--max_train_steps", 2)))
    done = compared(place / "sd3_a", place / "sd3_b")
    assert done.first == 1 and f"the weights of transformer.{layer} differ" in compare_runs.headline(done)
    first = next(each for each in done.findings if each.stage == "forward")
    assert first.place == f"transformer.{layer}" and first.before == 0
    given = ["transformer.hidden_states", "transformer.timestep", "transformer.encoder_hidden_states",
             "transformer.pooled_projections"]
    assert run_records.read(place / "sd3_a", 1).given == given


def test_of_an_adapter_what_is_trained_has_gradients(sd3, place, tiny_images):
    out = place / "lora"
    run(flags(sd3, tiny_images, out, "--embedding_cache_dir", place / "sd3_cache", *FEW, *EACH, "--max_train_steps", 1,
              "--rank", 4, "--gradient_checkpointing"), place / "lora.log", script="train_lora_sd3")
    record = run_records.read(out, 1)
    found = {name for name, values in zip(record.modules, record.arrays["weight_gradient"], strict=True) if values[0] >= 0}
    assert found and all("lora_" in name for name in found) and len(found) < len(record.modules)
    assert compared(out, out).first is None
