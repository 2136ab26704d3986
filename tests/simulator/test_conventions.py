"""Clients of other conventions are replayed as they are, and told from fedtap's own where nobody says so."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtap.attackers import parse
from fedtap.attackers.parts.gradients import Match, squared_distance
from fedtap.attackers.parts.labels import recovered
from fedtap.scenarios.command.main import main
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CONVENTIONS, GradientLeak, Leak, Protocol, UpdateLeak, load, with_terms
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.recorder import recorder
from fedtap.simulator.wire.replay import client_reply, targets
from fedtap.simulator.wire.soundness import EXPLAINED, doubts, unexplained, warned
from tests.support.attack_leaks import pictures
from tests.support.clients import heard, protocol

SHAPE = (3, 8, 8)


def normed() -> nn.Module:
    """A small net with BatchNorm whose running statistics are not the batch's."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 10))
    norm = net.get_submodule("1")
    norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr,operator]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return net


def said(**does: Any) -> Protocol:
    return protocol(**({"shape": SHAPE} | does))


def network_of(true: Protocol) -> nn.Module:
    return normed() if ":" in true.model else build(true.model, true.shape, true.classes, seed=1)


def of(victims: int = 2, taken: Protocol | None = None, **does: Any) -> tuple[Leak, Tensor, Tensor]:
    """What clients of this convention send, read as what it is `taken` for, and what is behind it."""
    true = said(**does)
    images, labels = pictures(victims, true.batch, SHAPE[1])
    return heard(network_of(true), images, labels % true.classes, true, taken), images, labels % true.classes


STEPS = {"local_steps": 3, "learning_rate": 0.01}
NORMED = {"model": "tests:normed", "batchnorm": "eval"}
OTHERS: list[dict[str, Any]] = [
    {},
    {"low": -1.0, "high": 1.0},
    {"low": (-2.1, -2.0, -1.8), "high": (2.2, 2.4, 2.6)},
    {"loss": "bce"},
    {"loss": "mse"},
    {"loss": "bce", "reduction": "sum", "batch": 2},
    {"loss": "mse", "reduction": "sum", "batch": 2, "local_steps": 3, "learning_rate": 1e-3},
    {"reduction": "sum", "batch": 3},
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "weight_decay": 0.01, "reduction": "sum", "batch": 2, **STEPS},
    {"momentum": 0.9, "nesterov": True, **STEPS},
    NORMED,
    {**NORMED, "batch": 3, **STEPS},
    {"model": "tests:normed", "batch": 3},
    {"batch": 4, "step_batch": 2, "momentum": 0.9, **STEPS},
    {"batch": 5, "step_batch": 2, "weight_decay": 0.01, **STEPS},
]


@pytest.mark.parametrize("does", OTHERS, ids=str)
def test_a_convention_that_is_said_is_replayed(does: dict[str, Any]) -> None:
    """torch's own optimiser and losses are the oracle, over the wire in float32."""
    leak, images, labels = of(**does)
    true = unexplained(leak, images, labels)
    assert true is not None
    assert true.max() < 1e-9
    assert Match(leak, squared_distance)(images, labels).max() < 1e-6
    assert doubts(leak) == [[], []]
    assert torch.equal(recovered(leak), labels.sort(dim=1).values)
    other = unexplained(leak, 1 - images, labels)
    assert other is not None
    assert other.min() > EXPLAINED


MISREAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"loss": "bce"}, {}, "adds up to"),
    ({"loss": "mse"}, {}, "adds up to"),
    ({"weight_decay": 0.01}, {}, "adds up to"),
    ({"weight_decay": 5e-4}, {}, "adds up to"),
    ({"batch": 4}, {}, "has rank 4"),
    ({"batch": 4, "reduction": "sum"}, {"batch": 4}, "a sum over the batch"),
    (STEPS, {"learning_rate": 0.01}, "more steps"),
    ({"momentum": 0.9, "nesterov": True}, {}, "momentum"),
    ({"optimiser": "adam", "batch": 4}, {"batch": 4}, "a step of Adam"),
]


@pytest.mark.parametrize(("does", "taken", "sentence"), MISREAD, ids=str)
def test_a_convention_that_is_not_said_is_doubted(does: dict[str, Any], taken: dict[str, Any], sentence: str) -> None:
    leak, _, _ = of(2, said(**taken), **does)
    found = doubts(leak)
    told_of = [one for sentences in found for one in sentences]
    assert sentence in " ".join(told_of)
    assert all(len(one) < 300 for one in told_of)
    assert warned(leak, [told_of[:1], []]) == [f"{told_of[0]} (1 of 2 victims)"]


@pytest.mark.parametrize(
    ("does", "taken"),
    [({"low": -1.0, "high": 1.0}, {}), ({**NORMED, "batch": 4}, {"model": "tests:normed", "batch": 4})],
    ids=str,
)
def test_what_the_gradient_alone_does_not_show_is_left_unexplained(does: dict[str, Any], taken: dict[str, Any]) -> None:
    """At the true images already; an attack would have to find others."""
    leak, images, labels = of(2, said(**taken), **does)
    assert doubts(leak) == [[], []]
    shares = unexplained(leak, images, labels)
    assert shares is not None
    assert shares.min() > EXPLAINED


def blank(leak: Leak, **changes: Tensor) -> Leak:
    return dataclasses.replace(leak, observed={**leak.observed, **changes})


def test_a_gradient_that_says_nothing_is_doubted() -> None:
    leak, _, _ = of(1)
    nothing = blank(leak, **{name: torch.zeros_like(tensor) for name, tensor in leak.observed.items()})
    assert "zero in every entry: the client did not train" in doubts(nothing)[0][0]
    one = blank(leak, **{"conv2.weight": torch.zeros_like(leak.observed["conv2.weight"])})
    assert "The gradient of conv2.weight is zero" in doubts(one)[0][0]
    assert unexplained(nothing, torch.rand(1, 1, *SHAPE), torch.zeros(1, 1, dtype=torch.long)) is not None
    even = blank(leak, **{name: torch.full_like(tensor, 0.1) for name, tensor in leak.observed.items()})
    assert "Most entries have the size 0.1" in doubts(even)[0][0]
    frozen = blank(leak, **{"conv2.weight": torch.zeros_like(leak.observed["conv2.weight"])})
    frozen.network.get_parameter("conv2.weight").requires_grad_(False)
    assert doubts(frozen) == [[]]


def test_examples_that_are_not_the_batch_are_doubted(tmp_path: Path) -> None:
    leak, _, _ = of(2)
    leak = dataclasses.replace(leak, examples=torch.tensor([1, 500]))
    assert [len(found) for found in doubts(leak)] == [0, 1]
    assert "reports 500 examples" in doubts(leak[1])[0][0]
    leak.save(tmp_path / "leak.safetensors")
    assert doubts(load(tmp_path / "leak.safetensors", build)) == doubts(leak)


@pytest.mark.parametrize("defence", ["noise(0.01)", "clip(0.5)+noise(0.001)", "laplace(0.01)", "clip(0.5)"])
def test_noise_that_is_announced_is_neither_doubted_nor_unexplained(defence: str) -> None:
    from fedtap.clients.mod import defended
    from fedtap.simulator.defences.chained import parse as defences

    true = said(defence=defence)
    images, labels = pictures(1, 1, SHAPE[1])
    leak = heard(network_of(true), images, labels, true)
    weights = dict(leak.weights or {})
    after = {name: weights[name] - 0.1 * leak.observed[name][0] for name in weights}
    sent = defended(defences(defence).update, weights, after, 0.1, torch.Generator().manual_seed(0))
    leak = blank(leak, **{name: ((weights[name] - sent[name]) / 0.1)[None] for name in weights})
    share = unexplained(leak, images, labels)
    assert share is not None
    assert share < EXPLAINED
    assert doubts(leak) == [[]]
    silent = with_terms(leak, defence=defence.partition("+")[0] if "+" in defence else "none")
    if defence != "clip(0.5)":
        assert doubts(silent)[0]
    other = unexplained(silent, images, labels)
    assert other is not None
    assert other > EXPLAINED


def test_noise_that_drowns_the_gradient_explains_nothing() -> None:
    leak, images, labels = of(2, said(defence="noise(1.0)"))
    leak = blank(leak, **{name: tensor + torch.randn_like(tensor) for name, tensor in leak.observed.items()})
    share = unexplained(leak, 1 - images, labels)
    assert share is not None
    assert share.isnan().all()


@pytest.mark.parametrize("defence", ["sign()", "soteria(0.5)", "dp_sgd(1.0, 1.0)", "of_our_own"])
def test_what_no_defence_lets_compare_is_not_judged(defence: str) -> None:
    leak, images, labels = of(2, said(defence=defence, batch=2), batch=2)
    assert unexplained(leak, images, labels) is None
    eavesdropped = dataclasses.replace(leak, weights=None)
    assert unexplained(eavesdropped, images, labels) is None


# What is saved, and what is said on the command line.


def test_a_leak_without_conventions_has_fedtaps_own(tmp_path: Path) -> None:
    leak, _, _ = of(1, low=(-2.1, -2.0, -1.8), high=1.5)
    path = tmp_path / "leak.safetensors"
    leak.save(path)
    again = load(path, build)
    assert again.protocol == leak.protocol
    assert unexplained(again, *of(1)[1:]).item() < 1e-9  # type: ignore[union-attr]
    about = json.loads(path.with_suffix(".json").read_text())
    for name in CONVENTIONS:
        del about["protocol"][name]
    path.with_suffix(".json").write_text(json.dumps(about))
    assert load(path, build).protocol == said()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("loss", "hinge", "cross_entropy or bce or mse"),
        ("low", [0.0, 1.0], "one or one for each channel"),
        ("low", "dark", "one or one for each channel"),
        ("low", 2.0, "low is below high"),
        ("momentum", 1.0, "momentum is a number from 0 and below 1"),
        ("weight_decay", -1, "weight_decay is a number from 0"),
        ("nesterov", True, "true only beside momentum"),
        ("batchnorm", "frozen", "train or eval"),
        ("step_batch", 2, "step_batch is a whole number from 0, and batch at most"),
    ],
)
def test_a_convention_that_is_none_is_refused(tmp_path: Path, name: str, value: object, sentence: str) -> None:
    leak, _, _ = of(1)
    path = tmp_path / "leak.safetensors"
    leak.save(path)
    about = json.loads(path.with_suffix(".json").read_text())
    about["protocol"][name] = value
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(FedtapError, match=sentence):
        load(path, build)
    with pytest.raises(FedtapError, match=sentence):
        with_terms(leak, **{name: value})


def test_a_gradient_that_is_said_to_be_of_several_steps_is_their_update() -> None:
    true = said(**STEPS)
    images, labels = pictures(1, 1, SHAPE[1])
    misread = heard(network_of(true), images, labels, true, said(learning_rate=0.01))
    assert isinstance(misread, GradientLeak)
    assert doubts(misread)[0]
    leak = with_terms(misread, local_steps=3)
    assert isinstance(leak, UpdateLeak)
    assert doubts(leak) == [[]]
    assert unexplained(leak, images, labels).item() < 1e-9  # type: ignore[union-attr]


def test_what_a_user_says_on_the_command_line_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = said(model="mlp", low=(-2.1, -2.0, -1.8), high=1.5, batch=1, weight_decay=0.01)
    leak, images, labels = of(2, said(model="mlp"), **{name: getattr(true, name) for name in ("model", *CONVENTIONS)})
    leak.save(tmp_path / "leak.safetensors")

    def attack(out: str, *words: str) -> tuple[dict[str, Any], int]:
        command = ["fedtap", "attack", str(tmp_path / "leak.safetensors"), "--attack", "linear", *words]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / out)])
        with pytest.raises(SystemExit) as ended:
            main()
        if ended.value.code:
            return {}, int(ended.value.code)
        return json.loads((tmp_path / out / "rows.jsonl").read_text().splitlines()[0]), 0

    misread, _ = attack("misread")
    assert misread["unexplained"] > EXPLAINED
    assert "adds up to" in misread["doubts"]
    errors = " ".join(capsys.readouterr().err.split())
    assert "adds up to" in errors
    assert "(2 of 2 victims)" in errors
    page = (tmp_path / "misread" / "report.html").read_text()
    assert "not this model, loss, range, batch or number of steps" in page
    row, _ = attack("said", "--low", "-2.1,-2.0,-1.8", "--high", "1.5", "--weight-decay", "0.01")
    assert row["doubts"] is None
    assert row["unexplained"] < 1e-3
    assert row["labels"] == labels[0].tolist()
    found = load_file(next((tmp_path / "said" / "reconstructions").iterdir()))["images"]
    torch.testing.assert_close(found, images, atol=2e-2, rtol=0)
    assert (
        attack("no", "--low", "dark")[1]
        == attack("no", "--loss", "hinge")[1]
        == attack("no", "--local-steps", "0")[1]
        == 2
    )
    assert not (tmp_path / "no").exists()


def test_a_recorder_wants_a_protocol_that_can_be_followed(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="cross_entropy or bce or mse"):
        recorder(tmp_path, said(loss="nll"), nn.Linear(1, 1))


def test_the_network_goes_on_taking_pixels() -> None:
    """Its range can be said, and said otherwise; parameters keep their names, and the caller's network is as it was."""
    network = network_of(said())
    true = said(low=-1.0, high=1.0)
    leak = heard(network, *pictures(1, 1, SHAPE[1]), true)
    assert [name for name, _ in leak.network.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert not network._forward_pre_hooks
    assert len(with_terms(leak, low=0.5).network._forward_pre_hooks) == 1
    assert not with_terms(leak, low=0.0, high=1.0).network._forward_pre_hooks
    assert with_terms(leak, low=-1.0).network is leak.network


# The attacks.


@pytest.mark.parametrize("attack", ["exact_git", "rgap", "linear"])
@pytest.mark.parametrize(
    "does",
    [
        {"low": -1.0, "high": 1.0},
        {"loss": "bce", "reduction": "sum"},
        {"loss": "mse"},
        {"weight_decay": 0.01, "momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_closed_forms_undo_conventions(attack: str, does: dict[str, Any]) -> None:
    model = "mlp" if attack == "linear" else "lenet(width=6, depth=2)"
    leak, images, labels = of(2, model=model, **does)
    guess = parse(attack)[0](leak)
    assert torch.equal(guess.labels, labels)
    torch.testing.assert_close(guess.images, images, atol=2e-2, rtol=0)


def test_a_closed_form_on_an_update_undoes_momentum_and_decay() -> None:
    leak, images, labels = of(2, model="mlp", momentum=0.9, weight_decay=0.01, **STEPS)
    guess = parse("linear")[0](leak)
    assert torch.equal(guess.labels, labels)
    torch.testing.assert_close(guess.images, images, atol=2e-2, rtol=0)


@pytest.mark.parametrize("attack", ["idlg(steps=12)", "inverting_gradients(steps=12)"])
def test_signs_that_adam_left_are_matched_as_signs(attack: str) -> None:
    leak, images, labels = of(1, optimiser="adam")
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    guess = parse(attack)[0](leak, start=start)
    assert torch.equal(guess.labels, labels)
    assert unexplained(leak, guess.images, guess.labels) is None

    def agree(images: Tensor) -> float:
        sent = client_reply(leak)(leak.weights or {}, {}, images[0], targets(labels[0], 10))
        alike = [(sent[name].sign() == leak.observed[name][0].sign()).flatten() for name in sent]
        return float(torch.cat(alike).float().mean())

    assert agree(guess.images) > agree(start)


@pytest.mark.parametrize(
    ("attack", "does", "sentence"),
    [
        ("linear", {"optimiser": "adam", "model": "mlp"}, "only their signs are left"),
        ("exact_git", {"optimiser": "adam"}, "only their signs are left"),
        ("gauss_newton", {"optimiser": "adam"}, "only their signs are left"),
        ("gradinversion", {"optimiser": "adam"}, "only their signs are left"),
        ("idlg", {"optimiser": "adam", **STEPS}, "attack clients of one step"),
        ("dlg", {"loss": "bce", "classes": 1}, "here is one logit"),
    ],
    ids=str,
)
def test_what_cannot_be_replayed_is_refused(attack: str, does: dict[str, Any], sentence: str) -> None:
    leak, _, _ = of(1, **does)
    with pytest.raises(FedtapError, match=sentence):
        parse(attack)[0](leak)


def test_an_eavesdropper_cannot_take_weights_off() -> None:
    leak, _, _ = of(1, model="mlp", weight_decay=0.01)
    with pytest.raises(FedtapError, match="cannot take them off"):
        parse("linear")[0](dataclasses.replace(leak, weights=None, buffers={}))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_single_logit_has_labels_too(batch: int) -> None:
    leak, images, labels = of(3, loss="bce", classes=1, batch=batch)
    leak = heard(network_of(leak.protocol), images, pictures(3, batch, SHAPE[1])[1] % 2, leak.protocol)
    labels = (pictures(3, batch, SHAPE[1])[1] % 2).sort(dim=1).values
    assert torch.equal(recovered(leak), labels)
    assert targets(labels, 1).shape == (3, batch, 1)
    sent = client_reply(leak)(leak.weights or {}, {}, images[0], targets(pictures(3, batch, SHAPE[1])[1][0] % 2, 1))
    torch.testing.assert_close(sent["fc.bias"], leak.observed["fc.bias"][0], atol=1e-6, rtol=1e-4)
