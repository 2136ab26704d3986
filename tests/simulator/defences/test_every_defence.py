"""What holds for every defence that the scan of the folder finds; a new one is found and tested here by itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences import notation
from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    HOOKS,
    Argument,
    Defence,
    Density,
    Exchange,
    ModelDefence,
    Range,
    ServerDefence,
    StepDefence,
    UpdateDefence,
)
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.notation import described, first_line, kind_of, names, usage, written
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.registry import build
from tests.support.defences import batch_of, drawn, flat, update

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "simulator" / "defences"
NAMES = [name for name in names() if (FOLDER / f"{name}.py").is_file()]


def some(argument: Argument) -> float:
    """A value in the middle of the argument's range."""
    low, high = argument.range.low, min(argument.range.high, argument.range.low + 1)
    middle = argument.range.strengths[len(argument.range.strengths) // 2] if argument.range.strengths else None
    return middle if middle is not None else (low + high) / 2


def example(name: str) -> Defence:
    return kind_of(name)(*map(some, kind_of(name).arguments()))  # type: ignore[call-arg]


def values(argument: Argument) -> st.SearchStrategy[float]:
    low, high, ends = argument.range.low, argument.range.high, argument.range.ends
    if argument.whole:
        return st.integers(math.ceil(low), math.floor(min(high, low + 1000)))
    top, without_top = (None, False) if high == math.inf else (high, not ends[1])
    return st.floats(low, top, exclude_min=not ends[0], exclude_max=without_top, allow_infinity=False)


def sent(defence: Defence, seed: int, exchanges: int = 2) -> dict[str, Tensor]:
    """What a defence of clients makes of the same gradients, or images, in each exchange."""
    draws = [drawn(seed, which) for which in range(exchanges)]
    if isinstance(defence, UpdateDefence):
        return defence.stacked({n: t.expand(exchanges, *t.shape) for n, t in update().items()}, draws)
    assert isinstance(defence, StepDefence)
    images, labels = batch_of(1, 2)
    return defence.stacked(network(), images.expand(exchanges, -1, -1, -1, -1), labels.expand(exchanges, -1), draws)


def network() -> torch.nn.Module:
    return build("mlp(width=8)", (3, 16, 16), 10, seed=1)


STEPS = [name for name in NAMES if kind_of(name).hook == "step"]
CLIENTS = [name for name in NAMES if kind_of(name).hook in ("step", "update")]
UPDATES = [name for name in NAMES if kind_of(name).hook == "update"]


def test_each_file_that_defines_a_defence_is_found() -> None:
    """Counted another way: by reading the folder's files, without importing them."""
    bases = ("ModelDefence", "StepDefence", "UpdateDefence", "ServerDefence")
    found = {
        file.stem
        for file in FOLDER.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and file.stem != "defence"
        if any(isinstance(base, ast.Name) and base.id in bases for base in node.bases)
    }
    assert found == set(NAMES)
    assert len(found) >= 11


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_cited_frozen_value_named_after_its_file(name: str) -> None:
    kind = kind_of(name)
    assert kind.__name__.lower() == name.replace("_", "")
    assert kind.name == name
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "https://" in (kind.__doc__ or "")
    assert "https://" in (sys.modules[kind.__module__].__doc__ or "")
    assert first_line(name).endswith(".")
    assert [field.name for field in dataclasses.fields(kind)] == [one.name for one in kind.arguments()]  # type: ignore[arg-type]
    for argument in kind.arguments():
        assert f"{argument.name}: " in (kind.__doc__ or ""), f"{argument.name} is not documented"


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_it_is_written_and_read_back(name: str, data: st.DataObject) -> None:
    kind = kind_of(name)
    made = kind(*(data.draw(values(argument)) for argument in kind.arguments()))  # type: ignore[call-arg]
    assert described(str(made)) == (made,)
    assert written(described(str(made))) == str(made)
    assert usage(name).startswith(f"{name}(")


@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_what_is_out_of_range(name: str) -> None:
    kind = kind_of(name)
    for place, argument in enumerate(kind.arguments()):
        low, high, ends = argument.range.low, argument.range.high, argument.range.ends
        wrong = [math.nan, math.inf, True, "1", low - 1, *([] if ends[0] else [low]), *([high] if not ends[1] else [])]
        for value in [*wrong, *([low + 0.5] if argument.whole else [])]:
            given_ = [some(one) for one in kind.arguments()]
            with pytest.raises(FedtapError, match=f"{argument.name} of {name} is .*, and it is a ") as caught:
                kind(*given_[:place], value, *given_[place + 1 :])  # type: ignore[call-arg]
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", NAMES)
def test_its_strengths_are_of_its_range_and_come_in_one_argument(name: str) -> None:
    made = example(name)
    strong = [argument for argument in made.arguments() if argument.range.strengths]
    assert len(strong) <= 1
    for text in notation.strengths(str(made)):
        (part,) = described(text)
        assert type(part) is type(made)
        changed = [a for a, one, two in zip(made.arguments(), part.values, made.values, strict=True) if one != two]
        assert set(changed) <= set(strong)


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_every_question_itself(name: str) -> None:
    """In its own class: no answer is inherited, and so none is silent."""
    kind, made = kind_of(name), example(name)
    questions = Defence.__abstractmethods__
    assert {"survives", "error", "replay", "averaged", "bound", "release", "check"} <= questions
    assert questions <= vars(kind).keys()
    assert kind.hook in HOOKS
    assert made.survives <= EVERYTHING
    assert made.bound(math.inf) > 0
    assert made.bound(1.0) >= min(1.0, made.bound(math.inf))
    assert made.averaged(1) == made
    assert type(made.averaged(9)) is kind
    error = made.error(batch=2)
    if error is not None:
        assert error.spread > 0 or error.steps is not None
    try:
        release = made.release(1.0, "replace", 3, 2)
    except FedtapError:
        assert error is not None, "only noise that no accountant covers is refused"
    else:
        assert release is None or (isinstance(release, Gaussian) and release.releases % 3 == 0)


@pytest.mark.parametrize("name", UPDATES)
def test_what_it_says_of_its_bound_holds(name: str) -> None:
    made = example(name)
    assert isinstance(made, UpdateDefence)
    length = float(flat(update()).norm())
    for which in range(5):
        assert float(flat(made(update(), drawn(which))).norm()) <= made.bound(length) * (1 + 1e-6)


@pytest.mark.parametrize("name", CLIENTS)
def test_it_is_deterministic_under_a_seed(name: str) -> None:
    made = example(name)
    one, again, other = sent(made, 0), sent(made, 0), sent(made, 1)
    assert all(torch.equal(one[key], again[key]) for key in one)
    same = all(torch.equal(one[key], other[key]) for key in one)
    assert same == (made.error(batch=2) is None), "what is random has an error that is told, and nothing else has"
    alike = all(torch.equal(tensor[0], tensor[1]) for tensor in one.values())
    assert alike == same, "each exchange draws for itself"


@pytest.mark.parametrize("name", UPDATES)
def test_it_leaves_its_input_as_it_was_and_a_stack_is_each_alone(name: str) -> None:
    made, stack = example(name), update(3)
    assert isinstance(made, UpdateDefence)
    before = {key: tensor.clone() for key, tensor in stack.items()}
    found = made.stacked(stack, [drawn(which) for which in range(3)])
    assert all(torch.equal(before[key], stack[key]) for key in before)
    for which in range(3):
        alone = made({key: tensor[which] for key, tensor in stack.items()}, drawn(which))
        assert alone.keys() == found.keys() == stack.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(found[key][which], tensor)
            assert tensor.dtype == stack[key].dtype


@pytest.mark.parametrize("name", STEPS)
def test_a_step_leaves_the_weights_and_gives_every_parameter_a_gradient(name: str) -> None:
    made = example(name)
    assert isinstance(made, StepDefence)
    net, (images, labels) = network(), batch_of(1, 2)
    weights = {key: weight.clone() for key, weight in net.named_parameters()}
    made.backward(net, images[0], labels[0], drawn(0))
    assert all(torch.equal(weight, weights[key]) for key, weight in net.named_parameters())
    assert all(weight.grad is not None for weight in net.parameters())


@pytest.mark.parametrize("name", [name for name in CLIENTS if example(name).error(batch=2)])
def test_its_announced_error_is_the_measured_one(name: str) -> None:
    made = example(name)
    error = made.error(batch=2)
    assert error is not None
    many = sent(made, 5, exchanges=400)
    steps = error.steps(many) if error.steps else {}
    for key, tensor in many.items():
        rounding = steps[key].square().mean() / 6 if key in steps else torch.zeros(())
        measured = tensor.flatten(1).double().var(0).mean().sqrt()
        # of few entries the mean over f of f (1 - f) is not 1 / 6 yet
        tolerance = 0.6 if error.density is Density.ROUNDING else 0.1
        assert float(measured) == pytest.approx(math.hypot(error.spread, float(rounding.sqrt())), rel=tolerance)


@pytest.mark.parametrize("name", CLIENTS)
def test_its_replay_of_the_plain_gradient_is_what_it_does(name: str) -> None:
    """Up to its error where that is random; of one image, and where it says that it is exact."""
    made, exchange = example(name), Exchange(last="4.weight")
    replay = made.replay(exchange)
    assert replay is not None
    plain = {key: tensor[None] for key, tensor in update().items()}
    if isinstance(made, StepDefence):
        net, (images, labels) = network(), batch_of(1, 1)
        plain, heard = gradients(net, images, labels), made.stacked(net, images, labels, [drawn(1)])
        exchange = dataclasses.replace(exchange, last=[key for key in plain if key.endswith("weight")][-1])
        replay = made.replay(exchange)
        assert replay is not None
    else:
        assert isinstance(made, UpdateDefence)
        heard = made.stacked(plain, [drawn(1)])
    before = {key: tensor.clone() for key, tensor in plain.items()}
    found = replay.does(plain, heard)
    assert all(torch.equal(before[key], plain[key]) for key in before)
    assert found.keys() == heard.keys()
    assert all(found[key].shape == heard[key].shape for key in found)
    error = made.error(batch=1)
    if replay.exact and error is None:
        for key in heard:
            torch.testing.assert_close(found[key], heard[key])
    elif error is not None:
        steps = {key: float(step) for key, step in error.steps(heard).items()} if error.steps else {}
        for key, tensor in heard.items():
            assert float((tensor - found[key]).abs().max()) <= 10 * error.spread + 1.01 * steps.get(key, 0.0)


@pytest.mark.parametrize("name", CLIENTS)
def test_its_replay_has_a_slope_under_vmap(name: str) -> None:
    replay = example(name).replay(Exchange(last="a"))
    assert replay is not None
    stack = update(3)

    def total(guess: dict[str, Tensor], heard: dict[str, Tensor]) -> Tensor:
        one, other = ({key: tensor[None] for key, tensor in side.items()} for side in (guess, heard))
        return torch.stack([tensor.square().sum() for tensor in replay.does(one, other).values()]).sum()

    slopes = torch.func.vmap(torch.func.grad(total))(stack, {key: tensor + 1 for key, tensor in stack.items()})
    assert all(bool(slope.isfinite().all()) for slope in slopes.values())
    assert any(bool(slope.any()) for slope in slopes.values())


@pytest.mark.parametrize("name", NAMES)
def test_parsing_puts_it_where_it_acts(name: str) -> None:
    made = example(name)
    bases = {"model": ModelDefence, "step": StepDefence, "update": UpdateDefence, "server": ServerDefence}
    assert isinstance(made, bases[made.hook])
    found = parse(str(made))
    assert found.step == (made if made.hook == "step" else None)
    assert found.update.parts == ((made,) if made.hook == "update" else ())


# No name of a defence stands elsewhere.

OTHER_MEANINGS = {
    ("clients/bayesian.py", "laplace"): "an approximation of a posterior",
    ("attackers/parts/teaching.py", "sign"): "a buffer of a network",
    ("clients/split.py", "noise"): "a name in a seed",
    ("simulator/federation/rounds.py", "central_dp"): "a name in a seed",
    ("simulator/report/privacy_report.py", "clip"): "an option of a scenario",
}


def test_nothing_outside_its_file_names_a_defence() -> None:
    """Adding one touches one file: there is no table of names, and no comparison with one."""
    strange = set()
    for room in ("simulator", "attackers", "clients"):
        for file in (ROOT / room).rglob("*.py"):
            place = str(file.relative_to(ROOT))
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Constant) or node.value not in NAMES:
                    continue
                if place != f"simulator/defences/{node.value}.py":
                    strange.add((place, node.value))
    assert strange <= set(OTHER_MEANINGS)


# What breaks the contract cannot be a defence.


def test_a_defence_that_leaves_a_question_out_cannot_be_made() -> None:
    answers = {name: thing for name, thing in vars(Noise).items() if name in Defence.__abstractmethods__}
    for left_out in sorted(answers):
        rest = {name: thing for name, thing in answers.items() if name != left_out}
        silent = type("Silent", (UpdateDefence,), {**rest, "stacked": Noise.stacked, "__module__": "mine.silent"})
        assert inspect.isabstract(silent)
        with pytest.raises(TypeError, match=left_out):
            silent()
        with pytest.raises(FedtapError, match=f"does not say {left_out}"):
            notation._whole(silent)


def test_an_argument_without_a_range_is_refused() -> None:
    @dataclasses.dataclass(frozen=True, repr=False)
    class Ranged(Clip):
        more: float = 1.0

    with pytest.raises(FedtapError, match="more of test_every_defence has no range"):
        Ranged.arguments()
    assert Clip.arguments() == (Argument("norm", Clip.arguments()[0].range, whole=False),)
    assert isinstance(Clip.arguments()[0].range, Range)
