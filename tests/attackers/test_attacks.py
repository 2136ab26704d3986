"""What holds for attacks on images beside what test_every_attack.py asks of all, and what holds for single ones."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtap import attackers
from fedtap.attackers import ATTACKS
from fedtap.attackers.gradients import gradinversion
from fedtap.attackers.gradients.dlg import DLG
from fedtap.attackers.gradients.gradinversion import GradInversion
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.inverting_gradients import InvertingGradients
from fedtap.attackers.gradients.linear import Linear
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.parts.gradients import Match, cosine_distance, squared_distance
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.priors import length, statistics_gap, total_variation
from fedtap.attackers.wrappers.refine import Refine
from fedtap.attackers.wrappers.restarts import Restarts
from fedtap.simulator.attack import Attack, Images, Learned, Learner, Reconstruction, _learned, draw
from fedtap.simulator.auxiliary import digest
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, GradientLeak, Leak
from fedtap.simulator.models.copy_detection import BASELINE
from fedtap.simulator.models.registry import build
from fedtap.simulator.registry import Registry
from fedtap.simulator.scores import score_all
from tests.support import checkpoint_leaks
from tests.support.attack_leaks import InPlace, OfTheUsers, WithConstant, auxiliary_for, conv_head, leak_of, pictures

PAGE = (Path(__file__).parents[2] / "docs/adding.md").read_text()


def documented() -> dict[str, type[Attack]]:
    """The documentation's example of an attack, found as a file in the folder would be."""
    section = PAGE.partition("\n## An attack\n")[2]
    file, code = re.search(r"`attackers/(\w+)\.py`", section), re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert file, "the page names no file for its example"
    assert code, "the page has no example of an attack"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{file[1]}.py").write_text(code[1])
        attackers.__path__.append(folder)
        try:
            found = Registry("attack", "fedtap.attackers", ATTACKS.group, ATTACKS.base)
            return {file[1]: found[file[1]]}
        finally:
            attackers.__path__.remove(folder)


CANDIDATES = {**ATTACKS, **documented()}
EVERY = sorted(CANDIDATES)
NAMES = [name for name in EVERY if CANDIDATES[name].reconstructs is Reconstruction]
"""Those that bring back images; attacks on other leaks have tests of their own."""

KINDS = ("gradient", "update")
MODELS = ("lenet", "mlp", "convnet", "vit", "resnet20")
SMALL = "lenet(width=4)"
"""What weights are read from in a moment."""


SCRATCH = Path(tempfile.mkdtemp(prefix="fedtap-tests-"))
atexit.register(shutil.rmtree, SCRATCH)


@cache
def trained() -> str:
    """Path of a trained attack on a small LeNet."""
    path = SCRATCH / "trained.safetensors"
    leak = leak_of(*pictures(1, 1), build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    LTI(width=8, epochs=1).fit(auxiliary_for(leak, SCRATCH)).save(path)
    return str(path)


FITTED: dict[tuple[str, str, str], Attack] = {}


def ready(attack: Attack, leak: Leak, network: nn.Module | None = None, anew: bool = False) -> Attack:
    """The attack, after practice at the leak's weights if it has to; fitted once, unless it is to be anew.

    One that chooses is given documents to choose from.
    """
    if not attack.needs_auxiliary:
        return attack
    if isinstance(leak, CheckpointLeak):
        return attack.fit(checkpoint_leaks.corpus())  # type: ignore[arg-type]
    key = repr(attack), repr(leak.protocol), digest({**(leak.weights or {}), **leak.buffers})
    if anew or key not in FITTED:
        _learned.cache_clear()  # which remembers the last few
        pairs = 120 if attack.name.startswith("identified") else 40  # as many as a last layer has inputs, and more
        FITTED[key] = attack.fit(auxiliary_for(leak, SCRATCH, pairs, network=network))
    return FITTED[key]


def quick(name: str) -> Attack:
    """The attack with few steps; a wrapper around iDLG."""
    every = dataclasses.fields(CANDIDATES[name])  # type: ignore[arg-type]
    fields = {field.name: str(field.type) for field in every if field.default_factory is dataclasses.MISSING}
    given: dict[str, object] = {field: IDLG(steps=4) for field, kind in fields.items() if kind == "Attack"}
    small = {"steps": 6, "times": 2, "seeds": 2, "epochs": 2, "width": 8, "inner": 4, "samples": 6}
    small |= {"encoder": BASELINE}
    given |= {"path": trained()} if "path" in fields else {"model": "lenet"} if "model" in fields else {}
    return CANDIDATES[name](**given, **{field: value for field, value in small.items() if field in fields})


def suited(name: str, victims: int = 2, kinds: Sequence[str] = KINDS, seed: int = 0) -> Leak:
    """A leak that this attack accepts: of the first kind and model that it does."""
    images, labels = pictures(victims, 1, seed=seed)
    for kind, model in itertools.product(kinds, (SMALL,) if name == "identified" else MODELS):
        leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=1234), model, kind=kind, steps=2)
        with contextlib.suppress(FedtapError):
            quick(name).accepts(leak)
            return leak
    pytest.skip(f"{name} does not take a {' or a '.join(kinds)}")


def without_weights(leak: Leak) -> Leak:
    return dataclasses.replace(leak, weights=None, buffers={})


def wants_weights(attack: Attack) -> bool:
    """Whether it, or one that it wraps, needs them; one that learns says so for all of it."""
    if isinstance(attack, Learned):
        return attack.learner.needs_weights
    inside = [] if isinstance(attack, Learner) else [v for v in vars(attack).values() if isinstance(v, Attack)]
    return attack.needs_weights or any(wants_weights(one) for one in inside)


def test_the_names_of_the_command_line_are_fixed() -> None:
    fixed = {"dlg", "idlg", "inverting_gradients", "gradinversion", "linear", "restarts", "refine"}
    assert fixed <= ATTACKS.keys()
    assert not fixed & documented().keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_says_whether_it_needs_the_weights(name: str) -> None:
    leak = suited(name)
    attack = ready(quick(name), leak)
    if wants_weights(attack):
        with pytest.raises(FedtapError, match="does not know them"):
            attack.accepts(without_weights(leak))
    else:
        found = attack(without_weights(leak)).images
        assert found.shape == (2, 1, 3, 16, 16)
        assert bool(((found >= 0) & (found <= 1)).all())


def frozen(*names: str) -> nn.Module:
    """An MLP in which these layers are not trained."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.ReLU(), nn.Linear(16, 10))
    for name in names:
        network.get_submodule(name).requires_grad_(False)
    return network


ODD: dict[str, Callable[[], nn.Module]] = {
    "no linear layer": conv_head,
    "random numbers": lambda: OfTheUsers(True),
    "a plain tensor": lambda: WithConstant(False),
    "written in place": InPlace,
    "first layer frozen": lambda: frozen("1"),
    "last layer frozen": lambda: frozen("3"),
    "all frozen": lambda: frozen("1", "3"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_what_an_attack_accepts_it_can_attack(name: str, odd: str) -> None:
    torch.manual_seed(0)
    images, labels = pictures(2, 2)
    network = ODD[odd]()
    if odd == "all frozen":
        network.requires_grad_(True)
    leak = leak_of(images, labels, network, "own", meta=ODD[odd])
    if odd == "all frozen":
        leak.network.requires_grad_(False)
    attack = quick(name)
    try:
        attack.accepts(leak)
    except FedtapError:
        return
    assert ready(attack, leak, ODD[odd]())(leak).objective.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if wants_weights(quick(name)) and name != "known_image"])
def test_the_image_moves_towards_the_leak(name: str) -> None:
    leak = suited(name)
    attack = ready(quick(name), leak)
    guess = attack(leak, seed=0)
    first = draw(leak.repeat(attack.starts), 0, attack.distribution)[:: attack.starts]
    assert float((guess.images - first).abs().mean()) > 1e-3
    closer = [
        bool((match(guess.images, recovered(leak)) < match(first, recovered(leak))).all())
        for match in (Match(leak, squared_distance), Match(leak, cosine_distance))
    ]
    assert any(closer)


@pytest.mark.parametrize("attack", [IDLG(steps=8), DLG(steps=8), InvertingGradients(steps=8)], ids=repr)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_objective_is_that_of_the_returned_guess_with_the_returned_labels(attack: Attack, batch: int) -> None:
    images, labels = pictures(2, batch)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1), "lenet")
    guess = attack(leak)
    signed = isinstance(attack, InvertingGradients)
    value = Match(leak, cosine_distance if signed else squared_distance)(guess.images, guess.labels)
    value = value + 0.01 * total_variation(guess.images) if signed else value
    torch.testing.assert_close(guess.objective, value, rtol=1e-5, atol=1e-7)


def test_starting_points_depend_on_seed_client_round_and_restart_alone() -> None:
    leak = suited("idlg", victims=3).repeat(2)
    for distribution in ("uniform", "normal"):
        starts = draw(leak, 0, distribution)
        assert len({tuple(start.flatten()[:5].tolist()) for start in starts}) == 6
        for entry in range(6):
            assert torch.equal(starts[entry : entry + 1], draw(leak[entry], 0, distribution))
        assert not torch.isclose(starts, draw(leak, 1, distribution)).flatten(1).all(1).any()
        later = draw(dataclasses.replace(leak, rounds=leak.rounds + 1), 0, distribution)
        assert not torch.isclose(starts, later).flatten(1).all(1).any()
    assert not torch.equal(IDLG(steps=3)(leak, seed=0).images, IDLG(steps=3)(leak, seed=1).images)


@pytest.mark.parametrize(
    "attack",
    [
        IDLG(steps=8),
        DLG(steps=8),
        InvertingGradients(steps=8),
        GradInversion(steps=8, seeds=2),
        Restarts(IDLG(steps=8), 2, enough=1e-3),
        Refine(IDLG(steps=3), IDLG(steps=4)),
    ],
    ids=lambda attack: attack.name,
)
def test_a_victim_among_others_fares_as_it_does_alone(attack: Attack) -> None:
    images, labels = pictures(3, 1)
    network = build("lenet", (3, 16, 16), 10, seed=1).double()
    leak = leak_of(images.double(), labels, network, "lenet")

    def guess(leak: Leak) -> Images:
        return attack(leak, start=draw(leak.repeat(attack.starts), 0, attack.distribution).double()).images

    together = guess(leak)
    for victim in (0, 2):
        torch.testing.assert_close(guess(leak[victim])[0], together[victim], rtol=1e-4, atol=1e-6)


def test_gradinversions_seeds_hold_each_other_together(monkeypatch: pytest.MonkeyPatch) -> None:
    leak, seen = suited("gradinversion"), []
    monkeypatch.setattr(gradinversion, "length", lambda x: seen.append(x.detach().clone()) or length(x))
    apart = []
    for consistency in (0.0, 0.1, 10.0):
        GradInversion(steps=30, seeds=3, consistency=consistency)(leak)
        group = seen[-1].unflatten(0, (2, 3))
        apart.append(float((group - group.mean(1, keepdim=True)).square().mean()))
    assert apart[0] > 1.2 * apart[1] > 1.44 * apart[2]


def test_gradinversion_asks_batchnorm_for_its_statistics() -> None:
    images, labels = pictures(1, 2)
    network = build("resnet20", (3, 16, 16), 10, seed=1)
    leak = leak_of(images, labels, network, "resnet20")
    without, light, heavy = (GradInversion(steps=1, seeds=1, step_size=0.0, statistics=w)(leak) for w in (0, 1, 2))
    gap = statistics_gap(leak.network, leak.weights or {}, leak.buffers, without.images[0])
    torch.testing.assert_close(light.objective - without.objective, gap[None], rtol=1e-3, atol=0)
    torch.testing.assert_close(heavy.objective - without.objective, 2 * gap[None], rtol=1e-3, atol=0)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    (mean, variance), drawn = torch.rand(2, 3), images[0] + torch.randn(2, 3, 16, 16, generator=torch.Generator())
    known = {"0.running_mean": mean, "0.running_var": variance}
    away = drawn.mean((0, 2, 3)) - mean, drawn.var((0, 2, 3), correction=0) - variance
    torch.testing.assert_close(
        statistics_gap(norm, dict(norm.named_parameters()), known, drawn), away[0].norm() + away[1].norm()
    )
    drift_norm, drawn = (GradInversion(steps=2, seeds=1, statistics=weight)(leak).images for weight in (0.0, 100.0))
    assert not torch.allclose(drift_norm, drawn, atol=1e-3)


def test_idlg_and_dlg_bring_the_picture_back() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    for attack in (IDLG(steps=150), DLG(steps=150)):
        guess = attack(leak)
        assert torch.equal(guess.labels, labels)
        assert float((guess.images - images).square().mean()) < 1e-3


def test_a_match_is_over_where_the_wire_rounds_more() -> None:
    leak = suited("idlg")
    start = draw(leak, 0, "uniform")
    rough = dataclasses.replace(leak, resolution=1e3)
    assert torch.equal(IDLG(steps=20)(rough, start=start).images, start)
    assert Match(rough, squared_distance).tolerance > 1
    assert Match(leak, squared_distance).tolerance == 0


@dataclasses.dataclass(frozen=True)
class Dice(Attack):
    """Returns its start; the objective is the start's mean, NaN over a half."""

    leaks = (GradientLeak,)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        value = start.flatten(1).mean(1)
        return Reconstruction(start, recovered(leak), torch.where(value > 0.5, torch.nan, value))


def test_restarts_keep_the_lowest_objective() -> None:
    leak = suited("restarts", victims=3)
    starts = draw(leak.repeat(6), 0, "uniform")
    means = starts.flatten(1).mean(1).reshape(3, 6)
    guess = Restarts(Dice(), 6)(leak, start=starts)
    assert torch.equal(guess.objective, means.min(1).values)
    assert torch.equal(guess.images, starts.unflatten(0, (3, 6))[torch.arange(3), means.argmin(1)])
    middle = float(means[:, 0].sort().values[1])  # one victim's first start is above: it alone gets the others
    sparing = Restarts(Dice(), 6, enough=middle)(leak, start=starts)
    first_will_do = means[:, 0] <= min(middle, 0.5)
    expected = torch.where(first_will_do, means[:, 0], means.min(1).values)
    assert torch.equal(sparing.objective, expected)


def test_refine_starts_where_the_first_attack_ended() -> None:
    leak = suited("refine")
    first = IDLG(steps=30)(leak, seed=2)
    refined = Refine(IDLG(steps=30), IDLG(steps=2))(leak, seed=2)
    torch.testing.assert_close(refined.images, IDLG(steps=2)(leak, start=first.images).images)
    assert bool((refined.objective <= first.objective).all())


def test_refine_pairs_the_images_of_a_batch_with_their_labels() -> None:
    images, labels = pictures(6, 2)
    leak = leak_of(images, labels, build("mlp", (3, 16, 16), 10, seed=1234), "mlp")
    linear, idlg, refined = (attack(leak) for attack in (Linear(), IDLG(steps=15), Refine(Linear(), IDLG(steps=15))))
    start, end = (
        torch.tensor([score["mse"] for score in score_all(guess.images, guess.labels, images, labels)])
        for guess in (linear, refined)
    )
    assert bool((end <= start.clamp_min(1e-6)).all())
    assert bool((refined.objective <= idlg.objective).all())


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_linear_is_exact_for_one_image_and_needs_no_weights(kind: str) -> None:
    leak = suited("linear", kinds=[kind])
    images, labels = pictures(2, 1)
    guess = Linear()(without_weights(leak))
    assert torch.equal(guess.labels, labels)
    torch.testing.assert_close(guess.images, images, rtol=0, atol=1e-3)
    assert float(guess.objective.max()) < 1e-6


def test_linear_undoes_what_stands_before_the_layer() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3 * 16 * 16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(((x - 0.4) / 0.2).flatten(1))  # type: ignore[no-any-return]

    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, Shifted(), "mlp_of_mine", meta=Shifted)
    torch.testing.assert_close(Linear()(leak).images, images, rtol=0, atol=1e-3)


def test_linear_finds_images_of_a_batch_that_units_see_alone() -> None:
    images, labels = pictures(4, 3)
    leak = leak_of(images, labels, build("mlp", (3, 16, 16), 10, seed=1234), "mlp")
    guess = Linear()(leak).images
    nearest = (guess[:, :, None] - images[:, None]).square().mean((3, 4, 5)).min(2).values
    assert float((nearest < 1e-4).float().mean()) > 0.3
    assert float(Linear()(leak).objective.max()) <= 1


@pytest.mark.parametrize("model", ["lenet", "convnet", "resnet20", "vit"])
def test_linear_names_the_layer_in_its_way(model: str) -> None:
    images, labels = pictures(1, 1)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=0), model)
    with pytest.raises(FedtapError, match=r"begins with .*Conv2d"):
        Linear()(leak)
