"""The design, enforced: imports run one way and in no circle, nothing is pickled, one name is one thing."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fedtap.attackers import ATTACKS

ROOT = Path(__file__).parents[1]
ROOMS = {
    "simulator": set(),
    "attackers": {"simulator"},
    "clients": {"simulator"},
    "scenarios": {"attackers", "clients", "simulator"},
}
NOTEBOOKS = ROOT / "scenarios/course/units"
"""Data of the course, which no module imports."""
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")) if not file.is_relative_to(NOTEBOOKS)]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_of(file: Path) -> str:
    return ".".join(("fedtap", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs as a module is imported: neither bodies of functions nor what is there for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from run_on_import(other)
        else:
            yield from run_on_import(child)


def needed(source: str, modules: Mapping[str, object] = MODULES) -> set[str]:
    """The modules of ours that a module's source imports as it is imported."""
    found: set[str] = set()
    for node in run_on_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules.keys() or {node.module}
    return found & modules.keys()


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    """Inside functions too."""
    room = file.relative_to(ROOT).parts[0]
    rooms = {room_of(name) for name in imports(file) if name.startswith("fedtap.")} & ROOMS.keys()
    strange = rooms - ROOMS[room] - {room}
    assert not strange, f"{room} imports {strange}"
    assert not ROOMS.keys() & {name.split(".")[0] for name in imports(file)}, "the rooms are in fedtap"
    relative = [
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, "imports are absolute"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: needed(file.read_text()) for name, file in MODULES.items()}
    assert sum(map(len, graph.values())) > 2 * len(graph)  # they are found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_no_room_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, file in MODULES.items():
        graph[room_of(name)] |= {room_of(other) for other in needed(file.read_text())} - {room_of(name)}
    TopologicalSorter(graph).prepare()
    assert graph["scenarios"] == {"attackers", "clients", "simulator"}


def test_an_import_of_a_function_or_for_types_makes_no_circle() -> None:
    source = """
from typing import TYPE_CHECKING
from fedtap import a
if TYPE_CHECKING:
    import fedtap.b
else:
    import fedtap.c
try:
    from fedtap.d import thing
except ImportError:
    pass
class Some:
    import fedtap.e
    def method(self):
        import fedtap.f
"""
    names = {f"fedtap.{letter}": None for letter in "abcdef"}
    assert needed(source, names) == {"fedtap.a", "fedtap.c", "fedtap.d", "fedtap.e"}


NAMED_ALIKE = {"restarts": "the tensor of a leak that numbers them"}
"""Strings of the simulator that are called as an attack is, and what they are."""


def test_the_simulator_names_no_attack_and_no_client() -> None:
    for file in FILES:
        if file.relative_to(ROOT).parts[0] != "simulator":
            continue
        constants = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        strings = {value for value in constants if isinstance(value, str)}
        assert not strings & ATTACKS.keys() - NAMED_ALIKE.keys(), file
        assert not [text for text in strings if text.startswith(("fedtap.clients.", "fedtap.scenarios."))], file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_pickled(file: Path) -> None:
    assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal"} & imports(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            safe = called == "torch.load" and any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
            assert safe or called not in ("torch.load", "torch.save"), f"{called}: tensors travel as safetensors"
            allowed = {word.arg: word.value for word in node.keywords}.get("allow_pickle")
            assert allowed is None or ast.unparse(allowed) == "False"


def test_only_vision_imports_torchvision_and_lpips() -> None:
    users = {file.name for file in FILES if {"torchvision", "lpips"} & {name.split(".")[0] for name in imports(file)}}
    assert users <= {"vision.py"}


def test_no_room_touches_flowers_legacy_api() -> None:
    """SecAgg+, which Flower has there alone, is run by a test; the rooms have a listener behind it."""
    legacy = ("flwr.server", "flwr.client", "flwr.common", "flwr.compat")
    for file in FILES:
        found = [
            name for name in imports(file) if name.startswith(tuple(f"{old}." for old in legacy)) or name in legacy
        ]
        how_flower_reads_an_app = file.name == "app.py" and file.parent.name == "audit"
        assert not [name for name in found if not (how_flower_reads_an_app and "flwr.common.config" in name)]


def test_the_run_config_has_one_string_of_options_and_no_scenarios_own() -> None:
    from fedtap.scenarios.command.plan import RUN_KEYS

    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert list(app["config"]) == list(RUN_KEYS)
    assert app["config"]["options"] == ""


def test_every_scenario_asks_a_question_and_says_what_to_expect() -> None:
    from fedtap.scenarios import SCENARIOS
    from fedtap.simulator.scenario import question_of

    for kind in SCENARIOS.values():
        assert question_of(kind).splitlines()[0].endswith("?")
        assert "Expect:" in question_of(kind)


def undocumented(source: str) -> list[str]:
    """Fields of the dataclasses in a module's source that no docstring line follows."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if not (said and isinstance(below.value.value, str)):
                    found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


ATTACK_FILES = [file for file in FILES if file.relative_to(ROOT).parts[0] == "attackers"]


@pytest.mark.parametrize("file", ATTACK_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_field_of_an_attack_is_documented(file: Path) -> None:
    assert not undocumented(file.read_text())


def test_a_field_without_a_docstring_is_found() -> None:
    source = '@dataclass\nclass A:\n    x: int = 1\n    """Steps."""\n    y: int = 2\n    z: ClassVar[int] = 3\n'
    assert undocumented(source) == ["A.y"]


def defined(file: Path) -> set[str]:
    """Public classes, functions and constants at the top of a module."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return {name for name in names if not name.startswith("_")}


SAID_TWICE = {
    "UNIT": "what each file of the course's exercises defines",
    "Attention": "the block, and the scenario that asks about it, whose class is named after its file",
    "Defences": "a chain of defences, and the scenario that asks about them",
    "Noise": "the defence, and the scenario that asks about it",
    "Pairs": "auxiliary pairs, and the scenario that asks how many it takes",
    "main": "what starts a command",
    "parse": "read with its module: attackers.parse and chained.parse",
}
"""Public names that stand in several files, and what they are."""


def test_a_public_name_is_defined_in_one_file() -> None:
    files: dict[str, list[str]] = {}
    for file in FILES:
        for name in defined(file):
            files.setdefault(name, []).append(str(file.relative_to(ROOT)))
    twice = {name: sorted(found) for name, found in files.items() if len(found) > 1}
    assert not (new := {name: twice[name] for name in twice.keys() - SAID_TWICE.keys()}), new
    assert not (gone := SAID_TWICE.keys() - twice.keys()), f"no longer twice, so take out of SAID_TWICE: {sorted(gone)}"


def imported(file: Path) -> set[str]:
    """What of fedtap a file imports at its top, by the parts of its name, such as `simulator/leaks`."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtap."):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {name.removeprefix("fedtap.").replace(".", "/") for name in names}
    return found


def test_the_documented_diagram_is_that_of_the_imports() -> None:
    """Its first lines are the rooms, and the others files of the simulator; an arrow is an import at a file's top."""
    (diagram,) = re.findall(r"```\n(scenarios +──▶ .*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)
    drawn = {line.split()[0]: line.split("──▶ ")[1].split("   ")[0].strip() for line in diagram.splitlines() if line}
    files = drawn.keys() - ROOMS.keys()
    named = files | {name for text in drawn.values() for name in text.split(", ")} - {"nothing"} - ROOMS.keys()
    for room in ROOMS:
        rooms = {name.split("/")[0] for file in sorted((ROOT / room).rglob("*.py")) for name in imported(file)}
        assert drawn[room] == (", ".join(sorted(rooms - {room})) or "nothing")
    for name in files:
        found = {one.removeprefix("simulator/") for one in imported(ROOT / f"simulator/{name}.py")}
        assert drawn[name] == (", ".join(sorted(found & named)) or "nothing")
