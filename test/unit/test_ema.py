"""The average of weights against diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from library.diffusion.ema import EMA


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))


def move(net: torch.nn.Module, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("most", [0.9999, 0.7, 0.0])
def test_fifty_updates_are_those_of_diffusers(most):
    net = network()
    ours, theirs = EMA(net, most), EMAModel(net.parameters(), decay=most)
    for step in range(1, 51):
        move(net, step)
        ours.update(net)
        theirs.step(net.parameters())
        assert ours.decay() == theirs.cur_decay_value
        if step == 1:    # the first update copies
            assert all(torch.equal(average, p) for average, p in zip(ours.averages.values(), net.parameters(), strict=True))
        for average, shadow in zip(ours.averages.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, shadow, rtol=1e-6, atol=1e-7)
    assert ours.updates == theirs.optimization_step == 50


def test_the_decay_is_the_closed_form():
    net = network()
    average = EMA(net, 0.9999)
    seen = []
    for _ in range(12):
        average.update(net)
        seen.append(average.decay())
    assert seen == [0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18, 10 / 19, 11 / 20, 12 / 21]
    average.updates = 10**6
    assert average.decay() == 0.9999


def test_the_average_of_bfloat16_weights_is_float32():
    """A decay near 1 moves the average by less than bfloat16 can hold."""
    net = network().bfloat16()
    average = EMA(net, 0.9999)
    average.updates = 10**6
    before = {name: value.clone() for name, value in average.averages.items()}
    move(net, 1)
    average.update(net)
    for (name, value), p in zip(average.averages.items(), net.parameters(), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[name] + 1e-4 * (p.detach().float() - before[name]), rtol=1e-6, atol=1e-7)


def test_the_network_holds_the_averages_only_within():
    net = network()
    average = EMA(net, 0.9)
    for step in range(5):
        move(net, step)
        average.update(net)
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    with average.applied(net):
        assert all(torch.equal(p, average.averages[name]) for name, p in net.named_parameters())
        assert not torch.equal(net[0].weight, own["0.weight"])
    assert all(torch.equal(p, own[name]) for name, p in net.named_parameters())
    with pytest.raises(RuntimeError, match="drawing failed"), average.applied(net):
        raise RuntimeError("drawing failed")
    assert all(torch.equal(p, own[name]) for name, p in net.named_parameters())


def test_an_average_that_was_saved_goes_on_bit_by_bit(tmp_path):
    net = network()
    whole = EMA(net, 0.9999)
    for step in range(1, 8):
        move(net, step)
        whole.update(net)
        if step == 4:
            save_file(whole.averages, tmp_path / "ema.safetensors")
    other = network()
    for step in range(1, 5):
        move(other, step)
    resumed = EMA(network(seed=5), 0.9999)
    resumed.load(load_file(tmp_path / "ema.safetensors"), 4)
    for step in range(5, 8):
        move(other, step)
        resumed.update(other)
    assert resumed.updates == 7
    assert all(torch.equal(value, whole.averages[name]) for name, value in resumed.averages.items())
