"""A promise of differential privacy is audited: twelve faults are found and named, and honest mechanisms pass."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from scipy.stats import laplace

from fedtap.scenarios.audit.app import mods_of
from fedtap.scenarios.audit_dp import auditor
from fedtap.scenarios.audit_dp.apps import of_opacus
from fedtap.scenarios.audit_dp.audit import PromiseAudit, PromiseAuditSettings
from fedtap.scenarios.audit_dp.auditor import Auditor
from fedtap.scenarios.audit_dp.faults import Fault, faults_of
from fedtap.scenarios.audit_dp.page import audit_dp_page
from fedtap.scenarios.audit_dp.probes import Code
from fedtap.scenarios.audit_dp.promise import Promise, promise_of
from fedtap.scenarios.audit_dp.seeds import same_noise, seeds_seen
from fedtap.scenarios.audit_dp.target import Mechanism, as_mechanism
from fedtap.scenarios.gradients.canary import Canary
from fedtap.simulator.auditing.allowed import laplace_limit, largest_ratio
from fedtap.simulator.defences.accountant import Gaussian, noise_for
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.gaussian import sampled_by
from fedtap.simulator.errors import FedtapError
from tests.scenarios.test_cli import run as fedtap
from tests.support import dp_mechanisms
from tests.support.app_with_mod import app_with_mod

PROMISED: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "clip": 1.0}


@pytest.fixture(autouse=True)
def few_releases_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit ends sooner than it would for a user."""
    monkeypatch.setattr(auditor, "_FEWEST", 130)


def audited(found: Any, observations: int = 300, seconds: float = 120, **said: Any) -> Auditor:
    """An audit in this process, of a mechanism or of the function of that name."""
    said = {name: value for name, value in (PROMISED | said).items() if value is not None}
    mechanism = found if isinstance(found, Mechanism) else as_mechanism(found, said, str(found))
    audit = Auditor(
        mechanism,
        promise_of(said, mechanism.attributes),
        1e-3,
        time.monotonic() + seconds,
        observations=observations,
    )
    audit.run()
    return audit


def faults(name: str, **said: Any) -> dict[str, Fault]:
    return {one.fault: one for one in faults_of(audited(getattr(dp_mechanisms, name), **said))}


TWELVE = [
    ("scale_by_batch", {"unit": "example"}, "scale_depends_on_data", "scale of the noise tells neighbours apart"),
    ("sensitivity_1e_4", {}, "sensitivity_too_small", "for a sensitivity of 0.0001"),
    ("sensitivity_of_average", {"sensitivity": 0.02, "unit": "example"}, "sensitivity_of_average", "2 × clip / 100"),
    ("classical_10", {"epsilon": 10.0}, "classical_formula", "classical formula"),
    ("half_sigma", {}, "noise_too_small", "half of what is needed"),
    ("no_clip", {}, "clip_skipped", "Nothing is clipped"),
    ("clip_after_noise", {}, "clip_after_noise", "The clip comes after the noise"),
    ("stored_noise", {}, "noise_reused", "same noise is used again"),
    ("few_bits", {}, "few_bit_seed", "seeds of 32 bits or fewer"),
    ("buffers_in_the_clear", {}, "undefended_entries", "bn.running_mean"),
    ("add_remove_noise", {"adjacency": "replacement"}, "add_remove_sold_as_replacement", "that of add/remove"),
    ("one_round_noise", {"rounds": 10}, "rounds_not_composed", "enough for one round"),
]


@pytest.mark.parametrize(("name", "said", "fault", "sentence"), TWELVE, ids=[case[0] for case in TWELVE])
def test_each_of_twelve_faults_is_found_and_named(name: str, said: dict[str, Any], fault: str, sentence: str) -> None:
    found = faults(name, **said)
    assert list(found) == [fault]
    assert sentence in found[fault].sentence
    assert found[fault].observations <= 500
    assert found[fault].e_value >= 1e3


@pytest.mark.parametrize(
    ("name", "said", "fault"),
    [
        ("scale_by_update", {}, "scale_depends_on_data"),
        ("no_noise", {}, "no_noise"),
        ("clip_by_tensor", {}, "clip_too_long"),
        ("one_number_of_noise", {"observations": 700}, "noise_correlated"),
        ("laplace_after_l2", {"delta": 0.0}, "clip_too_long"),
        ("biases_with_less_noise", {}, "undefended_entries"),
        ("metric_in_the_clear", {}, "undefended_entries"),
        ("multiplicative_noise", {}, "scale_depends_on_data"),
        ("honest_1", {"delta": 0.0}, "gaussian_at_delta_0"),
        ("no_clip", {"clip": None}, "clip_skipped"),
    ],
)
def test_further_faults_are_found(name: str, said: dict[str, Any], fault: str) -> None:
    assert list(faults(name, **said)) == [fault]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("honest_1", {}),
        ("honest_8", {"epsilon": 8.0}),
        ("honest_replacement", {"adjacency": "replacement"}),
        ("honest_10_rounds", {"rounds": 10}),
        ("honest_laplace", {"delta": 0.0}),
        ("honest_own_generator", {}),
        ("honest_examples", {"unit": "example"}),
        ("honest_1", {"clip": None}),
    ],
)
def test_an_honest_mechanism_is_not_refuted_and_its_epsilon_is_nearly_shown(name: str, said: dict[str, Any]) -> None:
    audit = audited(getattr(dp_mechanisms, name), **said)
    assert not faults_of(audit)
    promised = audit.promise.epsilon
    assert 0.9 * promised <= max(audit.bounds().values()) <= promised


def test_noise_that_cannot_be_drawn_twice_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditor, "_PATIENT", 400)
    honest = audited(dp_mechanisms.honest_random_state, epsilon=4.0)
    assert not honest.still
    assert not faults_of(honest)
    monkeypatch.setattr(auditor, "_PATIENT", 2000)
    found = faults_of(audited(dp_mechanisms.honest_random_state, epsilon=1.0))  # its noise is for ε = 4
    assert [one.fault for one in found] == ["noise_too_small"]


def test_noise_in_turn_is_recognised_when_it_comes_again() -> None:
    assert "noise_reused" in faults("cycled_noise")


@pytest.mark.parametrize(("epsilon", "fault"), [(1.0, None), (10.0, "classical_formula")])
def test_flowers_local_mod_keeps_add_remove_at_1_and_not_at_10(epsilon: float, fault: str | None) -> None:
    nothing = dict.fromkeys(PROMISED)  # the promise is the mod's own
    audit = audited(LocalDpMod(1.0, 1.0, epsilon, 1e-5), **nothing)
    assert audit.promise.epsilon == epsilon
    assert [one.fault for one in faults_of(audit)] == [fault] * (fault is not None)
    assert "travels in the clear" in audit.mechanism.notes[0]  # BatchNorm's counter, which has no axis


def test_flowers_local_mod_does_not_keep_replacement() -> None:
    found = faults_of(audited(LocalDpMod(1.0, 1.0, 1.0, 1e-5), adjacency="replacement"))
    assert [one.fault for one in found] == ["add_remove_sold_as_replacement"]


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_flowers_clipping_mods_add_no_noise(mod: Any) -> None:
    (fault,) = faults_of(audited(mod))
    assert fault.fault == "no_noise"
    assert "hides nothing from the server" in fault.sentence


@pytest.mark.parametrize(
    "kind", [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping]
)
def test_flowers_fixed_clipping_keeps_its_multipliers_epsilon(kind: Any) -> None:
    strategy = kind(FedAvg(), noise_for(1.0, 1e-5, 1.0), 1.0, 4)
    audit = audited(strategy, observations=150, epsilon=None, clip=None)
    assert audit.promise.epsilon == pytest.approx(1.0)
    assert not faults_of(audit)
    assert [one.fault for one in faults_of(audited(strategy, observations=150, epsilon=0.5))] == ["noise_too_small"]


@pytest.mark.parametrize("examples", [15, 16, 17])
def test_opacus_scale_tells_how_many_examples_there_are(examples: int) -> None:
    told = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "loss_reduction": "mean", "examples": examples, "batch": 8}
    said = {"delta": 1e-5, "unit": "example", "epsilon": None, "clip": None}
    (fault,) = faults_of(audited(of_opacus(told, said), **said))
    assert fault.fault == "scale_depends_on_data"
    assert "examples get noise" in fault.sentence


def test_opacus_with_a_sum_over_a_constant_is_not_refuted() -> None:
    told = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "loss_reduction": "sum", "examples": 16, "batch": 8}
    said = {"delta": 1e-5, "unit": "example", "epsilon": None, "clip": None}
    assert not faults_of(audited(of_opacus(told, said), observations=200, **said))


@pytest.mark.parametrize(
    ("broken", "fault"), [("none", None), ("half_noise", "noise_too_small"), ("no_clip", "clip_skipped")]
)
def test_the_canary_scenarios_broken_mechanisms_are_found(broken: Any, fault: str | None) -> None:
    """The first lesson: what `fedtap run canary --broken-mechanism` shows in thousands of trials."""
    defence = parse(Canary(canaries=2, epsilon=1.0, broken_mechanism=broken).done).update

    def client(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(defence(update, None))

    found = faults_of(audited(client, observations=200))
    assert [one.fault for one in found] == [fault] * (fault is not None)


def test_the_least_noise_is_that_of_the_accountant() -> None:
    promise = Promise(2.0, 1e-5, 1.5, adjacency="replacement", rounds=9)
    assert promise.announced == 3.0
    assert promise.sigma(3.0) == pytest.approx(noise_for(2.0, 1e-5, 9.0))
    assert 3.0 / promise.sigma(3.0) == pytest.approx(promise.distance)


def test_the_largest_ratio_of_scales_spends_delta() -> None:
    draw, size, epsilon, delta = np.random.default_rng(0), 20.0, 0.5, 0.05
    factor = largest_ratio(size, epsilon, delta)
    spent = []
    for one, other in ((factor, 1.0), (1.0, factor)):  # E[(1 - exp(ε - loss))+], loss the log of Gamma densities' ratio
        b = draw.gamma(size, size=200_000) / one
        loss = size * math.log(one / other) - (one - other) * b
        spent.append(float(np.maximum(-np.expm1(epsilon - loss), 0).mean()))
    assert max(spent) == pytest.approx(delta, rel=0.05)


def test_laplace_noise_on_many_entries_spends_delta() -> None:
    draw, epsilon, delta = np.random.default_rng(0), 2.0, 0.02
    each = laplace_limit(np.ones(10), epsilon, delta, 1) / 10  # the shift of each entry, in scales
    x = laplace.rvs(size=(100_000, 10), random_state=draw)
    loss = (np.abs(x - each) - np.abs(x)).sum(1)
    assert np.maximum(-np.expm1(epsilon - loss), 0).mean() == pytest.approx(delta, rel=0.1)
    assert laplace_limit(np.ones(10), epsilon, 0.0, 4) == 0.5
    assert laplace_limit(np.array([3.0]), epsilon, delta, 1) == pytest.approx(epsilon - 2 * math.log(1 - delta))


def test_messages_are_read_back_and_seldom_by_chance() -> None:
    draw = np.random.default_rng(0)
    code = Code(100, 7, draw)
    message = draw.choice([-1.0, 1.0], 7)
    direction = draw.normal(size=100)
    assert (code.read(code.written(message) * direction, direction) == message).all()
    assert code.chance(1.0, 1e-5) == pytest.approx(math.e / 128 + 1e-5)
    noise = draw.normal(size=(4000, 100))
    right = sum(bool((code.read(row, direction) == message).all()) for row in noise)
    assert abs(right - 4000 / 128) < 25


def test_the_same_noise_is_drawn_twice_and_seeds_are_seen() -> None:
    import os

    own = np.random.default_rng()
    drawn = []
    for _ in range(2):
        with same_noise(5, [own]):
            drawn.append((torch.randn(3).tolist(), np.random.rand(), os.urandom(4), own.normal()))
    assert drawn[0] == drawn[1]
    assert own.normal() == drawn[0][3]  # it stands where it stood
    with seeds_seen() as seeds:
        torch.Generator().manual_seed(7)
        np.random.default_rng(9)
    assert seeds == [7, 9]


MODULE = """
import torch
from tests.support.dp_mechanisms import clipped, noised, sigma_for, honest_1

def shared(update, state=[0]):
    state[0] += 1
    return noised(clipped(update), sigma_for(1), torch.Generator().manual_seed(2**40 + state[0]))

def asks(update):
    return {"w": clipped({"w": update["w"]})["w"] + sigma_for(1) / 2 * torch.randn(update["w"].shape)}

def exits(update):
    raise SystemExit(4)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's module."""
    (tmp_path / "mechanisms.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """`fedtap audit-dp` with the promise of these tests."""
    return fedtap(monkeypatch, "audit-dp", *words, "--epsilon", "1", "--delta", "1e-5", "--clip", "1", "--out", "out")


def test_a_refuted_promise_exits_3_and_leaves_a_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "mechanisms:shared") == 3
    assert "seed_shared_by_clients" in capsys.readouterr().out
    document = json.loads((folder / "out/audit_dp.json").read_text())
    assert document["schema"] == 1
    assert document["promised"]["sigma_needed"] == pytest.approx(noise_for(1.0, 1e-5, 1.0))
    assert {"fault", "sentence", "observations", "e_value"} <= document["refuted"][0].keys()
    assert document["epsilon_lower_bound"] >= 0
    assert document["observations"] > 100
    assert document["finished"]
    assert document["error"] is None
    page = (folder / "out/audit_dp.html").read_text()
    assert "Two clients draw the same noise" in page
    assert "audited lower bound" in page


def test_names_that_a_mechanism_asks_for_are_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PromiseAuditSettings("mechanisms:asks", folder / "out", {"unit": None} | PROMISED)
    audit = PromiseAudit(settings)
    audit.run()
    assert [one.fault for one in audit.faults] == ["noise_too_small"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mechanisms:honest_1", "--delta", "1e-5"], "--epsilon"),
        (["mechanisms:honest_1", "--epsilon", "1"], "--delta"),
        (["mechanisms:honest_1", "--epsilon", "-1", "--delta", "1e-5"], "promises nothing"),
        (["mechanisms:honest_1", "--epsilon", "1", "--delta", "2"], "no probability"),
        (["mechanisms:honest_1", "--epsilon", "1", "--delta", "1e-5", "--clip", "0"], "no length"),
        (["mechanisms:honest_1", "--epsilon", "1", "--delta", "1e-5", "--unit", "row"], "neither client nor example"),
        (["mechanisms:honest_1", "--epsilon", "1", "--delta", "1e-5", "--adjacency", "swap"], "neither add_remove"),
        (["mechanisms:honest_1", "--epsilon", "1", "--delta", "1e-5", "--rounds", "0"], "releases nothing"),
        (["mechanisms:nothing", "--epsilon", "1", "--delta", "1e-5"], "has no nothing"),
        (["nowhere:mechanism", "--epsilon", "1", "--delta", "1e-5"], "cannot be imported"),
        (["mechanisms", "--epsilon", "1", "--delta", "1e-5"], "names no mechanism"),
        (["tests.support.dp_mechanisms:no_dict", "--epsilon", "1", "--delta", "1e-5"], "dict of tensors"),
        (["tests.support.dp_mechanisms:needs_state", "--epsilon", "1", "--delta", "1e-5"], "needs a state"),
        (["tests.support.dp_mechanisms:stops", "--epsilon", "1", "--delta", "1e-5"], "too few to say anything"),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(folder: Path, words: list[str], said: str) -> None:
    names = {words[at].removeprefix("--"): words[at + 1] for at in range(1, len(words), 2)}
    values = {name: value if name in ("unit", "adjacency") else float(value) for name, value in names.items()}
    if "rounds" in values:
        values["rounds"] = 0
    audit = PromiseAudit(PromiseAuditSettings(words[0], folder / "out", values, seconds=20))
    with pytest.raises(FedtapError) as error:
        audit.run()
    assert said in str(error.value)
    assert json.loads((folder / "out/audit_dp.json").read_text())["error"] == str(error.value)


def test_a_mechanism_that_ends_its_process_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "mechanisms:exits") == 2
    assert "exit code 4" in capsys.readouterr().err
    assert command(monkeypatch, "mechanisms:exits", "--alpha", "2") == 2
    assert "no probability" in capsys.readouterr().err


def test_a_folder_that_is_no_app_is_refused(folder: Path) -> None:
    audit = PromiseAudit(PromiseAuditSettings(str(folder), folder / "out", PROMISED, seconds=20))
    with pytest.raises(FedtapError, match="no Flower app"):
        audit.run()


@pytest.mark.parametrize(("epsilon", "fault"), [(1.0, None), (10.0, "classical_formula")])
def test_a_mod_of_the_train_function_alone_is_found(tmp_path: Path, epsilon: float, fault: str | None) -> None:
    path = app_with_mod(tmp_path / f"own_mod_{epsilon:g}", f"LocalDpMod(1.0, 1.0, {epsilon}, 1e-5)")
    audit = PromiseAudit(PromiseAuditSettings(str(path), tmp_path / "out", dict.fromkeys(PROMISED), seconds=60))
    audit.run()
    assert [one.fault for one in audit.faults] == [fault] * (fault is not None)
    assert audit.promise is not None
    assert audit.promise.epsilon == epsilon
    assert f"the client mod LocalDpMod of own_mod_{epsilon:g} was audited" in audit.notes


def test_the_mods_of_an_app_are_those_of_all_its_train_functions() -> None:
    one, two, three, other = (LocalDpMod(1.0, 1.0, epsilon, 1e-5) for epsilon in (1.0, 2.0, 3.0, 4.0))
    app = ClientApp(mods=[one])

    @app.train(mods=[two])
    def train(message: Message, context: Context) -> Message:
        return message

    @app.train("again", mods=[three, two])
    def again(message: Message, context: Context) -> Message:
        return message

    @app.evaluate(mods=[other])
    def evaluate(message: Message, context: Context) -> Message:
        return message

    assert mods_of(app) == [one, two, three]
    assert mods_of(lambda message, context: message) == []


def test_sampled_rounds_need_the_noise_of_the_accountant() -> None:
    promise = Promise(1.0, 1e-5, 1.0, rounds=100, rate=0.1)
    multiplier = promise.sigma(1.0)
    opacus = Gaussian(multiplier, 1.0, "client", "add/remove", 100, 0.1).guarantee(1e-5).epsilon
    assert opacus == pytest.approx(1.0, abs=0.02)
    assert promise.sigma(1.0) < 0.15 * Promise(1.0, 1e-5, 1.0, rounds=100).sigma(1.0)
    assert 1.0 < promise.distance * multiplier < 1.05  # refuted a little later than needed, and never earlier
    assert promise.epsilon_of(1 / multiplier) <= 1.0 <= promise.epsilon_of(1.05 / multiplier)
    assert "probability 0.1 (Poisson sampling)" in promise.told()["composition"]


def test_sampling_everyone_is_no_sampling() -> None:
    one, other = Promise(2.0, 1e-5, 1.0, rounds=5), Promise(2.0, 1e-5, 1.0, rounds=5, rate=1 - 1e-9)
    assert other.sigma(1.0) == pytest.approx(one.sigma(1.0), rel=0.02)
    assert other.alone == pytest.approx((2.0, 1e-5, 1))
    assert sampled_by(2.0, 1.0) == 2.0
    assert sampled_by(2.0, 0.25) == pytest.approx(math.log(1 + 0.25 * math.expm1(2.0)))


@pytest.mark.parametrize(("share", "refuted"), [(1.0, False), (0.5, True)])
def test_noise_for_sampled_rounds_is_audited(share: float, refuted: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    said = {"epsilon": 1.0, "delta": 1e-5, "clip": 1.0, "rounds": 100, "rate": 0.1}
    sigma = share * Promise(**said).sigma(1.0)  # type: ignore[arg-type]

    def mechanism(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dp_mechanisms.noised(dp_mechanisms.clipped(update), sigma)

    audit = PromiseAudit(PromiseAuditSettings("mechanism", tmp_path, said), promise_of(said, {}))
    found = as_mechanism(mechanism, said, "mechanism")
    audit.audit(found, time.monotonic() + 60)
    assert [one.fault for one in audit.faults] == ["noise_too_small"] * refuted
    told = audit.document()["composition"]
    assert told["promised"] == 1.0
    # of the noise as it was measured, to a few per cent; half of it would spend 2.36
    assert (told["epsilon_with_sampling"] > 1.2) == refuted
    assert told["epsilon_without_sampling"] > 10
    assert "ε = 1 is promised" in told["sentence"]
    assert audit.document()["epsilon_lower_bound"] > (1.0 if refuted else 0.8)
    assert "Poisson" in audit_dp_page(audit.document())


def test_what_an_average_adds_up_to_is_of_the_distance_that_was_measured(tmp_path: Path) -> None:
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 2.0, 1.0, 4)  # σ = 2/4, neighbours 1/4 apart
    said = {"delta": 1e-5, "rounds": 3}
    mechanism = as_mechanism(strategy, said, "strategy")
    audit = PromiseAudit(PromiseAuditSettings("strategy", tmp_path, said), promise_of(said, mechanism.attributes))
    audit.audit(mechanism, time.monotonic() + 60)
    told = audit.document()["composition"]
    assert told["noise_multiplier"] == pytest.approx(2.0, rel=0.02)
    assert told["epsilon_without_sampling"] == pytest.approx(told["promised"], rel=0.03)


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(FedtapError, match="no probability above 0"):
        Promise(1.0, 1e-5, rate=0.0)
    with pytest.raises(FedtapError, match="add/remove alone"):
        Promise(1.0, 1e-5, rate=0.5, adjacency="replacement")


def test_a_strategy_that_draws_clients_says_what_is_not_claimed() -> None:
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_train=0.25), 1.0, 1.0, 4)
    found = as_mechanism(strategy, {"delta": 1e-5}, "strategy")
    assert any("fraction_train is 0.25" in note for note in found.notes)
