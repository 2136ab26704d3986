"""Progress on standard error: bars on a terminal and in a notebook, for loops that last over a second; lines elsewhere,
where a program asks for them, for what lasts longer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar, cast

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")

_open: list[Progress] = []  # the bar on the screen, if any: nested loops add a line to it

LINE_EVERY = 15.0
"""Seconds after which a program that has no terminal says how far it is."""


@dataclass
class _Lines:
    """Whether and when lines are printed."""

    wanted: bool = False
    last: float = 0.0


_lines = _Lines()


def in_lines() -> None:
    """Say in lines how far loops are, where there is no terminal: silence is taken for a program that has stopped."""
    _lines.wanted, _lines.last = True, time.monotonic()


def progress(steps: Iterable[Item] | int, label: str) -> Iterator[Item]:
    """Iterate over `steps` (an int means `range`) under a bar with this label."""
    items = cast(Iterable[Item], range(steps)) if isinstance(steps, int) else steps
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield from _told(items, label) if _lines.wanted else items
        return
    outermost = not _open
    if outermost:
        _open.append(Progress(console=console, transient=True))
        _open[0].start()
    task = _open[0].add_task(label, total=len(items) if isinstance(items, Sized) else None, visible=False)
    began = time.monotonic()
    try:
        for item in items:
            yield item
            _open[0].update(task, advance=1, visible=time.monotonic() - began > 1)
    finally:
        _open[0].remove_task(task)
        if outermost:
            _open.pop().stop()


def _told(items: Iterable[Item], label: str) -> Iterator[Item]:
    """The items, and a line at times: how many are done, and how long the rest will take at this pace."""
    began, total = time.monotonic(), len(items) if isinstance(items, Sized) else None
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - _lines.last >= LINE_EVERY:
            _lines.last = now
            left = (
                "" if total is None else f" of {total}, about {_duration((now - began) / done * (total - done))} left"
            )
            print(f"{label}: {done}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
