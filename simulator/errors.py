"""The one error that people are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedtapError(Exception):
    """A mistake in the input: one sentence with cause, reason and remedy. The command line prints it and exits 2."""

    code = 2
    """The command line's exit code."""


class Stopped(FedtapError):
    """Somebody pressed Ctrl-C."""

    code = 130


class DamagedError(FedtapError):
    """A file of ours that is not whole."""


def unknown(kind: str, name: str, names: Iterable[str]) -> FedtapError:
    """The error for a name that is not among `names`, with the nearest one."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    return FedtapError(f"There is no {kind} named {name!r}: {hint}")


def short(value: object, most: int = 60) -> str:
    """A value as an error names it: on one line, and no longer than `most` characters, cut in the middle."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[len(text) - most // 3 :]}"
