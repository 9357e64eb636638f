"""Adapters by SVD: the error is the tail of singular values, a second time changes nothing, and sums are sums."""

import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_adapters import CONFIG, KINDS, make_text_encoders, make_unet, with_noise

from library.errors import UserError
from library.models import adapter_files, adapter_svd, adapters, single_file, stored
from library.models.adapter_delta import delta, needs_base, shape_of
from library.models.adapter_files import Adapter, kind_of
from library.models.adapter_settings import Settings

LINEAR, CONV = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1"
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(), (3, 3)])).map(lambda s: (s[0], s[1], *s[2]))
seeds, ranks = st.integers(0, 2**32 - 1), st.integers(1, 12)
alphas = st.floats(0.1, 20.0)


def draw(seed, *sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def lora(seed, shape, rank, alpha):
    up, down = draw(seed, shape[0], rank, *[1] * (len(shape) - 2)), draw(seed + 1, rank, *shape[1:])
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(alpha))}


def full(own, shape):
    """What a module adds, in float64, by another route than the library's: a sum over ranks of outer products."""
    up, down = own["lora_up.weight"].double().flatten(1), own["lora_down.weight"].double().flatten(1)
    total = sum(torch.outer(up[:, i], down[i]) for i in range(len(down)))
    return (total * own["alpha"].double() / len(down)).reshape(shape)


def adapter_of(*modules, **metadata):
    named = dict(zip((LINEAR, CONV), modules, strict=False))
    return Adapter(kind_of(named), named, metadata, "kohya")


def tail(matrix, rank):
    """Squared singular values beyond a rank, from the eigenvalues of the Gram matrix."""
    values = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0)
    return values[rank:].sum().item(), values.sum().item()


@given(seeds, shapes, ranks, alphas, ranks)
def test_a_lower_rank_leaves_the_tail_of_singular_values(seed, shape, rank, alpha, wanted):
    """Eckart and Young: no matrix of this rank is nearer. A LoRA of that rank or less stays as it was, to the bit."""
    own = lora(seed, shape, rank, alpha)
    resized, kept = adapter_svd.resize(adapter_of(own), wanted)
    new, before = resized.modules[LINEAR], full(own, shape)
    missing, whole = tail(before.flatten(1), wanted)
    assert (before - full(new, shape)).square().sum().item() == pytest.approx(missing, abs=2e-5 * whole)
    assert 1 - kept["unet"].share == pytest.approx(missing / whole, abs=2e-5)
    if rank <= wanted:
        assert new is own or all(torch.equal(new[name], own[name]) for name in own)
    else:
        assert len(new["lora_down.weight"]) == min(wanted, *(before.flatten(1).shape))
        assert (new["alpha"] / len(new["lora_down.weight"])).item() == pytest.approx(alpha / rank, rel=1e-6)
        assert new["lora_down.weight"].shape[1:] == own["lora_down.weight"].shape[1:]
        assert new["lora_up.weight"].shape[2:] == own["lora_up.weight"].shape[2:]
    again, _ = adapter_svd.resize(resized, wanted)
    assert all(torch.equal(again.modules[LINEAR][name], new[name]) for name in new)


@given(seeds, shapes, ranks, st.floats(0.01, 1.0), ranks)
def test_energy_takes_the_least_rank_that_holds_it(seed, shape, rank, energy, most):
    own = lora(seed, shape, rank, 3.0)
    for limit in (None, most):
        resized, kept = adapter_svd.resize(adapter_of(own), limit, energy)
        chosen = len(resized.modules[LINEAR]["lora_down.weight"])
        update = full(own, shape).flatten(1)
        missing, whole = tail(update, chosen)
        assert chosen <= min(rank, limit or rank) and kept["unet"].ranks == [chosen]
        if chosen < (limit or rank) and chosen < min(update.shape):    # what was asked for is there, and one less would not do
            assert missing <= (1 - energy + 1e-5) * whole
        if chosen > 1:
            assert tail(update, chosen - 1)[0] >= (1 - energy - 1e-5) * whole


@given(seeds, shapes, st.lists(st.tuples(ranks, alphas, st.floats(-2.0, 2.0)), min_size=1, max_size=3), ranks)
def test_adapters_together_add_up(seed, shape, each, wanted):
    made = [lora(seed + 10 * number, shape, rank, alpha) for number, (rank, alpha, _) in enumerate(each)]
    weighted = [(adapter_of(own), weight) for own, (_, _, weight) in zip(made, each, strict=True)]
    want = sum(weight * full(own, shape) for own, (_, _, weight) in zip(made, each, strict=True))
    exact, kept = adapter_svd.combine(weighted)
    own = exact.modules[LINEAR]
    assert len(own["lora_down.weight"]) == sum(rank for rank, *_ in each) == kept["unet"].ranks[0] and kept["unet"].share == 1
    torch.testing.assert_close(full(own, shape), want, rtol=1e-5, atol=1e-4)
    low, kept = adapter_svd.combine(weighted, wanted)
    missing, whole = tail(want.flatten(1), wanted)
    assert (full(low.modules[LINEAR], shape) - want).square().sum().item() == pytest.approx(missing, abs=2e-5 * whole + 1e-8)


def test_only_the_modules_that_both_have_are_summed():
    one, two = lora(0, (4, 5), 2, 1.0), lora(5, (6, 5, 3, 3), 3, 2.0)
    exact, kept = adapter_svd.combine([(adapter_of(one, two), 0.5), (adapter_of(one), 2.0)])
    torch.testing.assert_close(full(exact.modules[LINEAR], (4, 5)), 2.5 * full(one, (4, 5)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full(exact.modules[CONV], (6, 5, 3, 3)), 0.5 * full(two, (6, 5, 3, 3)), rtol=1e-5, atol=1e-5)
    assert kept["unet"].ranks == [4, 3] and exact.kind == "lora"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> the adapter of such a UNet and its base, read back from kohya's file."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    kinds = ("lora", "dora", "loha", "lokr", "lokr-factor", "oft", "kohya", "lycoris-glora", "lycoris-full", "lycoris-loha-dora",
             "lycoris-tucker", "lycoris-both", "lycoris-half", "lycoris-norms")
    tucker = Settings("lycoris", lycoris_config=CONFIG | {"algo": "locon", "use_tucker": True})
    for kind, settings in [*((kind, KINDS[kind]) for kind in kinds), ("locon-tucker", tucker)]:
        unet = make_unet()
        adapters.add(unet, [], settings)
        path = adapter_files.save(folder / f"{kind}.safetensors", {"unet": with_noise(unet)}, settings, "kohya")
        found[kind] = adapter_files.read(path, unet.config)
    return found


def weights_of(unet):
    return {f"unet.{name}": module.weight for name, module in unet.named_modules() if getattr(module, "weight", None) is not None}


PLAIN = ["lora", "loha", "lokr", "lokr-factor", "kohya", "lycoris-tucker", "lycoris-both", "lycoris-half",
         "locon-tucker"]


@pytest.mark.parametrize("kind", PLAIN)
def test_at_full_rank_another_kind_is_the_same_as_lora(made, kind):
    adapter, weights = made[kind], weights_of(make_unet())
    for key, own in adapter.modules.items():
        assert not needs_base(own) and shape_of(key, own) == weights[key].shape
        size = delta(own, weights[key])[0].norm().item()
        assert adapter_svd.norm(key, own) == pytest.approx(size, rel=1e-4)
    resized, kept = adapter_svd.resize(adapter, 9999)
    summed, _ = adapter_svd.combine([(adapter, 1.0)], 9999, base=weights.__getitem__)
    assert resized.kind == summed.kind == "lora" and kept["unet"].share == 1
    assert (kept["unet"].turned > 0) == (kind not in ("lora", "kohya", "lycoris-half"))
    assert (resized.multiplier, summed.multiplier) == (adapter.multiplier, 1.0)
    for key, own in adapter.modules.items():
        want = delta(own, weights[key])[0]
        scale = dict(rtol=1e-3, atol=1e-5 + 1e-5 * want.norm().item())
        torch.testing.assert_close(full(resized.modules[key], want.shape).float(), want, **scale)
        torch.testing.assert_close(full(summed.modules[key], want.shape).float(), adapter.multiplier * want, **scale)


@pytest.mark.parametrize("kind", ["dora", "oft", "lycoris-glora", "lycoris-loha-dora"])
def test_what_depends_on_the_base_becomes_lora_with_it(made, kind):
    adapter, weights = made[kind], weights_of(make_unet())
    with pytest.raises(UserError, match="--base MODEL"):
        adapter_svd.combine([(made["lora"], 1.0), (adapter, 1.0)], 4)
    with pytest.raises(UserError, match="--rank N or --energy"):
        adapter_svd.combine([(made["lora"], 1.0), (adapter, 1.0)])
    summed, _ = adapter_svd.combine([(made["lora"], 0.5), (adapter, 2.0)], 9999, base=weights.__getitem__)
    assert summed.kind == "lora" and not summed.metadata
    for key, own in adapter.modules.items():
        want = 2 * delta(own, weights[key])[0]
        if key in made["lora"].modules:
            want = want + 0.5 * delta(made["lora"].modules[key], weights[key])[0]
        torch.testing.assert_close(full(summed.modules[key], want.shape).float(), want, rtol=1e-3,
                                   atol=1e-5 + 1e-5 * want.norm().item())
    assert all(adapter_svd.norm(key, own) is None for key, own in adapter.modules.items())


def test_a_lower_rank_of_dora_has_outputs_of_the_same_size(made):
    adapter, weights = made["dora"], weights_of(make_unet())
    resized, kept = adapter_svd.resize(adapter, 1)
    assert resized.kind == "dora" and resized.rank == 1 and 0.2 < kept["unet"].share < 1
    for key, own in resized.modules.items():
        assert torch.equal(own["dora_scale"], adapter.modules[key]["dora_scale"])
        before, after = (weights[key] + delta(each.modules[key], weights[key])[0] for each in (adapter, resized))
        torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after, before, atol=1e-4)
    for kind in ("oft", "lycoris-glora"):
        with pytest.raises(UserError, match="merge --base MODEL --rank N"):
            adapter_svd.resize(made[kind], 4)
    turned, _ = adapter_svd.resize(made["lycoris-loha-dora"], 9999)    # of another kind below the scale, too
    assert turned.kind == "dora"
    for key, own in turned.modules.items():
        want = delta(made["lycoris-loha-dora"].modules[key], weights[key])[0]
        torch.testing.assert_close(delta(own, weights[key])[0], want, rtol=1e-3, atol=1e-4)


def test_norms_stay_or_are_refused(made):
    resized, _ = adapter_svd.resize(made["lycoris-norms"], 2)
    norms = [key for key, own in resized.modules.items() if "w_norm" in own]
    assert norms and all(resized.modules[key] is made["lycoris-norms"].modules[key] for key in norms)
    full_matrices = made["lycoris-full"].modules
    for each in (made["lycoris-norms"], made["lycoris-full"]):
        with pytest.raises(UserError, match="norm or a bias.*--into"):
            adapter_svd.combine([(each, 1.0)], 4)
    with pytest.raises(UserError, match="norm or a bias.*--into"):
        adapter_svd.resize(made["lycoris-full"], 4)
    key = next(key for key, own in full_matrices.items() if "diff_b" in own)
    for own, names in ((full_matrices[key], ("diff", "diff_b")), (resized.modules[norms[0]], ("w_norm", "b_norm"))):
        assert adapter_svd.norm(key, own) == pytest.approx(torch.cat([own[name].flatten() for name in names]).norm().item())
    bare = {name: {"diff": own["diff"]} for name, own in full_matrices.items()}
    turned, kept = adapter_svd.resize(Adapter("lycoris", bare), 9999)
    assert turned.kind == "lora" and kept["unet"].turned == len(bare)
    for name, own in bare.items():
        torch.testing.assert_close(full(turned.modules[name], own["diff"].shape).float(), own["diff"], rtol=1e-3, atol=1e-5)
    wrong = lora(0, (4, 4), 2, 1.0)
    wrong["lora_up.weight"][0, 0] = float("nan")
    for call in (lambda: adapter_svd.resize(adapter_of(wrong), 1), lambda: adapter_svd.combine([(adapter_of(wrong), 1.0)])):
        with pytest.raises(UserError, match=f"{LINEAR} holds NaN"):
            call()
    with pytest.raises(UserError, match="different models"):
        adapter_svd.combine([(adapter_of(lora(0, (4, 4), 2, 1.0)), 1.0), (adapter_of(lora(0, (4, 6), 2, 1.0)), 1.0)])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base and a tuned model, whose UNets and text encoders differ in everything, each as a folder and as one file."""
    folder, networks = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate(("base", "tuned")):
        parts = networks[name] = dict(zip(("unet", "text_encoder", "text_encoder_2"), (make_unet(), *make_text_encoders()),
                                          strict=True))
        for network in parts.values():
            for at, parameter in enumerate(network.parameters()):
                parameter.data += number * 0.1 * draw(at, *parameter.shape)
        for part, network in parts.items():
            network.save_pretrained(folder / name / part)
        sgm = single_file.to_sgm({part: network.state_dict() for part, network in parts.items()}, parts["unet"].config)
        sgm = {key: tensor.contiguous().clone() for key, tensor in sgm.items()}
        safetensors.torch.save_file(sgm, folder / f"{name}.1.safetensors")
    return folder, networks


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("names", [("base", "tuned"), ("base.1.safetensors", "tuned.1.safetensors")], ids=" ".join)
def test_an_extract_of_full_rank_is_the_tuned_model(tuned, part, names):
    folder, networks = tuned
    base, want = networks["base"][part], networks["tuned"][part]
    targets = {name: 9999 for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    config = networks["base"]["unet"].config
    opened = [stored.open_part(folder / name, part, base, config) for name in names]
    with opened[0] as one, opened[1] as two:
        for name, parameter in base.named_parameters():
            assert torch.equal(one(name), parameter) and torch.equal(two(name), want.get_parameter(name))
        modules, kept, whole = adapter_svd.extract(part, base, one, two, targets)
        low, less, same = adapter_svd.extract(part, base, one, two, dict.fromkeys(targets, 2))
        least, _, _ = adapter_svd.extract(part, base, one, two, targets, 0.5)
    assert whole == same and 0 < less.kept < kept.kept == kept.total < whole and kept.share == 1
    assert whole == pytest.approx(sum((b - a).double().square().sum().item() for a, b in zip(
        base.parameters(), want.parameters(), strict=True)), rel=1e-5)
    assert modules.keys() == {adapter_files.text_name(f"{part}.{name}") for name in targets}
    for key, own in modules.items():
        name = re.sub(r"^\w+\.", "", key)
        name = name if name in targets else name.removeprefix("text_model.")
        change = want.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(full(own, change.shape).float(), change, rtol=1e-3, atol=1e-5)
        missing, size = tail(change.double().flatten(1), 2)
        assert (full(low[key], change.shape) - change).square().sum().item() == pytest.approx(missing, abs=1e-5 * size)
        rank = len(least[key]["lora_down.weight"])
        assert tail(change.double().flatten(1), rank)[0] <= 0.50001 * size


def test_what_does_not_change_is_left_out(tuned):
    folder, networks = tuned
    base = networks["base"]["unet"]
    with stored.open_part(folder / "base", "unet", base) as one:
        changed = "mid_block.attentions.0.proj_in"

        def two(name):
            return one(name) + 1 if name == f"{changed}.weight" else one(name)
        modules, kept, whole = adapter_svd.extract("unet", base, one, two, {changed: 4, "mid_block.attentions.0.proj_out": 4})
    assert modules.keys() == {f"unet.{changed}"} and kept.ranks == [4]
    assert whole == pytest.approx(base.get_parameter(f"{changed}.weight").numel(), rel=1e-5) and kept.share == pytest.approx(1)


def test_models_of_other_architectures_are_refused(tuned, tmp_path):
    folder, networks = tuned
    state = networks["base"]["unet"].state_dict()
    first, last = list(state)[0], list(state)[-1]
    for changes, words in (({first: torch.zeros(3, 3)}, rf"unet\.{re.escape(first)} is \(3, 3\) instead of"), (
            {last: None}, f"has no {re.escape(last)}"), ({"up_blocks.9.x": torch.zeros(1)}, "also has up_blocks")):
        other = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        (tmp_path / "unet").mkdir(exist_ok=True)
        safetensors.torch.save_file(other, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match=f"another architecture.*{words}"), \
                stored.open_part(tmp_path, "unet", networks["base"]["unet"]):
            pass
    with pytest.raises(UserError, match="no weights of the vae"), stored.tensors_of(folder / "base", "vae"):
        pass
