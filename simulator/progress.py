"""Progress bars on standard error: shown on a terminal, for loops that last over a second."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar, cast

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")

_open: list[Progress] = []  # the bar on the screen, if any: nested loops add a line to it


def progress(steps: Iterable[Item] | int, label: str) -> Iterator[Item]:
    """Iterate over `steps` (an int means `range`) under a bar with this label."""
    items = cast(Iterable[Item], range(steps)) if isinstance(steps, int) else steps
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
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
