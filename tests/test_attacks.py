"""What holds for every attack in the folder, found by scanning it."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from attackers import ATTACKS
from attackers.dlg import DLG
from attackers.idlg import IDLG
from attackers.inverting_gradients import InvertingGradients
from attackers.parts.gradients import Match, cosine_distance, squared_distance
from attackers.parts.labels import recovered
from attackers.parts.priors import total_variation
from attackers.refine import Refine
from attackers.restarts import Restarts
from simulator.attack import Attack, Images, Reconstruction, draw
from simulator.errors import FedtapError
from simulator.leaks import GradientLeak, Leak
from simulator.models import build
from tests.attack_leaks import leak_of, pictures

NAMES = sorted(ATTACKS)


def quick(name: str) -> Attack:
    """The attack with few steps; a wrapper around iDLG."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(ATTACKS[name])}  # type: ignore[arg-type]
    given = {field: IDLG(steps=6) for field, kind in fields.items() if kind == "Attack"}
    small = {"steps": 12, "times": 2, "seeds": 2}
    return ATTACKS[name](**given, **{field: value for field, value in small.items() if field in fields})


def suited(name: str, victims: int = 2, kind: str = "gradient", seed: int = 0) -> Leak:
    """A leak that this attack can use."""
    model = "mlp" if name == "linear" else "lenet"
    images, labels = pictures(victims, 1, seed=seed)
    return leak_of(images, labels, build(model, (3, 16, 16), 10, seed=1234), model, kind=kind, steps=2)


def test_the_names_of_the_command_line_are_fixed() -> None:
    fixed = {"dlg", "idlg", "inverting_gradients", "gradinversion", "linear", "restarts", "refine"}
    assert fixed <= ATTACKS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_a_frozen_value_that_cites_its_paper(name: str) -> None:
    attack = quick(name)
    assert attack == quick(name)
    assert name in {type(attack).__module__.rpartition(".")[2]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.surprise = 1  # type: ignore[attr-defined]
    said = sys.modules[type(attack).__module__].__doc__ or ""
    assert re.search(r"https://\S+", said) or "wrapper without a paper" in said
    assert said.splitlines()[0].endswith(".")
    assert type(attack).__doc__


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_an_attack_repeats_itself_to_the_bit_and_leaves_the_leak_as_it_was(name: str, kind: str) -> None:
    leak = suited(name, kind=kind)
    if not isinstance(leak, quick(name).leaks):
        pytest.skip(f"{name} does not take a {kind}")
    groups = (leak.observed, leak.weights or {}, leak.buffers)
    before = [{key: tensor.clone() for key, tensor in group.items()} for group in groups]
    one, two = quick(name)(leak, seed=3), quick(name)(leak, seed=3)
    for field in ("images", "labels", "objective"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert one.objective.isfinite().all()
    assert bool(((one.images >= 0) & (one.images <= 1)).all())
    for group, kept in zip(groups, before, strict=True):
        assert all(torch.equal(tensor, kept[key]) for key, tensor in group.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_refuses_what_it_cannot_use(name: str) -> None:
    leak, attack = suited(name), quick(name)

    class OtherLeak(Leak):
        kind = "gradient"

    with pytest.raises(FedtapError, match="works on a"):
        attack(OtherLeak(**{field.name: getattr(leak, field.name) for field in dataclasses.fields(leak)}))
    key = next(iter(leak.observed))
    broken = leak.observed[key].clone()
    broken[1, 0] = torch.nan
    with pytest.raises(FedtapError, match="NaN"):
        attack(dataclasses.replace(leak, observed={**leak.observed, key: broken}))
    blind = dataclasses.replace(leak, weights=None, buffers={})
    if name == "linear":
        assert attack(blind).images.shape == (2, 1, 3, 16, 16)
    else:
        with pytest.raises(FedtapError, match="does not know them"):
            attack(blind)


@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_leak_teaches_nothing(name: str) -> None:
    images, _ = pictures(2, 1)
    guess = quick(name)(suited(name, seed=7)).images
    error, grey = ((images - other).square().mean() for other in (guess, images.mean().expand_as(images)))
    assert float(error) > 0.9 * float(grey)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "linear"])
def test_the_image_moves_towards_the_leak(name: str) -> None:
    leak = suited(name)
    attack = quick(name)
    start = draw(leak.repeat(attack.starts), 0, attack.distribution)
    guess = attack(leak, seed=0)
    match = Match(leak, squared_distance)
    first = start[:: attack.starts]
    assert float((guess.images - first).abs().mean()) > 1e-3
    labels = recovered(leak)
    distance = cosine_distance if name == "inverting_gradients" else squared_distance
    match = Match(leak, distance)
    assert bool((match(guess.images, labels) < match(first, labels)).all())


@pytest.mark.parametrize("attack", [IDLG(steps=20), DLG(steps=20), InvertingGradients(steps=20)], ids=repr)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_objective_is_that_of_the_returned_guess_with_the_returned_labels(attack: Attack, batch: int) -> None:
    images, labels = pictures(2, batch)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1), "lenet")
    guess = attack(leak)
    signed = isinstance(attack, InvertingGradients)
    value = Match(leak, cosine_distance if signed else squared_distance)(guess.images, guess.labels)
    value = value + 0.01 * total_variation(guess.images) if signed else value
    torch.testing.assert_close(guess.objective, value, rtol=1e-5, atol=1e-7)


def test_a_victim_among_others_fares_as_it_does_alone() -> None:
    images, labels = pictures(3, 1)
    network = build("lenet", (3, 16, 16), 10, seed=1).double()
    leak = leak_of(images.double(), labels, network, "lenet")
    for attack in (IDLG(steps=15), DLG(steps=15), InvertingGradients(steps=15)):
        start = draw(leak, 0, attack.distribution).double()
        together = attack(leak, start=start)
        for victim in range(3):
            alone = attack(leak[victim], start=start[victim : victim + 1])
            torch.testing.assert_close(alone.images[0], together.images[victim], rtol=1e-4, atol=1e-6)


def test_idlg_and_dlg_bring_the_picture_back() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    for attack in (IDLG(steps=250), DLG(steps=250)):
        guess = attack(leak)
        assert torch.equal(guess.labels, labels)
        assert float((guess.images - images).square().mean()) < 1e-3


def test_a_match_is_over_where_the_wire_rounds_more() -> None:
    leak = suited("idlg")
    start = draw(leak, 0, "uniform")
    rough = dataclasses.replace(leak, resolution=1e3)
    assert torch.equal(IDLG(steps=20)(rough, start=start).images, start)
    assert Match(rough, squared_distance).floor > 1
    assert Match(leak, squared_distance).floor == 0


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


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_linear_is_exact_for_one_image_and_needs_no_weights(kind: str) -> None:
    leak = suited("linear", kind=kind)
    images, labels = pictures(2, 1)
    guess = ATTACKS["linear"]()(dataclasses.replace(leak, weights=None, buffers={}))
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
    torch.testing.assert_close(ATTACKS["linear"]()(leak).images, images, rtol=0, atol=1e-3)


def test_linear_finds_images_of_a_batch_that_units_see_alone() -> None:
    images, labels = pictures(4, 3)
    leak = leak_of(images, labels, build("mlp", (3, 16, 16), 10, seed=1234), "mlp")
    guess = ATTACKS["linear"]()(leak).images
    nearest = (guess[:, :, None] - images[:, None]).square().mean((3, 4, 5)).min(2).values
    assert float((nearest < 1e-4).float().mean()) > 0.3
    assert float(ATTACKS["linear"]()(leak).objective.max()) <= 1


@pytest.mark.parametrize("model", ["lenet", "convnet", "resnet20", "vit"])
def test_linear_names_the_layer_in_its_way(model: str) -> None:
    images, labels = pictures(1, 1)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=0), model)
    with pytest.raises(FedtapError, match=r"begins with .*Conv2d"):
        ATTACKS["linear"]()(leak)
