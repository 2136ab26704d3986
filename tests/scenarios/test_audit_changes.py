"""What would change an app's risk, and what noise is worth: against the accountant, and gradients written out."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedtap.scenarios.audit import attacks
from fedtap.scenarios.audit.app import FlowerApp
from fedtap.scenarios.audit.audit import Audit, AuditSettings
from fedtap.scenarios.audit.changes import Change, ReportedMetrics, changed_client, changes_of, hidden, summed
from fedtap.scenarios.audit.observe import LocalTraining, Observer
from fedtap.scenarios.audit.privacy import DELTA, planned_rounds
from fedtap.scenarios.audit.verdict import GRADIENT, AuditedExchange
from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.grid import LocalGrid
from tests.scenarios.test_audit import APPS

RATE = 0.1


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def trained(seed: int, rows: int = 4) -> AuditedExchange:
    """One step of SGD on rows of this seed, as an audit sees it; BatchNorm is frozen."""
    model, observer = net(), Observer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(rows, 6, generator=draw), torch.randint(3, (rows,), generator=draw)
    model.train()
    model[1].eval()  # type: ignore[index]
    with observer.installed(), observer.watching() as training:
        sgd = torch.optim.SGD(model.parameters(), lr=RATE)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        sgd.step()
    after = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return AuditedExchange(seed, 1, GRADIENT, "", training, before, after, 0.0)


def app(**run_config: Any) -> FlowerApp:
    def client(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        moved = {name: torch.as_tensor(array.numpy()) + 1 for name, array in record.items()}
        return Message(RecordDict({"arrays": ArrayRecord(moved)}), reply_to=message)

    return FlowerApp("mine", "1", client, lambda **_: None, "", run_config, ("mine:client", "mine:server"))


def test_a_sum_of_clients_is_the_gradient_of_their_batches_together() -> None:
    one, other = trained(1), trained(2)
    both = summed([one, other])
    (batch,) = both.training.batches
    model = net()
    model.load_state_dict(both.before)
    (call,) = batch.losses
    call.function(model(batch.inputs[0]), *call.rest).backward()
    for name, parameter in model.named_parameters():
        change = (both.before[name] - both.after[name]) / RATE
        assert parameter.grad is not None
        assert torch.allclose(change, parameter.grad, atol=1e-5), name


def test_a_sum_that_is_no_gradient_is_not_made() -> None:
    with pytest.raises(FedtapError, match="needs two"):
        summed([trained(1)])
    with pytest.raises(FedtapError, match="one step on one batch"):
        summed([trained(1), trained(2, rows=5)])


def test_noise_has_the_epsilon_that_it_is_said_to_have_over_all_rounds() -> None:
    exchange = trained(1)
    tried, untried = changes_of(app(), exchange, rounds=5)
    assert [change.epsilon for change in tried] == [8.0, 1.0]
    assert len(untried) == 2
    for change in tried:
        clip, noise = parse(change.defence).update.parts
        release = Gaussian(vars(noise)["sigma"], vars(clip)["norm"], "client", "add/remove", releases=5)
        assert release.guarantee(DELTA).epsilon == pytest.approx(change.epsilon, rel=1e-6)


def test_noise_lies_on_the_parameters_that_are_sent_and_on_nothing_else() -> None:
    exchange = trained(1)
    (change, *_), _ = changes_of(app(), exchange, rounds=1)
    noisy = hidden(exchange, change, seed=0)
    assert noisy.defence == change.defence
    sigma = RATE * vars(parse(change.defence).update.parts[1])["sigma"]
    names = {name for name, _ in net().named_parameters()}
    for name, tensor in exchange.after.items():
        moved = noisy.after[name] - tensor
        assert bool(moved.any()) == (name in names), name
    every = torch.cat([(noisy.after[name] - exchange.after[name]).flatten() for name in sorted(names)])
    assert float(every.std()) == pytest.approx(sigma, rel=0.3)


def test_the_mod_of_a_played_change_leaves_statistics_alone() -> None:
    exchange = trained(1)
    change, mine = Change("", defence="clip(1.0)+noise(100.0)"), app()
    state = {name: tensor.float() for name, tensor in exchange.before.items()}
    LocalGrid(mine.client, 1)  # without a server, Flower lets nobody write a message
    message = Message(RecordDict({"arrays": ArrayRecord(state)}), 1, "train")
    context = Context(1, 1, {}, RecordDict(), {})
    reply = changed_client(mine, change, exchange, seed=0)(message, context)
    plain = mine.client(message, context)
    names = {name for name, _ in net().named_parameters()}
    for name in state:
        got, wanted = (
            torch.as_tensor(one.content["arrays"][name].numpy())  # type: ignore[index,union-attr]
            for one in (reply, plain)
        )
        assert torch.equal(got, wanted) == (name not in names), name


@pytest.mark.parametrize(
    ("config", "rounds"),
    [({"num-server-rounds": 7}, 7), ({"num_rounds": 3}, 3), ({"rounds": 0, "lr": 0.1}, 2), ({}, 2)],
)
def test_planned_rounds_are_those_of_the_run_config(config: dict[str, Any], rounds: int) -> None:
    assert planned_rounds(config, 2) == rounds


def test_metrics_are_means_over_examples_of_the_last_round_and_an_accuracy_comes_first() -> None:
    LocalGrid(app().client, 1)
    seen = ReportedMetrics()
    assert seen.last() is None
    for rnd, accuracy, examples in ((1, 0.1, 10), (2, 0.5, 30), (2, 0.9, 10)):
        message = Message(RecordDict(), 1, "evaluate")
        metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": accuracy, "num-examples": examples})
        seen.note(message, Message(RecordDict({"metrics": metrics}), reply_to=message), rnd)
    assert seen.last() == ("eval_acc", 2, pytest.approx(0.6))


def audited(name: str, out: Path, *overrides: str) -> dict[str, Any]:
    Audit(AuditSettings(APPS / name, out, overrides=overrides, minutes=60.0)).run()
    document: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return document


def test_changes_are_measured_beside_the_app_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_PANEL", ("exact_batch",))
    document = audited("weighted", tmp_path)
    together, *noisy = document["changes"]
    assert "mean of 2 clients" in together["change"]
    assert together["attacks"][0]["levels"] == ["identical"] * 8, "a sum of two clients of four rows hides none"
    for one in noisy:
        assert set(one["attacks"][0]["levels"]) == {"nothing"}
    page = (tmp_path / "report.html").read_text()
    assert "those first after which least comes back" in page
    table = page[page.index("What would change it") :]
    assert table.index("ε = 8") < table.index("mean of 2 clients"), "what protects most comes first"


def test_a_change_is_played_and_its_cost_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_PANEL", ())
    document = audited("quickstart", tmp_path)
    assert [one["change"] for one in document["changes"]][-1] == "batch-size = 128"
    for one in document["changes"]:
        assert one["metric"] == "eval_loss, round 2"
        assert one["metric_as_it_is"] > 0
        assert abs(one["metric_changed"] - one["metric_as_it_is"]) > 1e-4, "it was played otherwise"


def test_dp_sgd_is_read_off_the_optimiser_and_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_PANEL", ())
    told = audited("opacus_sgd", tmp_path)["privacy"]
    whole = Gaussian(1.0, 1.0, "example", "add/remove", releases=2 * 3)
    assert told["epsilon"] == pytest.approx(whole.guarantee(DELTA).epsilon)
    sampled = dataclasses.replace(whole, rate=1 / 3)
    assert told["epsilon_sampled"] == pytest.approx(sampled.guarantee(DELTA).epsilon)
    assert told["unit"] == "example"
    page = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    assert "noise multiplier 1, 3 steps a round" in page
    assert re.search(r"NIST SP 800-226.*?ε = 12.9, stated here", page, re.DOTALL)


def test_noise_without_a_clip_has_no_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "_PANEL", ())
    told = audited("tampered", tmp_path, "lie=noise")["privacy"]
    assert told["epsilon"] is None
    assert "ε = ∞" in told["note"]
    assert LocalTraining().dp_sgd is None
