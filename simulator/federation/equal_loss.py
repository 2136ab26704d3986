"""Defences at equal cost: of each the strength at which the trained model loses an agreed share of its accuracy.

The stronger a defence, the more it costs, so the strength is found by bisection, each step of it a training. Chosen by
public images, on which nobody has trained: neither the victims' images nor what an attack got have a say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.defences.notation import described, strength_of
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Federation
from fedtap.simulator.scenario import Observations, Row, same_but


def undefended(parts: Sequence[Federation], part: Federation) -> int:
    """Number of the part that is like this one but for its defence, and has none: what is lost is lost to it.

    Raises:
        FedtapError: there is none.
    """
    wanted = same_but(part, defence="none")
    found = [number for number, other in enumerate(parts) if same_but(other) == wanted]
    if not found:
        raise FedtapError(
            "What a defence costs in accuracy is held against a training without one, and this run has none: add none "
            f"to them, --defence 'none,{part.defence}'."
        )
    return found[0]


def strengths_of(parts: Sequence[Federation], part: Federation) -> list[int]:
    """Numbers of the parts that differ from this one in the defence's strength alone, as they are ordered."""
    mine = _but_for_strength(part)
    return [number for number, other in enumerate(parts) if _but_for_strength(other) == mine]


def _but_for_strength(part: Federation) -> tuple[Federation, tuple[Defence, ...], str, dict[str, float]]:
    parts, same = described(part.defence), same_but(part, defence="none")
    if not parts:
        return same, (), "none", {}
    last = parts[-1]
    named = zip(last.arguments(), last.values, strict=True)
    values = {argument.name: value for argument, value in named if argument != strength_of(last)}
    return same, parts[:-1], last.name, values


def nearest(candidates: Sequence[int], lost: Callable[[int], float], wanted: float) -> int:
    """The candidate that loses what comes nearest to `wanted`, of those that a bisection tries.

    Args:
        candidates: the more they lose, the later.
        lost: the share that one of them loses; asked of few.
    """
    tried: dict[int, float] = {}
    under, over = -1, len(candidates)
    while over - under > 1:
        middle = (under + over) // 2
        tried[middle] = lost(candidates[middle])
        if tried[middle] <= wanted:
            under = middle
        else:
            over = middle
    return candidates[min(tried, key=lambda place: abs(tried[place] - wanted))]


def equal_loss(number: int, settings: Sequence[Federation], observed: Observations) -> Row | None:
    """What the defence costs at this strength, on public and on test images; None unless it comes nearest to the loss
    that is agreed on."""
    setting = settings[number]
    if setting.defence != "none":
        strengths = strengths_of(settings, setting)
        if number != nearest(strengths, lambda one: _lost(one, settings, observed, "held_out"), setting.accuracy_loss):
            return None
    return _cost(number, settings, observed)


def tried(number: int, settings: Sequence[Federation], observed: Observations) -> list[Row]:
    """Of a setting that is not attacked the one row, if it was trained."""
    if number not in observed:
        return []
    setting = settings[number]
    told = {"defence": setting.defence, "dataset": setting.dataset, "model": setting.model}
    return [{**told, "accuracy": observed[number].heard.accuracy, **_cost(number, settings, observed)}]


def _cost(number: int, settings: Sequence[Federation], observed: Observations) -> Row:
    return {
        "held_out": observed[number].heard.held_out,
        "accuracy_lost": _lost(number, settings, observed, "accuracy"),
    }


def _lost(number: int, settings: Sequence[Federation], observed: Observations, which: str) -> float:
    """Of `accuracy` or `held_out`, what this setting lacks to the one without a defence."""
    other = undefended(settings, settings[number])
    before, after = (getattr(observed[one].heard, which) for one in (other, number))
    return before - after  # type: ignore[no-any-return]
