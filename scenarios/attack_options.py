"""What every scenario's options share: which attacks run, as written on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from fedtap.simulator.options import Option
from fedtap.simulator.scenario import Scenario

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack


@dataclass(frozen=True)
class Attacked(Scenario):
    """A scenario whose attacks are named by its options."""

    attack: Annotated[
        str, Option("NAME[,NAME…], each with settings if need be: idlg(steps=300)", group="attack", single=True)
    ] = ""
    trained_attack: Annotated[
        str,
        Option("PATH of a trained attack's .safetensors, as a run leaves it", group="attack", file=True, single=True),
    ] = ""

    @property
    def named(self) -> str:
        """The attacks that the options name, as they are written; none where the scenario is to choose."""
        return with_trained(self.attack, self.trained_attack)

    @cached_property
    def attacks(self) -> tuple[Attack[Any], ...]:
        """The attacks to run; none where none is named.

        Raises:
            FedtapError: there is no such attack, or it takes other settings.
        """
        from fedtap.attackers import parse

        return parse(self.named) if self.named else ()


def with_trained(attack: str, trained_attack: str) -> str:
    """Attacks as written for `--attack`, and the trained one at the path `trained_attack` if there is one."""
    return ",".join(filter(None, (attack, trained_attack and f"saved({trained_attack!r})")))
