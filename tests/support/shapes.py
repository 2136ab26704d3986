"""Shapes are types: the tests run with every annotation of the frame, the attacks and the clients checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked; a dataclass's fields are left to its own check, which says it better."""
    return function if function.__name__ == "__init__" else _beartype(function)


def check_shapes() -> None:
    """Hang `check` into each function of the modules that are imported from now on."""
    install_import_hook(("fedtap.simulator", "fedtap.attackers", "fedtap.clients"), f"{__name__}.check")
