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


class ClientError(FedtapError):
    """A client did not give what it was asked for: a result, where the others' can stand without it."""


class DamagedError(FedtapError):
    """A file of ours that is not whole."""


def unknown(kind: str, name: str, names: Iterable[str]) -> FedtapError:
    """The error for a name that is not among `names`, with the nearest one."""
    known = sorted(names)
    near = difflib.get_close_matches(short(name), known, n=1)
    hint = f"did you mean {short(near[0])}?" if near else f"there are {short(', '.join(known), 160) or 'none'}."
    return FedtapError(f"There is no {kind} named {short(name)!r}: {hint}")


def why_not_read(error: Exception) -> str:
    """Why Python's parser refused a text, without its own terms: the address of a node, the name of no file."""
    return "a value in it is no constant" if "malformed node" in str(error) else short(str(error).partition(" (<")[0])


def short(value: object, most: int = 60) -> str:
    """A value as an error names it: on one line that any terminal can print, `most` characters at most."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[len(text) - most // 3 :]}"
