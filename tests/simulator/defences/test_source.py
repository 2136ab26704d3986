"""Where noise comes from: the operating system's bytes alone, on a grid; in a simulation a seed, as it always did."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedtap.simulator.defences import source
from fedtap.simulator.defences.accountant import flower_local_dp
from fedtap.simulator.defences.chained import Chain
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import Update
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.defences.laplace import Laplace
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.quantise import Quantise
from fedtap.simulator.models.registry import build

RANDOM = (Noise(0.3), Laplace(0.2), Quantise(3), LocalDP(1.0, 2.0, 8.0, 1e-5), Chain((Clip(1.0), Noise(0.1))))
GRADIENT = {"b": torch.linspace(-1, 1, 60).view(3, 20), "a": torch.linspace(0, 2, 7)}


def system(patch: pytest.MonkeyPatch, seed: int, change: Callable[[bytes], bytes] = bytes) -> list[int]:
    """Let the operating system's bytes be these; how many it is asked for is noted in the list."""
    draw, asked = np.random.default_rng(seed), list[int]()

    def urandom(size: int) -> bytes:
        asked.append(size)
        return change(draw.bytes(size))

    patch.setattr(source, "os", SimpleNamespace(urandom=urandom))
    return asked


def inside(defence: Update | DPSGD, draw: source.Source = None) -> list[Tensor]:
    """What a defence of either kind makes of one gradient."""
    if isinstance(defence, Update):
        return list(defence(GRADIENT, draw).values())
    net, images = build("mlp", (1, 8, 8), 4, seed=1), torch.linspace(0, 1, 128).view(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    defence.backward(net, images, labels, draw)
    stacked = defence.stacked(net, images[None], labels[None], [draw])
    return [*(parameter.grad for parameter in net.parameters() if parameter.grad is not None), *stacked.values()]


@pytest.mark.parametrize("defence", [*RANDOM, DPSGD(0.5, 2.0)], ids=repr)
def test_noise_follows_the_operating_system_alone(defence: Update | DPSGD) -> None:
    found = []
    for seed, others in ((0, 1), (0, 2), (1, 1)):
        with pytest.MonkeyPatch.context() as patch:
            asked = system(patch, seed)
            torch.manual_seed(others)
            np.random.seed(others)
            before, state = torch.get_rng_state(), np.random.get_state()[1]
            found.append(inside(defence))
            assert torch.equal(before, torch.get_rng_state())
            assert np.array_equal(np.asarray(state), np.asarray(np.random.get_state()[1]))
            assert sum(asked) >= 8 * sum(tensor.numel() for tensor in found[-1]), "fewer than 53 bits an entry"
    same, again, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in found)
    assert torch.equal(same, again), "another generator than the system's has a say"
    assert not torch.equal(same, other)
    if not isinstance(defence, Quantise):
        assert not torch.isclose(same, other, rtol=0, atol=1e-7).all()


def test_there_is_no_state_behind_the_noise() -> None:
    """Another byte of one entry's leaves all other entries' noise alone: no seed is there to find."""
    x = torch.zeros(50, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        system(patch, 0)
        plain = source.gaussian(x, 1.0, None)
        system(patch, 0, lambda drawn: drawn[: 8 * 17 + 7] + bytes([drawn[8 * 17 + 7] ^ 64]) + drawn[8 * 17 + 8 :])
        assert (source.gaussian(x, 1.0, None) != plain).nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize(
    ("noise", "law"),
    [
        (lambda x: source.gaussian(x, 0.3, None), stats.norm(scale=0.3)),
        (lambda x: source.laplace(x, 0.3, None), stats.laplace(scale=0.3)),
        (lambda x: source.uniform(x.shape, None) - x, stats.uniform()),
        (
            lambda x: LocalDP(1.0, 2.0, 8.0, 1e-5)({"x": x}, None)["x"],
            stats.norm(scale=flower_local_dp(1.0, 2.0, 8.0, 1e-5, "replace").sigma),
        ),
    ],
    ids=["gaussian", "laplace", "uniform", "local_dp"],
)
def test_the_systems_noise_has_its_law(
    noise: Callable[[Tensor], Tensor], law: stats.distributions.rv_frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(monkeypatch, 5)
    drawn = noise(torch.zeros(100_000, dtype=torch.float64)).numpy()
    assert drawn.mean() == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(len(drawn)))
    assert drawn.std() == pytest.approx(law.std(), rel=0.02)
    assert stats.kstest(drawn, law.cdf).pvalue > 0.01


def test_local_dp_of_a_real_client_clips_as_flowers_mod_does() -> None:
    for scale in (0.0, 0.1, 10.0):
        x = {name: scale * tensor for name, tensor in GRADIENT.items()}
        loud, exact = LocalDP(0.5, 1.0, 1e9, 1e-5), torch.Generator().manual_seed(0)
        torch.testing.assert_close(loud(x, None), loud(x, exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [source.gaussian, source.laplace])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1e-9])
def test_all_values_lead_to_the_same_numbers(kind: Callable[..., Tensor], scale: float) -> None:
    """Mironov's attack tells two values apart by the numbers that only one of them can lead to."""
    grid = 2.0 ** (math.floor(math.log2(scale)) - source.FINE)
    for value in (0.0, 0.1, 1 / 3, -1000 * scale):
        sent = kind(torch.full((200,), value, dtype=torch.float64), scale, None)
        steps = sent / grid
        assert torch.equal(steps, steps.round())
        assert len(sent.unique()) == 200
        assert ((sent - value).abs() < 20 * scale).float().mean() > 0.99


def test_the_rarest_bytes_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\0", b"\xff"):
        monkeypatch.setattr(source, "os", SimpleNamespace(urandom=lambda size, byte=byte: size * byte))
        assert 0 < float(source.uniform((), None)) < 1
        assert abs(float(source.gaussian(torch.tensor(0.0), 1.0, None))) == pytest.approx(2 * 8.2095, abs=1e-3)
        assert source.laplace(torch.zeros(3), 1.0, None).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 5e-324, 1e-300, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_scale_keeps_the_dtype_and_no_tiny_one_moves(scale: float, dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -0.25, 3.0], dtype=dtype)
    for kind in (source.gaussian, source.laplace):
        sent = kind(x, scale, None)
        assert sent.dtype == dtype
        assert not sent.isnan().any()
        assert torch.equal(sent, x) == (scale < 1e-20)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_a_seed_draws_what_it_always_drew() -> None:
    """The recorded tables rest on it, to the bit."""
    x = torch.linspace(-1, 1, 60).view(3, 20)
    assert torch.equal(source.gaussian(x, 0.3, seeded()), x + 0.3 * torch.randn(3, 20, generator=seeded()))
    two = torch.empty(2, 3, 20).exponential_(generator=seeded())
    assert torch.equal(source.laplace(x, 0.3, seeded()), x + 0.3 * (two[0] - two[1]))
    assert torch.equal(source.uniform((3, 20), seeded()), torch.rand(3, 20, generator=seeded()))
    draw, wanted = seeded(), {}
    for name in sorted(GRADIENT):
        wanted[name] = GRADIENT[name] + 0.3 * torch.randn(GRADIENT[name].shape, generator=draw)
    sent = Noise(0.3)(GRADIENT, seeded())
    assert all(torch.equal(sent[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("draw", [seeded, lambda: None], ids=["seeded", "system"])
def test_quantise_rounds_up_as_often_as_the_rest_says(
    bits: int, draw: Callable[[], source.Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the mean of many is the value; to the nearest, entries at a fifth of a step would be off by as much."""
    system(monkeypatch, 0)
    many, step = 4000, 1 / (2**bits - 1)
    values = torch.tensor([0.0, 0.2, 0.45, 0.5, 0.7, 0.95]) * step
    entries = torch.cat([values, torch.ones(1)]).double()
    sent = Quantise(bits)({"a": entries.repeat(many, 1)}, draw())["a"]
    rest = (entries / step).frac()
    error = 5 * step * (rest * (1 - rest) / many).sqrt() + 1e-9
    assert ((sent.mean(0) - entries).abs() <= error).all()
    torch.testing.assert_close(sent.var(0), step**2 * rest * (1 - rest), rtol=0.2, atol=1e-9)
