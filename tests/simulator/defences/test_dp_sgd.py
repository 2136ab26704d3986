"""The ε of DP-SGD, by brute force: exact densities of what two neighbouring batches send."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from scipy.integrate import trapezoid
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedtap.simulator.defences.accountant import Gaussian, mechanism_of
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.defences.gaussian import epsilon_of
from fedtap.simulator.defences.notation import described
from fedtap.simulator.federation.guarantees import ADJACENCY

CLIP, MULTIPLIER, DELTA = 0.5, 1.0, 1e-5
ALONG = torch.tensor([-1.0, 1.0]) / math.sqrt(2)


def softmax() -> nn.Module:
    """One pixel and two classes at zero weights, where the classes' gradients are opposite: one number tells all."""
    linear = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), linear)


def sent(labels: list[int], multiplier: float, seed: int = 0) -> float:
    """What a client with a bright image of each of these labels sends, along the direction of its gradient."""
    images, draw = torch.full((1, len(labels), 1, 1, 1), 100.0), torch.Generator().manual_seed(seed)
    gradients = DPSGD(CLIP, multiplier).stacked(softmax(), images, torch.tensor([labels]), [draw])["1.weight"]
    return float(gradients.flatten() @ ALONG)


def apart(one: tuple[float, float], other: tuple[float, float], epsilon: float) -> float:
    """The larger δ of the two directions: ∫ max(0, p - e^ε q) of Gaussians of these means and deviations."""
    reach = 12 * max(one[1], other[1])
    at = np.linspace(min(one[0], other[0]) - reach, max(one[0], other[0]) + reach, 40_001)
    p, q = (norm.pdf(at, *law) for law in (one, other))
    scale = math.exp(epsilon)
    return max(float(trapezoid(np.maximum(0, a - scale * b), at)) for a, b in ((p, q), (q, p)))


def law(labels: list[int]) -> tuple[float, float]:
    """Mean and standard deviation of what is sent."""
    mean, spread = sent(labels, 0.0), MULTIPLIER * CLIP / len(labels)
    for seed in range(3):
        standard = float(torch.randn(2, 1, generator=torch.Generator().manual_seed(seed)).flatten() @ ALONG)
        assert sent(labels, MULTIPLIER, seed) == pytest.approx(mean + spread * standard, abs=1e-6)
    return mean, spread


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_epsilon_holds_where_an_example_is_replaced_and_is_as_small_as_can_be(batch: int) -> None:
    mechanism = mechanism_of(described(f"dp_sgd({CLIP}, {MULTIPLIER})"), ADJACENCY)
    assert (mechanism.protects, mechanism.adjacency, mechanism.sensitivity) == ("example", "replace", 2 * CLIP)
    rest, epsilon = [0] * (batch - 1), mechanism.guarantee(DELTA).epsilon
    assert apart(law([*rest, 0]), law([*rest, 1]), epsilon) == pytest.approx(DELTA, rel=1e-3)


@pytest.mark.parametrize("batch", [2, 5])
def test_the_epsilon_of_add_or_remove_does_not_hold(batch: int) -> None:
    """The scale of the noise tells how many examples there are."""
    claimed = Gaussian(MULTIPLIER * CLIP, CLIP, "example", "add/remove").guarantee(DELTA).epsilon
    assert claimed == pytest.approx(epsilon_of(1 / MULTIPLIER, DELTA))
    rest = [0] * (batch - 1)
    assert apart(law([*rest, 0]), law(rest), claimed) > 1.5 * DELTA, "it has the same mean, and another spread"
    assert apart(law([*rest, 1]), law(rest), claimed) > 100 * DELTA


def test_a_replaced_example_moves_what_is_sent_by_two_clips_and_leaves_the_noise() -> None:
    for seed in range(3):
        noise = [sent(labels, MULTIPLIER, seed) - sent(labels, 0.0) for labels in ([0, 0, 0], [0, 1, 0])]
        assert noise[0] == pytest.approx(noise[1], abs=1e-6)
    assert abs(sent([0, 0, 0], 0.0) - sent([0, 1, 0], 0.0)) == pytest.approx(2 * CLIP / 3)


@pytest.mark.filterwarnings("ignore:Secure RNG")
@pytest.mark.parametrize("drop_last", [False, True])
def test_opacus_divides_by_a_number_that_tells_neighbours_apart(drop_last: bool) -> None:
    """What DPSGD's docstring says of `make_private`; where this fails Opacus has mended it."""
    divisors = []
    for examples in (15, 16, 17):
        network = nn.Linear(2, 1)
        loader = DataLoader(TensorDataset(torch.zeros(examples, 2)), batch_size=8, drop_last=drop_last)
        optimiser = PrivacyEngine(accountant="rdp").make_private(
            module=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
            data_loader=loader,
            noise_multiplier=MULTIPLIER,
            max_grad_norm=CLIP,
        )[1]
        divisors.append(optimiser.expected_batch_size)
    assert divisors == ([15, 8, 8] if drop_last else [7, 8, 5])
