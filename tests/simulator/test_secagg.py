"""Secure aggregation: what Flower's SecAgg+ lets a server hear, and what remains of a picture in a sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional

from fedtap.clients.app import client_app
from fedtap.clients.training import sgd
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import PrivateData, private_data
from fedtap.simulator.federation.rounds import play
from fedtap.simulator.leaks import GradientLeak, Protocol
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import run
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from fedtap.simulator.wire.threat_models import Masked, isolated
from fedtap.simulator.wire.wiretap import Wiretap
from tests.scenarios.test_cli import run as fedtap
from tests.support import legacy_secagg
from tests.support.legacy_secagg import Arrays
from tests.support.scenes import Scene

RING = 2**32


def not_uniform(vector: np.ndarray) -> float:
    """The smaller p-value of two chi-squared tests: of the ring's highest eight bits, and of its lowest."""
    whole = vector.astype(np.int64) % RING
    return min(chisquare(np.bincount(bits, minlength=256)).pvalue for bits in (whole >> 24, whole & 255))


@pytest.mark.parametrize("leaves", [None, 1])
def test_the_server_of_secagg_plus_gets_masked_vectors_and_their_sum(leaves: int | None) -> None:
    """Five clients with different numbers of examples; in the second case one leaves after its keys are shared."""
    start = [weight.detach().numpy() for weight in build("lenet", (3, 16, 16), 8, seed=1234).parameters()]
    sent: dict[int, tuple[Arrays, int]] = {}

    def fit(partition: int, weights: Arrays) -> tuple[Arrays, int]:
        if partition == leaves:
            raise RuntimeError("out of battery")
        drawn = np.random.default_rng(partition)
        sent[partition] = [weight + 0.05 * drawn.standard_normal(weight.shape) for weight in weights], partition + 1
        return sent[partition]

    inputs: list[np.ndarray] = []

    def ear(order: Message, answer: Message) -> None:
        if answer.has_content() and Key.MASKED_PARAMETERS in (got := answer.content.config_records[RECORD_KEY_CONFIGS]):
            assert not any(len(record) for record in answer.content.array_records.values())  # no weight goes unmasked
            assert answer.content.metric_records["fitres.num_examples"]["num_examples"] in range(1, 6)  # but this does
            vectors = [bytes_to_ndarray(array) for array in got[Key.MASKED_PARAMETERS]]  # type: ignore[union-attr]
            inputs.append(np.concatenate([vector.ravel() for vector in vectors]))

    tap = Wiretap(LocalGrid(legacy_secagg.client_app(fit), 5), ear)
    mean = legacy_secagg.aggregated(tap, start, clients=5, examples=5)

    assert len(inputs) == len(sent) == (5 if leaves is None else 4)
    for vector in inputs:
        assert not_uniform(vector) > 1e-6
    unmasked = np.concatenate([np.ravel(weight) for weight in sent[0][0]])
    assert not_uniform(np.round((unmasked + 1) * 2**21)) < 1e-6  # the test can tell

    total = sum(examples for _, examples in sent.values())
    for index, found in enumerate(mean):
        plain = sum(weights[index] * examples for weights, examples in sent.values())
        np.testing.assert_allclose(found * total, plain, rtol=0, atol=1e-4)


def test_secagg_plus_unmasks_nothing_once_too_few_clients_are_left() -> None:
    start = [np.full((3, 2), 0.25)]

    def fit(partition: int, weights: Arrays) -> tuple[Arrays, int]:
        if partition:
            raise RuntimeError("out of battery")
        return [weights[0] + 0.5], 1

    grid = LocalGrid(legacy_secagg.client_app(fit), 3)
    assert np.array_equal(legacy_secagg.aggregated(grid, start, clients=3, examples=1)[0], start[0])


def federation(scenario: Scene) -> tuple[LocalGrid, PrivateData]:
    return grids(scenario)(scenario), private_data(scenario, Path("data"), scenario.clients)


def grids(*parts: Scene) -> Callable[[Scene], LocalGrid]:
    return lambda part: LocalGrid(client_app(lambda config: parts), part.clients + 1)


BASE = Scene(attack="", name="test", victims=2, clients=3, size=16, threat_model="secure_aggregation")


def gradient(scenario: Scene, private: PrivateData, arrays: ArrayRecord, name: tuple[int, int]) -> dict[str, Tensor]:
    """The slow oracle: autograd on all the images behind an answer."""
    net = build(scenario.model, (3, 16, 16), len(private.dataset.classes))
    net = net.to_empty(device="cpu")
    net.load_state_dict(tensors_of(arrays), strict=False)
    images, labels = private.behind(*name)
    loss = functional.cross_entropy(net(images), labels)
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


def test_the_server_hears_the_gradient_of_all_clients_images_and_no_clients_own() -> None:
    scenario = dataclasses.replace(BASE, batch=2, rounds=1)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    assert set(heard.leaks) == set(private.names()) == {(0, 2), (0, 3)}
    leak = heard.leaks[0, 3]
    leak.check()
    assert (leak.protocol.batch, leak.protocol.summed) == (6, 3)
    assert len(torch.cat([private.behind(*name)[0] for name in private.names()]).flatten(1).unique(dim=0)) == 12
    for key, true in gradient(scenario, private, heard.arrays, (0, 3)).items():
        torch.testing.assert_close(leak.observed[key][0], true, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("others", ["silent", "identical", "colluding"])
def test_what_the_server_knows_of_the_others_it_takes_off_the_sum(others: str) -> None:
    scenario = dataclasses.replace(BASE, others=others, clients=5, victims=1, batch=2)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = heard.leaks[0, 1]
    assert (leak.protocol.batch, leak.protocol.summed) == (2, 1)
    for key, true in gradient(scenario, private, heard.start, (0, 1)).items():
        torch.testing.assert_close(leak.observed[key][0], true, rtol=1e-4, atol=2e-6, msg=key)


def answer(values: float, examples: float, client: int = 0) -> Masked:
    """One client's answer, of a model with one weight."""
    network = nn.Linear(1, 1, bias=False)
    one = torch.tensor([0])
    protocol = Protocol("linear", (1, 1, 1), 1, 3)
    observed = {"weight": torch.full((1, 1, 1), values)}
    return Masked(GradientLeak(observed, protocol, network, None, {}, one + client, one + 1, one), examples)


@pytest.mark.parametrize(
    ("others", "left"),
    [("honest", (2 * 1 + 3 * 10) / 5), ("colluding", 1.0), ("silent", 1 + 3 * 10 / 2), ("identical", 1 + 3 * 9.5 / 2)],
)
def test_the_sum_is_weighted_by_examples_and_only_what_is_known_comes_off(others: str, left: float) -> None:
    """Who thinks the others silent, or copies of its client's 0.5, while they are neither, isolates nothing."""
    answers = {0: answer(1.0, 2), 1: answer(10.0, 3), 2: answer(0.5, 7)}
    assert float(isolated(answers, 2, others).observed["weight"]) == pytest.approx(left)


@pytest.mark.parametrize("others", ["honest", "colluding"])
def test_what_is_left_of_a_sum_is_as_precise_as_it_says(others: str) -> None:
    """Each client's answer is rounded by itself; the errors of what is told come off with it."""
    draw = torch.Generator().manual_seed(0)

    def rounded(examples: float) -> Masked:
        exact = answer(1.0, examples).leak
        observed = {"weight": 1 + 1e-3 * torch.randn(1, 1, 9999, generator=draw)}
        return Masked(dataclasses.replace(exact, observed=observed, resolution=1e-3), examples)

    left = isolated({0: rounded(2), 1: rounded(3), 2: rounded(1), 3: rounded(7)}, 3, others)
    wrong = float((left.observed["weight"] - 1).square().mean().sqrt())
    assert wrong == pytest.approx(left.resolution, rel=0.05)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 100)), min_size=3, max_size=12))
def test_whatever_is_sent_colluders_leave_the_victims_answer_and_honest_clients_their_mean(
    sent: list[tuple[float, int]],
) -> None:
    answers = {client: answer(*one) for client, one in enumerate(sent)}
    clients = len(sent) - 1  # the last is the compromised one
    alone, mean = (isolated(answers, clients, others).observed["weight"] for others in ("colluding", "honest"))
    assert float(alone) == pytest.approx(sent[0][0], rel=1e-6, abs=1e-6)
    values, weights = zip(*sent[:-1], strict=True)
    assert float(mean) == pytest.approx(np.average(values, weights=weights), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("left", "others", "said"),
    [
        ((0, 3), "honest", "Of the 3 clients to be summed 1 answered"),
        ((0, 2, 3), "honest", "these dropped out: 1;"),
        ((0, 1, 2), "identical", "compromised client did not answer"),
    ],
)
def test_a_round_that_lacks_answers_is_refused(left: tuple[int, ...], others: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        isolated({client: answer(1.0, 1) for client in left}, 3, others)


@pytest.mark.parametrize(("who", "why"), [("leaves", "battery"), ("lies", "Client 1 answered in the name of client 7")])
def test_a_client_that_drops_out_is_named_in_its_rounds(who: str, why: str) -> None:
    sound, app = client_app(lambda config: (BASE,)), ClientApp()

    @app.train()
    def train(order: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != 1:
            return sound(order, context)
        if who == "leaves":
            raise RuntimeError("out of battery")
        lie = sound(order, context)
        lie.content.metric_records["metrics"]["partition"] = 7
        return lie

    heard = play(BASE, LocalGrid(app, 4), private_data(BASE, Path("data"), 3))
    assert not heard.leaks
    assert "these dropped out: 1;" in heard.why_missing(0, 1)
    assert why in heard.why_missing(0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clients": 0}, "an unknown number of clients: .* --clients N"),
        ({"clients": 1}, "no sum of 1 clients"),
        ({"clients": 100, "victims": 3}, "3 sums of 100 clients with 100 images each need 300"),
        ({"clients": 500, "victims": 1, "others": "silent"}, "cannot share 474 training images"),
        ({"local_steps": 2}, "use --local-steps 1"),
        ({"model": "resnet20"}, r"BatchNorm \(.*\) normalises its own images alone"),
        ({"others": "noisy"}, "no kind of others named"),
        ({"threat_model": "curious_server", "others": "silent"}, "observes each client by itself"),
        ({"defence": "noise(0.1)", "attack": "lti", "clients": 2}, "An auxiliary pair is defended once"),
    ],
)
def test_what_cannot_be_summed_is_refused(change: dict[str, Any], said: str) -> None:
    def played() -> None:
        scenario = dataclasses.replace(BASE, **change)
        play(scenario, *federation(scenario))

    with pytest.raises(FedtapError, match=said):
        played()


def test_each_client_of_a_sum_adds_its_own_announced_noise() -> None:
    protocol = Protocol("lenet", (3, 16, 16), 8, batch=8, defence="noise(0.1)")
    assert sigma(dataclasses.replace(protocol, summed=4)) == pytest.approx(0.05)
    private = dataclasses.replace(protocol, defence="dp_sgd(1.0, 0.5)", summed=4)
    assert sigma(private) == pytest.approx(0.5 / 2 / 2)  # over its two images, over the root of four clients


def test_the_real_protocol_gives_the_server_what_the_threat_model_hears() -> None:
    """One round of fedtap's federation, and the same behind Flower's SecAgg+: the same gradient, to its rounding."""
    scenario = dataclasses.replace(BASE, victims=1, batch=2)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    names = list(heard.start)

    def fit(partition: int, weights: Arrays) -> tuple[Arrays, int]:
        net = build(scenario.model, (3, 16, 16), len(private.dataset.classes), seed=0)
        net.load_state_dict({name: torch.from_numpy(weight) for name, weight in zip(names, weights, strict=True)})
        sgd(net, *private(partition, 1), 1, 2, scenario.learning_rate)
        return [net.get_parameter(name).detach().numpy() for name in names], 2

    start = heard.start.to_numpy_ndarrays()
    mean = legacy_secagg.aggregated(LocalGrid(legacy_secagg.client_app(fit), 3), start, clients=3, examples=2)
    for name, before, after in zip(names, start, mean, strict=True):
        found = (before - after) / scenario.learning_rate
        np.testing.assert_allclose(found, heard.leaks[0, 1].observed[name][0].numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_a_picture_comes_back_from_behind_a_sum_whose_others_collude_and_its_row_says_so(tmp_path: Path) -> None:
    (one,) = plan("secagg", {"clients": "1", "attack": "linear", "model": "mlp", "size": "16", "victims": "1"})
    every = {"others": "honest,silent,identical,colluding"}
    parts = plan("secagg", every | {"clients": "4", "attack": "linear", "model": "mlp", "size": "16", "victims": "1"})
    assert (one.threat_model, one.others) == ("curious_server", "honest")
    assert [part.others for part in parts] == ["honest", "silent", "identical", "colluding"]
    parts = (one, *parts)
    rows = run(parts, grids(*parts), tmp_path, device=torch.device("cpu"), data_root=tmp_path)
    alone, honest, *told = rows
    assert alone["psnr"] > 90
    assert all(row["psnr"] > 90 for row in told)
    assert honest["psnr"] < alone["psnr"] - 10
    assert (honest["clients"], honest["batch"], honest["threat_model"]) == (4, 1, "secure_aggregation")
    assert "knows the weights it sent, and observes of each round the sum" in (tmp_path / "report.html").read_text()


def test_what_practises_practises_on_batches_as_large_as_the_sum(tmp_path: Path) -> None:
    settings = {"clients": "3", "attack": "lti(width=16,epochs=1)", "size": "16", "victims": "1", "pairs": "40"}
    (part,) = plan("secagg", settings | {"others": "honest"})
    (row,) = run((part,), grids(part), tmp_path, device=torch.device("cpu"), data_root=tmp_path)
    assert row["error"] is None
    assert row["pairs"] == 40


@pytest.mark.parametrize("knobs", [{"threat_model": "eavesdropper"}, {"clients": "0"}])
def test_the_scenario_is_about_sums(knobs: dict[str, str]) -> None:
    with pytest.raises(FedtapError, match=r"observes each client by itself|--clients N"):
        plan("secagg", knobs)


def test_one_client_alone_has_no_others_that_could_collude(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="no others to be colluding"):
        assert {part.clients for part in plan("secagg", {"others": "colluding"})} == {2, 5, 10, 50}
    words = ["secagg", "--clients", "1", "--others", "colluding", "--out", str(tmp_path / "out")]
    assert fedtap(monkeypatch, *words) == 2
    assert "Nothing is left of secagg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
