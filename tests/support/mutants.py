"""Plant one-line faults in the code and see which of them the tests let through.

    python -m tests.support.mutants --faults 100 --seed 0 [--only simulator/leaks.py]

pytest imports the code and collects the tests once. For each fault the process forks, and the child gives the faulty
function its new code in memory: no file is ever changed, and what runs in a subprocess, or ran at import, never sees a
fault. A first child runs all tests and writes down which functions each calls (`--calls` keeps that for the next time);
a fault is then shown to the tests that call its function, the cheapest ones of the file named after its module first,
up to the first failure. What cannot change any behaviour is named in EQUIVALENT with the reason, and is not counted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = 3  # what a child ends with if it raised
REPORT = sys.stdout  # which pytest and the tests turn away
FOLDERS = ("simulator", "attackers", "clients")
DRAWINGS = ("charts", "columns", "defences", "images", "page", "pictures", "progress")
"""Of these files only branches and comparisons are changed: the rest is where things stand on a page."""
TALK = ("progress", "warn", "FedtapError", "Option", "Knob", "Field", "field", "DamagedError", "isinstance", "info")
NUMBERS = ("float", "int", "Float", "Int", "Tensor", "torch.Tensor", "Points")
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "simulator/defences/prune.py",
        "smallest = rows.abs().sort(dim=1, stable=(False)).indices[:, :dropped]",
    ): "torch sorts stably on a CPU whether asked to or not",
    (
        "simulator/federation.py",
        "for chunk in torch.split(torch.arange(count), (512)):",
    ): "images that are evaluated at once",
    (
        "attackers/parts/newton.py",
        "return -torch.cat([((found[name] - leaked[name]) / errors[name]).flatten() for name in found])",
    ): "least squares: its derivative turns with it",
    ("clients/cost.py", 'defences, draw = parse(defence), generator((1), "cost")'): "any seed serves a stopwatch",
    (
        "attackers/parts/newton.py",
        "before, power = power, (torch.where(going, r.square().sum(1), 0))",
    ): "a lane that has stopped neither moves nor goes on, whatever its power is",
    (
        "simulator/report.py",
        "if lines[-1] and (font.getlength((lines[-1] + word).strip()) >= width):",
    ): "a line of exactly the column's width, in pixels of the picture",
}
"""(file, the line after the change) → why nothing can tell."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "minimum": "maximum", "maximum": "minimum",
         "argmin": "argmax", "argmax": "argmin", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
         "any": "all", "all": "any"}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A change of one line, and the first and last line of the function it is in."""

    file: str
    line: int
    operator: str
    before: str
    after: str
    function: tuple[int, int]

    @property
    def diff(self) -> list[str]:
        """The lines that differ."""
        lines = difflib.ndiff(self.before.splitlines(), self.after.splitlines())
        return [line for line in lines if line[0] in "-+"]

    @property
    def reason(self) -> str | None:
        """Why it changes nothing, if it is known to."""
        return next(
            (EQUIVALENT[key] for line in self.diff if (key := (self.file, line[2:].strip())) in EQUIVALENT), None
        )


def changes(node: ast.AST, drawn: bool, numbers: bool) -> Iterator[tuple[str, ast.AST]]:
    """What may go wrong in one expression or statement: the operator's name, and the node in its stead.

    Args:
        drawn: it stands in a file that draws.
        numbers: its function returns a number or a tensor.
    """

    def changed(**fields: Any) -> ast.AST:
        made = copy.copy(node)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    match node:
        case ast.Compare(ops=[one, *others]) if type(one) in SWAPS:
            yield "comparison", changed(ops=[SWAPS[type(one)](), *others])
        case ast.BoolOp():
            yield "and or", changed(op=SWAPS[type(node.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node.operand
        case ast.Constant(value=bool()) if not drawn:
            yield "truth", ast.Constant(not node.value)
        case ast.If() | ast.IfExp() | ast.While():
            yield "branch", changed(test=ast.UnaryOp(ast.Not(), node.test))
    if drawn:
        return
    match node:
        case ast.BinOp() if type(node.op) in SWAPS:
            yield "arithmetic", changed(op=SWAPS[type(node.op)]())
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "sign", node.operand
        case ast.Constant(value=int()) if not isinstance(node.value, bool):
            for value in (node.value + 1, node.value - 1, node.value * 2):
                if value != node.value:
                    yield "constant", ast.Constant(value)
        case ast.Constant(value=float()) if abs(node.value) > 1e-3:
            yield "constant", ast.Constant(node.value * 2)
        case ast.AugAssign():
            yield "dropped", ast.Pass()
            if type(node.op) in SWAPS:
                yield "arithmetic", changed(op=SWAPS[type(node.op)]())
        case ast.Expr(value=ast.Call()):
            yield "dropped", ast.Pass()
        case ast.Return(value=ast.BinOp() | ast.Call()) if numbers:
            yield "returned", changed(value=ast.UnaryOp(ast.USub(), node.value))
        case ast.Call():
            for place, argument in enumerate(node.args):
                if not isinstance(argument, ast.Starred | ast.Constant):
                    yield "argument", changed(args=[*node.args[:place], ast.Constant(0), *node.args[place + 1 :]])
            for place, keyword in enumerate(node.keywords):
                if keyword.arg == "dim":
                    other = ast.keyword("dim", ast.BinOp(keyword.value, ast.Add(), ast.Constant(1)))
                    yield "dim", changed(keywords=[*node.keywords[:place], other, *node.keywords[place + 1 :]])
            if isinstance(node.func, ast.Name) and node.func.id in NAMES:
                yield "extreme", changed(func=ast.Name(NAMES[node.func.id]))
            elif isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
                yield "extreme", changed(func=ast.Attribute(node.func.value, NAMES[node.func.attr]))


def faults(file: str, source: str) -> list[Fault]:
    """Every fault of one file."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    drawn, found = Path(file).stem in DRAWINGS, []

    def visit(node: ast.AST, function: tuple[int, int] = (0, 0), numbers: bool = False) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return  # messages, and what only mypy or the import itself could miss
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__"):
            return
        if isinstance(node, ast.Call) and ast.unparse(node) == "super().__init__()":
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node).startswith("super("):
            return
        if isinstance(node, ast.Call) and (getattr(node.func, "id", "") or getattr(node.func, "attr", "")) in TALK:
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            first, last = function if function[1] else (first, node.end_lineno or first)
            numbers = node.returns is not None and ast.unparse(node.returns).startswith(NUMBERS)
            for child in node.body:
                visit(child, (first, last), numbers)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                visit(node.value, function, numbers)
            return
        if isinstance(node, ast.expr | ast.stmt) and function[1]:
            for operator, other in changes(node, drawn, numbers):
                begin, end = (
                    starts[node.lineno - 1] + node.col_offset,
                    starts[node.end_lineno - 1] + node.end_col_offset,
                )  # type: ignore[operator,misc]
                if isinstance(node, ast.If | ast.While):  # its test alone: the body keeps its lines
                    test = node.test
                    begin, end = (
                        starts[test.lineno - 1] + test.col_offset,
                        starts[test.end_lineno - 1] + test.end_col_offset,
                    )  # type: ignore[operator,misc]
                    other = other.test  # type: ignore[attr-defined]
                text = ast.unparse(ast.fix_missing_locations(other))
                if isinstance(other, ast.expr):
                    text = f"({text})"
                whole = b"".join(lines)
                after = (whole[:begin] + text.encode() + whole[end:]).decode()
                found.append(Fault(file, node.lineno, operator, source, after, function))
        for child in ast.iter_child_nodes(node):
            visit(child, function, numbers)

    visit(ast.parse(source))
    return found


def drawn_faults(root: Path, wanted: int, seed: int, only: str | None) -> list[Fault]:
    """Files in proportion to their lines of code, then an operator, then a place: each fault once."""
    draw = random.Random(seed)
    files = sorted(
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
        if path.name != "bench.py"
    )  # which takes times and promises nothing
    pools = {file: faults(file, (root / file).read_text()) for file in files if only is None or file == only}
    pools = {file: pool for file, pool in pools.items() if pool}
    sizes = [len([line for line in (root / file).read_text().splitlines() if line.strip()]) for file in pools]
    chosen: list[Fault] = []
    while len(chosen) < wanted and any(pools.values()):
        pool = pools[draw.choices(list(pools), sizes)[0]]
        if pool:
            operator = draw.choice(sorted({fault.operator for fault in pool}))
            chosen.append(pool.pop(draw.choice([n for n, fault in enumerate(pool) if fault.operator == operator])))
    return chosen


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


class Planter:
    """A pytest plugin that runs the collected tests once for each fault, each time in a child."""

    def __init__(self, options: argparse.Namespace, planted: list[Fault], scratch: Path) -> None:
        self.options, self.planted, self.scratch = options, planted, scratch
        self.seen: set[CodeType] = set()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        kept = self.options.calls or self.scratch / "calls.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        new = [item for name, item in items.items() if name not in known or name.split("::")[0] in self.options.record]
        if new:
            part = self.scratch / "new.json"
            in_child(lambda: self.record(session, new, part), 3600)
            known |= json.loads(part.read_text())
            kept.write_text(json.dumps(known))
        tests = {name: about for name, about in known.items() if name in items and about["passed"]}
        told: dict[str, int] = defaultdict(int)
        for number, fault in enumerate(self.planted):
            if self.options.numbers and number not in self.options.numbers:
                continue
            verdict, by = self.judge(session, items, fault, tests)
            told[verdict] += 1
            print(
                f"{number:3} {verdict:10} {fault.operator:10} {fault.file}:{fault.line} {by}", file=REPORT, flush=True
            )
            if verdict not in ("killed", "equivalent"):
                print(*(f"      {line.rstrip()}" for line in fault.diff), sep="\n", file=REPORT, flush=True)
        print(dict(told), file=REPORT)
        return True

    def judge(
        self, session: pytest.Session, items: dict[str, pytest.Item], fault: Fault, tests: Any
    ) -> tuple[str, str]:
        """killed, survived, timeout, broken or equivalent; and by which test, or why."""
        if fault.reason:
            return "equivalent", fault.reason
        chosen = relevant(fault, tests, self.options.budget)
        if not chosen:
            return "survived", "no test calls it"
        said = self.scratch / "failed"
        said.unlink(missing_ok=True)

        def child() -> int:
            plant(fault)
            for name, following in zip(chosen, [*chosen[1:], None], strict=True):
                after = items[following] if following else None
                items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=after)
                if session.testsfailed:
                    said.write_text(name)
                    return 1
            return 0

        status = in_child(child, 60 + 8 * sum(tests[name]["seconds"] for name in chosen))
        if status is None:
            return "timeout", f"{len(chosen)} tests"
        if status == 0:
            return "survived", f"{len(chosen)} tests"
        if status == BROKEN:
            return "broken", "the fault could not be planted, or a test could not be run"
        return "killed", said.read_text() if said.is_file() else f"status {status}"

    def _trace(self, frame: FrameType, event: str, argument: object) -> None:
        self.seen.add(frame.f_code)

    def record(self, session: pytest.Session, items: list[pytest.Item], kept: Path) -> int:
        """Write down, of each test, the functions that it calls, its seconds, and whether it passed."""
        tests = {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.seen, began, failed = set(), cpu_seconds(), session.testsfailed
            sys.settrace(self._trace)
            threading.settrace(self._trace)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            calls = defaultdict(list)
            for code in self.seen:
                if code.co_filename.startswith(f"{ROOT}/") and code.co_name != "<module>":
                    calls[code.co_filename.removeprefix(f"{ROOT}/")].append(code.co_firstlineno)
            passed = session.testsfailed == failed
            tests[item.nodeid] = {"seconds": cpu_seconds() - began, "passed": passed, "calls": calls}
        kept.write_text(json.dumps(tests))
        return 0


def relevant(fault: Fault, tests: dict[str, dict[str, Any]], budget: float) -> list[str]:
    """Tests that call the function, of the file named after its module first; as many as `budget` seconds hold."""
    first, last = fault.function
    hit = [
        test for test, about in tests.items()
        if any(first <= line <= last for line in about["calls"].get(fault.file, ()))
    ]  # fmt: skip
    by_file = defaultdict(list)
    for test in sorted(hit, key=lambda test: tests[test]["seconds"]):
        by_file[test.split("::")[0]].append(test)
    stem = Path(fault.file).stem

    def place(file: str) -> tuple[bool, float]:
        return stem not in file, sum(tests[test]["seconds"] for test in by_file[file]) / len(by_file[file])

    chosen, spent = [], 0.0
    for test in [test for file in sorted(by_file, key=place) for test in by_file[file]]:
        spent += tests[test]["seconds"]
        if chosen and spent > budget:
            break
        chosen.append(test)
    return chosen


def plant(fault: Fault) -> None:
    """Give the faulty function, and those around it, their new code."""
    names = {}

    def note(code: CodeType) -> None:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                names[inner.co_qualname, inner.co_firstlineno] = inner
                note(inner)

    path = str(ROOT / fault.file)
    note(compile(fault.after, path, "exec", dont_inherit=True))
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename == path:
            code = thing.__code__
            other = names.get((code.co_qualname, code.co_firstlineno))
            if other is not None and other.co_freevars == code.co_freevars and code.co_firstlineno <= fault.line:
                thing.__code__ = other


def in_child(work: Callable[[], int], seconds: float) -> int | None:
    """What `work` returns in a fork of this process; None: out of time."""
    child = os.fork()
    if not child:
        os.setsid()
        status = BROKEN
        with contextlib.suppress(BaseException):
            status = work()
        os._exit(status)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever the tests have started goes too
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one file, simulator/leaks.py say")
    parser.add_argument("--calls", type=Path, help="where the list of what each test calls is kept, or is to be kept")
    parser.add_argument("--record", nargs="+", default=[], help="test files whose part of that list is made anew")
    parser.add_argument("--numbers", type=int, nargs="+", default=[], help="only these of the faults")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests that one fault is shown to")
    parser.add_argument("--list", action="store_true", help="only show the faults")
    options = parser.parse_args()
    planted = drawn_faults(ROOT, options.faults, options.seed, options.only)
    if options.list:
        for number, fault in enumerate(planted):
            print(number, fault.file, fault.line, fault.operator, *fault.diff, sep="\n  ")
        return
    words = ["-s", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests")]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        pytest.main(words, plugins=[Planter(options, planted, Path(scratch))])


if __name__ == "__main__":
    main()
