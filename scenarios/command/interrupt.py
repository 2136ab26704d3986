"""Ctrl-C while fedtap is still being imported, which takes seconds: one sentence, not a traceback of the imports.

It is the first thing that the command imports. Python calls the hook for an exception that nothing has caught.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if sys.stderr is not None:
        sys.stderr.write("fedtap: stopped before anything was done.\n")
    raise SystemExit(130)


sys.excepthook = _hook
