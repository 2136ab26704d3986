"""Where the command begins: nothing is imported here that takes time.

Ctrl-C while the rest is still being imported, which takes seconds, ends in one sentence, and not in a traceback of the
imports: Python calls the hook for an exception that nothing has caught. The version is told without the rest.
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


def main() -> None:
    """Print the version, or run the command line."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(version("fedtap"))
        return
    from fedtap.scenarios.command.main import main as command

    command()
