"""Attacks that know the defence: what they compare, that it helps, and that it helps by what is known alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtap.attackers import parse as attacks_of
from fedtap.attackers.baselines.ridge import Ridge
from fedtap.attackers.gradients.dlg import DLG
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.inverting_gradients import InvertingGradients
from fedtap.attackers.parts.adaptive import KINK, ROUGHNESS, SOFTNESS, MatchingObjective, informed
from fedtap.attackers.parts.gradients import Match, mean_gradient, relative_distance, squared_distance
from fedtap.attackers.parts.priors import smooth_variation, total_variation
from fedtap.attackers.wrappers.best_of import BestOf, implausible
from fedtap.attackers.wrappers.restarts import Restarts
from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.attack import Attack
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.chained import parse, sigma
from fedtap.simulator.defences.notation import described, kind_of
from fedtap.simulator.federation.scoring import adaptation
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import run
from fedtap.simulator.scores import mse, psnr
from fedtap.simulator.wire.grid import LocalGrid
from tests.attackers.test_gradients import plain_answer
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures

MATCHING: tuple[Attack, ...] = (IDLG(steps=6), DLG(steps=6), InvertingGradients(steps=6))


def defended(text: str, victims: int = 3, said: str = "", model: str = "lenet") -> tuple[Leak, Tensor, Tensor]:
    """What honest clients under this defence send, announced as `said`; and the truth."""
    images, labels = pictures(victims, 1)
    network = build(model, (3, 16, 16), 10, seed=5)
    leak = leak_of(images, labels, network, model)
    defences, draws = parse(text), [torch.Generator().manual_seed(victim) for victim in range(victims)]
    sent = gradients(network, images, labels)
    if defences.step:
        sent = defences.step.stacked(network, images, labels, draws)
    if defences.update:
        sent = defences.update.stacked(sent, draws)
    protocol = dataclasses.replace(leak.protocol, defence=said or text)
    return dataclasses.replace(leak, observed=sent, protocol=protocol), images, labels


def db(guess: Tensor, truth: Tensor) -> float:
    return float(psnr(mse(guess.flatten(0, 1), truth.flatten(0, 1))).mean())


@pytest.mark.parametrize("attack", MATCHING, ids=repr)
@pytest.mark.parametrize("said", ["none", "central_dp(1.0, 0.1)", "of my own"])
def test_where_nothing_is_known_it_is_the_same_attack(attack: Attack, said: str) -> None:
    leak, _, _ = defended("none", said=said)
    adaptive: Attack = dataclasses.replace(attack, adaptive=True)  # type: ignore[call-arg,type-var]
    one, two = attack(leak, seed=1), adaptive(leak, seed=1)
    for field in ("images", "labels", "objective"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert (attack.adapts, adaptive.adapts, Restarts(adaptive, 2).adapts) == (False, True, True)


def slow(text: str, leak: Leak, victim: int, answer: dict[str, Tensor]) -> Tensor:
    """The oracle: the relative distance in the space of what was sent, entry by entry in one long vector."""
    heard = torch.cat([leak.observed[name][victim].flatten() for name in answer])
    ours = {name: tensor.flatten() for name, tensor in answer.items()}
    flat = torch.cat(list(ours.values()))
    sizes = torch.ones_like(flat)
    if text.startswith("prune"):
        flat = flat * (heard != 0)
    if text.startswith("soteria"):
        ours["fc.weight"] = ours["fc.weight"] * (leak.observed["fc.weight"][victim].flatten() != 0)
        flat = torch.cat(list(ours.values()))
    if text.startswith(("clip", "dp_sgd", "local_dp")):
        flat = flat * min(1.0, 1.0 / float(flat.norm()))
    if "sign" in text:
        flat = torch.cat([torch.tanh(t / (SOFTNESS * t.square().mean().sqrt())) for t in ours.values()])
    if "quantise" in text:
        spread = sigma(leak.protocol)
        steps = [float(t.max() - t.min()) / 15 for t in (leak.observed[name][victim] for name in answer)]
        each = [torch.full_like(t, math.sqrt(s**2 / 6 + spread**2)) for t, s in zip(ours.values(), steps, strict=True)]
        sizes = torch.cat(each).clamp_min(1e-12)
    if text.startswith("laplace"):
        scale = float(sigma(leak.protocol)) / math.sqrt(2)
        return 4 * scale * ((flat - heard).square() + (KINK * scale) ** 2).sqrt().sum() / heard.square().sum()
    return ((flat - heard) / sizes).square().sum() / (heard / sizes).square().sum()


EVERY = (
    "clip(1.0)",
    "noise(0.01)",
    "laplace(0.01)",
    "prune(0.8)",
    "sign()",
    "clip(1.0)+sign()",
    "quantise(4)",
    "noise(0.05)+quantise(4)",
    "soteria(0.4)",
    "dp_sgd(1.0, 0.01)",
    "local_dp(1.0, 2.0, 100.0, 1e-05)",
)


@pytest.mark.parametrize("text", EVERY)
def test_the_aware_distance_is_the_plain_one_written_out(text: str) -> None:
    leak, images, labels = defended(text)
    known = informed(leak, relative_distance)
    assert known is not None
    guess = (0.7 * images + 0.3 * images.flip(0)).clone()
    found = Match(leak, known.distance)(guess, labels)
    network = build("lenet", (3, 16, 16), 10, seed=5)
    for victim in range(3):
        target = torch.nn.functional.one_hot(labels[victim], 10).float()
        answer = {k: t.detach() for k, t in plain_answer(leak, network, guess[victim], target).items()}
        torch.testing.assert_close(found[victim], slow(text, leak, victim, answer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["clip(1.0)", "prune(0.9)", "soteria(0.5)", "clip(0.5)+prune(0.5)"])
def test_at_the_truth_nothing_is_amiss_though_the_plain_distance_says_so(text: str) -> None:
    leak, images, labels = defended(text)
    known = informed(leak, relative_distance)
    assert known is not None
    assert float(Match(leak, known.distance)(images, labels).max()) < 1e-6
    assert float(Match(leak, relative_distance)(images, labels).min()) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_clipped_examples_are_met_at_their_means_length(batch: int) -> None:
    images, labels = pictures(2, batch)
    network = build("lenet", (3, 16, 16), 10, seed=5)
    leak = leak_of(images, labels, network, "lenet")
    sent = parse("dp_sgd(0.5, 0.0)").step.stacked(network, images, labels, [torch.Generator()] * 2)  # type: ignore[union-attr]
    protocol = dataclasses.replace(leak.protocol, defence="dp_sgd(0.5, 0.0)")
    leak = dataclasses.replace(leak, observed=sent, protocol=protocol)
    known = informed(leak, relative_distance)
    assert known is not None
    adaptive, plain = (Match(leak, distance)(images, labels) for distance in (known.distance, relative_distance))
    assert float(adaptive.max()) < (1e-6 if batch == 1 else 0.1)
    assert float((plain / adaptive.clamp_min(1e-9)).min()) > 100


def far(answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """The sum of distances."""
    return torch.stack([(answer[name] - leaked[name]).abs().sum() for name in leaked]).sum()


@pytest.mark.parametrize("text", ["noise(0.02)", "laplace(0.02)"])
def test_the_objective_under_noise_is_the_posterior(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.attackers.parts.adaptive.KINK", 1e-4)
    leak, images, labels = defended(text)
    guess, spread = images.flip(0).contiguous(), sigma(leak.protocol)
    found = MatchingObjective(leak, adaptive=True)(guess, labels)
    energy = torch.stack([tensor.square().flatten(1).sum(1) for tensor in mean_gradient(leak).values()]).sum(0)
    likelihood = Match(leak, squared_distance)(guess, labels) / (2 * spread**2)
    if text.startswith("laplace"):
        likelihood = Match(leak, far)(guess, labels) / 0.02
    expected = likelihood + ROUGHNESS * guess[0].numel() * smooth_variation(guess)
    torch.testing.assert_close(found * energy / (2 * spread**2), expected, rtol=1e-4, atol=0)


def test_the_smooth_variation_is_nearly_the_variation_and_has_a_slope() -> None:
    images, _ = pictures(2, 2)
    torch.testing.assert_close(smooth_variation(images), total_variation(images), atol=0.02, rtol=0)
    flat = torch.full((1, 1, 3, 4, 4), 0.5).requires_grad_()
    smooth_variation(flat).sum().backward()
    assert flat.grad is not None
    assert not flat.grad.any()


@pytest.mark.parametrize(("kind", "steps"), [("gradient", 1), ("update", 4)])
def test_of_several_steps_the_mean_gradients_noise_is_that_much_less(kind: str, steps: int) -> None:
    network = build("lenet", (3, 16, 16), 10, seed=1)
    leak = leak_of(*pictures(1, 1), network, "lenet", kind=kind, steps=steps)
    noisy = dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, defence="noise(0.1)"))
    known = informed(noisy, squared_distance)
    assert known is not None
    assert known.distance.error == pytest.approx(0.1 / steps)


@pytest.mark.parametrize("adaptive", [IDLG(steps=3, adaptive=True), DLG(steps=3, adaptive=True)], ids=repr)
def test_the_slope_is_that_of_the_value(adaptive: Attack) -> None:
    leak, images, labels = defended("noise(0.02)+quantise(6)")
    objective = MatchingObjective(leak, adaptive=True)
    x = (0.8 * images + 0.3).requires_grad_()  # some pixels are outside
    values, slope = objective.with_input_gradient(x, labels)
    again = objective(x, labels)
    torch.testing.assert_close(values, again.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(again.sum(), x)[0])
    assert bool(adaptive(leak).images.isfinite().all())


@pytest.mark.parametrize(
    ("text", "said", "steps"),
    [("clip(1.0)", "prune(0.9)", 25), ("soteria(0.5)", "clip(1.0)", 25), ("prune(0.5)", "soteria(0.5)", 50)],
)
def test_who_knows_the_defence_sees_more_and_who_is_told_of_another_does_not(text: str, said: str, steps: int) -> None:
    wrong, images, _ = defended(text, victims=2, said=said)
    right, _, _ = defended(text, victims=2)
    misled, knowing = (db(IDLG(steps=steps, adaptive=True)(leak).images, images) for leak in (wrong, right))
    plain = db(IDLG(steps=steps)(right).images, images)
    assert misled < plain + 3 < knowing


def test_a_panel_takes_each_victims_more_plausible_guess_and_says_whose_it_is() -> None:
    leak, _, _ = defended("soteria(0.5)", victims=3)
    weak, strong = IDLG(steps=3), IDLG(steps=10, adaptive=True)
    alone = [attack(leak, seed=4) for attack in (weak, strong)]
    best = BestOf(weak, Restarts(strong, 1))(leak, seed=4)
    judged = torch.stack([implausible(leak, guess.images, guess.labels) for guess in alone])
    for victim, which in enumerate(judged.argmin(0).tolist()):
        assert torch.equal(best.images[victim], alone[which].images[victim])
        assert best.made_by[victim] == [weak.written(), Restarts(strong, 1).written()][which]
    torch.testing.assert_close(best.objective, judged.amin(0))
    nested = BestOf(BestOf(weak, strong), weak)(leak, seed=4)
    assert torch.equal(nested.images, best.images)
    assert set(nested.made_by) <= {weak.written(), strong.written()}
    for number, which in enumerate((0, 1, 0)):
        assert torch.equal(nested.candidates[number], alone[which].images)


def test_a_panel_judges_what_is_not_finite_worst() -> None:
    leak, images, labels = defended("none", victims=2)
    broken = images.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    assert implausible(leak, broken, labels).isfinite().tolist() == [False, True]


def test_a_panel_judges_signs_and_not_how_soft_they_are() -> None:
    leak, images, labels = defended("sign()")
    known = informed(leak, relative_distance)
    assert known is not None
    torch.testing.assert_close(implausible(leak, images, labels), known.prior(images), rtol=0, atol=1e-3)
    assert float((MatchingObjective(leak, adaptive=True)(images, labels) - known.prior(images)).min()) > 0.01


def test_the_scenario_plays_defences_of_every_client_side_hook() -> None:
    parts = plan("defences", {})
    named = {part.name for one in parts for part in described(one.defence)}
    assert len(named) >= 10
    assert {kind_of(name).hook for name in named} == {"model", "step", "update"}
    for one in parts:
        assert [attack.adapts for attack in one.attacks] == [False, True, False, True]


@pytest.mark.parametrize(
    ("attack", "defence", "adapts", "note"),
    [
        ("idlg", "sign()", False, None),
        ("idlg(adaptive=True)", "sign()", True, None),
        ("idlg(adaptive=True)", "clip(1.0)+noise(0.1)", True, None),
        ("idlg(adaptive=True)", "precode(64)", False, "does not know precode(64)"),
        ("dlg(adaptive=True)", "precode(64)+clip(1.0)", False, "does not know precode(64)"),
        ("restarts(inverting_gradients(adaptive=True),2)", "precode(8)", False, "does not know precode(8)"),
        ("best_of(idlg,idlg(adaptive=True))", "prune(0.9)", True, None),
        ("best_of(idlg,idlg(adaptive=True))", "precode(64)", False, "does not know precode(64)"),
        ("idlg(adaptive=True)", "none", True, None),
        ("idlg", "none", False, None),
        ("idlg(adaptive=True)", "central_dp(1.0, 0.1)", True, None),  # done after the answer was heard
        ("idlg", "central_dp(1.0, 0.1)", False, None),
        ("coarse_git", "precode(64)", True, None),  # its pairs went through the same bottleneck
        ("exact_git", "clip(1.0)+noise(0.1)", True, None),
        ("exact_git", "sign()", False, None),
        ("gauss_newton", "noise(0.1)", True, None),
        ("gauss_newton", "clip(1.0)+noise(0.1)", False, None),
    ],
)
def test_who_counts_as_adapted_takes_the_whole_defence_into_account(
    attack: str, defence: str, adapts: bool, note: str | None
) -> None:
    (made,) = attacks_of(attack)
    assert adaptation(made, defence) == {"adaptive": adapts} | ({"adaptive_note": note} if note else {})


@pytest.mark.parametrize("attack", MATCHING, ids=repr)
def test_what_an_aware_attack_does_not_know_leaves_it_as_it_was(attack: Attack) -> None:
    """And every defence of an answer that it says it knows changes it."""
    adaptive: Attack = dataclasses.replace(attack, adaptive=True)  # type: ignore[call-arg,type-var]
    texts = [str(part) for one in plan("defences", {}) for part in described(one.defence)]
    leak, _, _ = defended("none")
    for text in texts:
        told = dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, defence=text))
        assert (informed(told, squared_distance) is None) == bool(adaptive.unknown(text)), text


def test_what_practised_under_another_defence_is_not_adapted_to_this_one(tmp_path: Path) -> None:
    leak, _, _ = defended("none", model="mlp")
    learned = Ridge(features=64).fit(auxiliary_for(leak, tmp_path, pairs=8))
    assert adaptation(learned, "none") == {"adaptive": True}
    assert adaptation(learned, "sign()") == {"adaptive": False, "adaptive_note": "does not know sign()"}


def test_rows_say_what_was_adapted_and_whose_guess_it_is(tmp_path: Path) -> None:
    text = "idlg(steps=3),best_of(idlg(steps=3),idlg(steps=3,adaptive=True))"
    parts = plan("defences", {"victims": 1, "size": 16, "defence": "sign()", "attack": text})
    grid = LocalGrid(client_app(lambda config: parts), 2)
    run(parts, lambda part: grid, tmp_path / "out", device=torch.device("cpu"), data_root=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    wanted = {"defence", "attack", "adaptive", "psnr", "psnr_blind", "recovered", "accuracy", "overhead"}
    assert all(wanted <= row.keys() for row in rows)
    assert [row["adaptive"] for row in rows] == [False, True]
    assert rows[0]["upper_bound_psnr"] is None
    assert rows[1]["upper_bound_psnr"] >= max(rows[0]["psnr"], rows[1]["psnr"]) - 1e-3
    assert rows[1]["strongest"] in {
        attack.written() for attack in attacks_of("idlg(steps=3),idlg(steps=3,adaptive=True)")
    }
