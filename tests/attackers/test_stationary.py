"""Training data from trained weights: sums against autograd, the federation, what hides data, and bad input."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedtap.attackers.checkpoints import stationary_mmd
from fedtap.attackers.checkpoints.stationary_mmd import (
    StationaryMMD,
    Terms,
    flattened,
    recombined,
    regulariser_gradient,
    unexplainable,
)
from fedtap.clients.stationary import Training
from fedtap.scenarios.checkpoints.fedprox import FedProx
from fedtap.scenarios.checkpoints.stationary import Case
from fedtap.simulator import scores
from fedtap.simulator.attack import generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Protocol, Tensors, TrainedWeightsLeak, load
from fedtap.simulator.models.registry import build
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.scenario import Row
from tests.support.played import play

SMALL = Case(width=24, examples=3, features=4)
QUICK = StationaryMMD(restarts=5, rounds=2, steps=20)


def leaked(case: Case, clients: int = 2, seed: int = 0) -> TrainedWeightsLeak:
    """What so many clients of a case send, without a federation."""
    broadcast = {name: value.detach() for name, value in case.network(seed).named_parameters()}
    training = Training(Regulariser.parse(case.regulariser), case.training)
    trained = [training(case.network(), broadcast, *case.private(seed, client))[0] for client in range(clients)]
    names = torch.arange(clients)
    return TrainedWeightsLeak(
        observed={name: torch.stack([own[name] for own in trained]) for name in broadcast},
        protocol=Protocol(case.model, (case.features,), 2, case.examples, prior=case.regulariser),
        network=case.network(),
        weights=broadcast,
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )


def recovered(guess_of: int, truth_of: int, case: Case, guess: object, seed: int = 0) -> float:
    points, weights = guess.points[guess_of], guess.weights[guess_of]  # type: ignore[attr-defined]
    return float((scores.matched_distances(points, weights, case.private(seed, truth_of)[0]) < 0.01).double().mean())


def played(tmp_path: Path, case: Case, attack: StationaryMMD = QUICK, victims: int = 2) -> list[Row]:
    setting = FedProx(name="fedprox", attack=attack.written(), victims=victims, **dataclasses.asdict(case))
    return play([setting], tmp_path / "out")


def test_the_points_pull_as_their_losses_do() -> None:
    """Oracle: autograd on the weighted cross-entropy, a point at a time; three classes, two victims, two starts."""
    network = build("mlp(width=5, activation='tanh')", (4,), 3, seed=0).double()
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(2, *value.shape, generator=draw, dtype=torch.float64)
        for name, value in network.named_parameters()
    }
    points = torch.randn(2, 2, 3, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (2, 2, 3), generator=draw)
    mass = torch.rand(2, 2, 3, generator=draw, dtype=torch.float64)
    terms = Terms(build("mlp(width=5, activation='tanh')", (4,), 3), (4,), 3)
    for victim in range(2):
        own = {name: value[victim].requires_grad_() for name, value in weights.items()}
        for start in range(2):
            logits = functional_call(network, own, (points[victim, start],))
            loss = (mass[victim, start] * F.cross_entropy(logits, labels[victim, start], reduction="none")).sum()
            expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(own.values()))])
            slopes = mass[victim, start][:, None] * (logits.softmax(1) - F.one_hot(labels[victim, start], 3))
            unknowns = torch.cat([points[victim, start], slopes.detach() @ terms.basis], 1)
            stacked = {name: value[victim : victim + 1].detach() for name, value in weights.items()}
            torch.testing.assert_close(terms.sums(stacked, unknowns[None, None])[0, 0], expected)


def test_their_derivatives_are_those_of_finite_differences() -> None:
    leak = leaked(SMALL, 1)
    terms = Terms(leak.network, (4,), 2)
    here = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = terms.jacobian(leak.observed, here)[0, 0]
    for place in range(10):
        step = torch.zeros(10, dtype=torch.float64)
        step[place] = 1e-6
        ahead, behind = (terms.sums(leak.observed, here + sign * step.view_as(here))[0, 0] for sign in (1, -1))
        torch.testing.assert_close(found[place], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


def test_recombined_starts_pick_the_true_points_from_different_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    leak, (truth, _) = leaked(SMALL, 1), SMALL.private(0, 0)
    terms, slope = Terms(leak.network, (4,), 2), flattened(regulariser_gradient(leak))
    found = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for place in range(3):  # each start has found one of them
        found[0, place, place, :4] = truth[place]
    fresh = torch.zeros(1, 3, 1, 5, dtype=torch.float64)
    whitener = QUICK._whitener(terms, leak.observed, SMALL.public(0)[0])
    monkeypatch.setattr(stationary_mmd, "PICKED", (1.0, 1.0))  # from all
    made = recombined(terms, leak.observed, slope, whitener, found, fresh, 1)
    assert torch.equal(made[:, 0], found[:, 0])
    assert float((slope[:, None] + terms.sums(leak.observed, made[:, 1:])).norm(dim=-1).max() / slope.norm()) < 1e-5
    assert sorted(made[0, 1, :3, 0].tolist()) == pytest.approx(sorted(truth[:, 0].tolist()))


def test_a_federations_trained_weights_give_the_data_back(tmp_path: Path) -> None:
    rows = played(tmp_path, SMALL)
    assert [row["client"] for row in rows] == [0, 1]
    for row in rows:
        assert row["recovered"] == 1
        assert row["blind"] == 0
        assert row["distance"] < 1e-4
        assert row["explained"]
        assert row["left"] < 1e-8
        assert row["unexplainable"] < 1e-7
    leak = load(tmp_path / "out/leaks/part_0.safetensors", build)
    assert isinstance(leak, TrainedWeightsLeak)
    guess = QUICK(leak)
    for client in range(2):
        labels = SMALL.private(0, client)[1]
        assert recovered(client, client, SMALL, guess) == 1
        assert recovered(client, 1 - client, SMALL, guess) == 0  # a stranger's leak
        heavy = guess.weights[client] > 0.5
        assert sorted(guess.targets[client][heavy].tolist()) == sorted(labels.tolist())
        torch.testing.assert_close(guess.weights[client][heavy], torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_victim_fares_as_it_does_alone() -> None:
    leak = leaked(SMALL)
    quick = StationaryMMD(restarts=3, rounds=2, steps=4)
    both = quick(leak)
    for victim in range(2):
        alone = quick(leak[victim])
        torch.testing.assert_close(both.points[victim], alone.points[0], rtol=0, atol=1e-5)
    assert torch.equal(quick(leak).points, both.points)


def test_more_rounds_never_leave_more() -> None:
    leak = leaked(dataclasses.replace(SMALL, width=6, examples=4))
    costs = [StationaryMMD(restarts=3, rounds=rounds, steps=5)(leak).objective for rounds in (1, 2, 4)]
    assert bool((costs[2] < costs[0]).all())


def test_a_training_that_stopped_early_is_told_and_shows_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no stationary point under fedprox.*has not trained to the end"):
        rows = played(
            tmp_path, dataclasses.replace(SMALL, training="adam"), StationaryMMD(restarts=3, rounds=1, steps=20)
        )
    for row in rows:
        assert row["recovered"] == 0
        assert not row["explained"]
        assert row["left"] > 0.01
        assert row["unexplainable"] > 1e-3
        assert row["residual"] >= row["unexplainable"]  # no points could do better


def test_weight_decay_brings_the_first_layer_to_rank_1_and_hides_the_data(tmp_path: Path) -> None:
    case = dataclasses.replace(SMALL, examples=6, regulariser="weight_decay(0.5)")
    for row in played(tmp_path, case):
        assert row["recovered"] == 0
        assert row["layer_rank"] == 1
        assert row["explained"]  # a residual of zero is no reconstruction


class Squared(nn.Module):
    """``a' max(W x, 0)²``: homogeneous, and smooth, so that its trainings end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 24, bias=False), nn.Linear(24, 2, bias=False)

    def forward(self, points: Tensor) -> Tensor:
        return self.last(self.first(points).relu().square())  # type: ignore[no-any-return]


def test_a_training_goes_on_while_it_gets_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.clients.stationary.AT_ONCE", 30)  # twice as many steps leave 1e-4
    torch.manual_seed(0)
    broadcast = {name: value.detach().double() for name, value in Squared().named_parameters()}
    _, left = Training(Regulariser("weight_decay", 1e-2))(Squared(), broadcast, *SMALL.private(0, 0))
    assert left < 1e-5


def test_haims_form_explains_a_homogeneous_networks_weights_and_not_by_the_private_points() -> None:
    """Its first layer has rank 2, for two classes, so two of the four features can be anything."""
    torch.manual_seed(0)
    broadcast = {name: value.detach().double() for name, value in Squared().named_parameters()}
    inputs, labels = SMALL.private(0, 0)
    trained, left = Training(Regulariser("weight_decay", 1e-2))(Squared(), broadcast, inputs, labels)
    assert left < 1e-6
    name = torch.zeros(1, dtype=torch.long)
    leak = TrainedWeightsLeak(
        observed={key: value[None] for key, value in trained.items()},
        protocol=Protocol("squared", (4,), 2, 3, prior="max_margin"),
        network=Squared().to("meta"),
        weights=broadcast,
        buffers={},
        clients=name,
        rounds=name,
        restarts=name,
    )
    guess = StationaryMMD(restarts=6, rounds=3, steps=30)(leak)
    assert float(guess.objective) ** 0.5 < 1e-3
    assert int(torch.linalg.matrix_rank(trained["first.weight"], rtol=1e-6)) == 2
    assert float(scores.matched_distances(guess.points[0], torch.ones(4), inputs).min()) > 0.01
    logits = functional_call(Squared(), trained, (inputs,))
    slopes = (logits.softmax(1) - F.one_hot(labels, 2)) / 1e-2  # the KKT multipliers, by the training's stationarity
    terms = Terms(leak.network, (4,), 2)
    rest = (
        flattened(regulariser_gradient(leak))
        + terms.sums(leak.observed, torch.cat([inputs, slopes @ terms.basis], 1)[None, None])[:, 0]
    )
    assert float(rest.norm() / flattened(regulariser_gradient(leak)).norm()) < 1e-5


def test_no_points_explain_what_is_of_too_high_a_rank() -> None:
    leak = leaked(SMALL)
    noise = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator(name), dtype=value.dtype)
        for name, value in leak.observed.items()
    }
    drift_norm = dataclasses.replace(leak, observed=noise)
    assert float(unexplainable(leak).max()) < 1e-7
    assert float(unexplainable(drift_norm).min()) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guess = StationaryMMD(restarts=2, rounds=1, steps=5)(drift_norm)
    assert bool((guess.objective.sqrt() >= unexplainable(drift_norm)).all())
    idle = dataclasses.replace(
        leak, observed={name: value.expand(2, *value.shape).double() for name, value in weights_of(leak).items()}
    )
    with pytest.raises(FedtapError, match=r"client 0 are at the minimum of fedprox.*let the client train"):
        QUICK(idle)


def weights_of(leak: Leak) -> Tensors:
    assert leak.weights is not None
    return leak.weights


def test_leaks_that_cannot_be_used_are_refused() -> None:
    leak = leaked(SMALL, 1)
    first = next(iter(leak.observed))
    broken = dict(leak.observed) | {first: leak.observed[first] * math.nan}
    with pytest.raises(FedtapError, match="holds NaN or infinity"):
        QUICK(dataclasses.replace(leak, observed=broken))
    with pytest.raises(FedtapError, match="starting point holds NaN"):
        QUICK(leak, start=QUICK.begin(leak.repeat(6), 0) * math.nan)
    with pytest.raises(FedtapError, match="does not know them"):
        QUICK(dataclasses.replace(leak, weights=None))
    protocol = dataclasses.replace(leak.protocol, classes=1)
    with pytest.raises(FedtapError, match="use one with two classes"):
        QUICK(dataclasses.replace(leak, protocol=protocol))
    protocol = dataclasses.replace(leak.protocol, prior="flat")
    with pytest.raises(FedtapError, match="'flat' is none that is known"):
        QUICK(dataclasses.replace(leak, protocol=protocol))
    with pytest.raises(FedtapError, match="whole number from 1"):
        StationaryMMD(restarts=0)


def test_trainings_that_cannot_end_are_refused() -> None:
    inputs, labels = SMALL.private(0, 0)
    broadcast = {name: value.detach() for name, value in SMALL.network(0).named_parameters()}
    with pytest.raises(FedtapError, match="NaN or infinity"):
        Training(Regulariser("fedprox", 0.05))(SMALL.network(), broadcast, inputs * math.inf, labels)
    with pytest.raises(FedtapError, match="never arrives"):
        Training(Regulariser("max_margin"))
    with pytest.raises(FedtapError, match="write weight_decay"):
        FedProx(regulariser="max_margin")
    for attack in ("idlg", "posterior_mmd", "stationary_mmd,dager"):
        with pytest.raises(FedtapError, match="write stationary_mmd"):
            FedProx(attack=attack)


@given(st.sampled_from(["fedprox", "weight_decay"]), st.floats(1e-12, 1e6))
def test_a_regulariser_is_read_as_it_is_written(name: str, strength: float) -> None:
    assert Regulariser.parse(str(Regulariser(name, strength))) == Regulariser(name, strength)


@pytest.mark.parametrize("text", ["", "flat", "fedprox", "fedprox()", "fedprox(x)", "weight_decay(0)", "fedprox(-1)",
                                  "fedprox(nan)", "max_margin(1)", "fedprox(1)+fedprox(1)"])  # fmt: skip
def test_other_regularisers_are_refused(text: str) -> None:
    with pytest.raises(FedtapError, match=r"fedprox|number over 0"):
        Regulariser.parse(text)


def test_an_examples_distance_is_to_the_point_that_is_matched_to_it() -> None:
    truth = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    points = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.0, 2.0]])
    weights = torch.tensor([1.0, 1.0, 1e-3])  # the third stands for no example
    torch.testing.assert_close(scores.matched_distances(points, weights, truth), torch.tensor([0.1, 0.5]))
    assert scores.matched_distances(points[:1], weights[:1], truth).tolist() == pytest.approx([0.1, 1.0])
    assert scores.matched_distances(points[:0], weights[:0], truth).tolist() == [1, 1]
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # one point is no two examples
    assert sorted(scores.matched_distances(points[:1], weights[:1], twice).tolist()) == pytest.approx([0.1, 1.0])
