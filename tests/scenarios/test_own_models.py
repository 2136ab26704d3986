"""Models of one's own: each gives rows, or one sentence with the true cause."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtap.attackers.gradients.gauss_newton import GaussNewton
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.linear import Linear
from fedtap.attackers.parts.gradients import check_match
from fedtap.simulator.attack import draw
from fedtap.simulator.data import vision
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.federation.rounds import Heard, play
from fedtap.simulator.leaks import Leak, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.captured import leak
from tests.simulator.test_federation import BASE, federation
from tests.support.own_models import Positions, Tied

NONE, DP = "none", "dp_sgd(1.0, 0.1)"


def played(model: str, defence: str) -> tuple[Heard, PrivateData]:
    """A round of one client with this model."""
    about = {"model": f"tests.support.own_models:{model}", "defence": defence, "victims": 1, "clients": 1, "size": 8}
    scenario = dataclasses.replace(BASE, **about)  # type: ignore[arg-type]
    grid, private = federation(scenario, clients=1)
    return play(scenario, grid, private), private


def heard(model: str, defence: str) -> Leak:
    """What the client sends, or why it cannot."""
    found, private = played(model, defence)
    return stack([found.leaks[name] for name in private.names()])


@pytest.mark.parametrize(
    ("model", "defence"),
    [
        *((model, NONE) for model in ("FusedAttention", "MultiHead", "Encoder", "Recurrent", "Spectral", "Positions")),
        *((model, NONE) for model in ("Tied", "InPlace", "InPlaceByHand", "Unused", "Fixed")),
        *((model, DP) for model in ("FusedAttention", "Tied", "InPlace", "Unused", "Fixed", "private")),
    ],
)
def test_an_unusual_model_is_attacked(model: str, defence: str) -> None:
    torch.manual_seed(0)
    found = heard(model, defence)
    attack = IDLG(steps=3)
    attack.accepts(found)
    guess = attack(found)
    assert guess.objective.isfinite().all()
    before = attack(found, start=draw(found, 0, "uniform")).objective
    assert torch.equal(guess.objective, before), "the model keeps something from one evaluation to the next"
    assert float(guess.objective) <= float(dataclasses.replace(attack, steps=1)(found).objective)
    if model == "Unused":
        assert bool(found.observed["unused.weight"].any()) == (defence == DP), "only noise moves it"


@pytest.mark.parametrize(
    ("model", "defence", "said"),
    [
        ("Gated", NONE, "nn.GRU is not written for that: use nn.LSTM"),
        ("MultiHead", DP, "nn.MultiheadAttention.*ModuleValidator.fix"),
        ("Recurrent", DP, "nn.LSTM.*ModuleValidator.fix"),
        ("Spectral", DP, "Opacus does.*use a model without this layer"),
        ("Probabilities", NONE, "no nn.Linear of it yields its 8 logits as they are"),
        ("Probabilities", "soteria(0.5)", "no nn.Linear of this model with a weight of its own does"),
        ("Probabilities", "precode(4)", "yields the logits, and there is none"),
        ("nothing", NONE, "cannot be imported"),
    ],
)
def test_a_model_that_cannot_be_attacked_is_told_why(model: str, defence: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as caught:
        IDLG().accepts(heard(model, defence))
    assert "BatchNorm" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_a_client_that_opacus_fails_says_so() -> None:
    found, _ = played("InPlaceByHand", DP)
    assert not found.leaks
    assert "which Opacus cannot take of this model" in found.why_missing(0, 1)


def test_second_derivatives_of_fused_attention_are_had_by_every_attack() -> None:
    assert GaussNewton(steps=1)(heard("FusedAttention", NONE)).images.isfinite().all()


def test_shared_weights_and_whole_numbers_survive_without_values() -> None:
    tied, placed = (
        build("tests.support.own_models:Tied", (3, 8, 8), 8),
        build("tests.support.own_models:Positions", (3, 8, 8), 8),
    )
    assert isinstance(tied, Tied)
    assert tied.one.weight is tied.other.weight
    assert tied.one.weight.is_meta
    assert isinstance(placed, Positions)
    assert torch.equal(placed.places, torch.arange(8))
    found = heard("Positions", NONE)
    found.network.register_buffer("places", torch.empty(8, dtype=torch.long, device="meta"))
    with pytest.raises(FedtapError, match="keeps places, a buffer of whole numbers"):
        check_match(found)


def test_a_model_of_one_size_alone_is_held_against_the_images() -> None:
    with pytest.raises(FedtapError, match=r"it returns \(2, 8\) for two images, not \(2, 5\)"):
        build("tests.support.own_models:Fixed", (3, 8, 8), 5)
    with pytest.raises(FedtapError, match="shapes cannot be multiplied"):
        build("tests.support.own_models:Fixed", (3, 9, 9), 8)


def test_a_users_torchvision_is_mended_like_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import sys\nif not hasattr(sys, 'mended'):\n    raise RuntimeError('torchvision::nms does not exist')\n"
    (tmp_path / "with_vision.py").write_text(f"{text}from tests.support.own_models import Fixed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(vision, "torchvision", lambda: monkeypatch.setattr(sys, "mended", True, raising=False))
    assert isinstance(build("with_vision:Fixed", (3, 8, 8), 8), nn.Sequential)


def test_numbers_that_are_no_image_are_attacked_as_one_of_one_row() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)), torch.rand(1, 5), torch.tensor([2])
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    with pytest.raises(FedtapError, match=r"shape=\(1, 1, N\), with nn.Sequential\(nn.Flatten\(\), model\)"):
        Linear().accepts(leak(model, grads, shape=(5,)))
    guess = Linear()(leak(nn.Sequential(nn.Flatten(), model), grads, shape=(1, 1, 5)))
    assert guess.labels.item() == 2
    torch.testing.assert_close(guess.images.flatten(), x.flatten(), rtol=0, atol=1e-4)
