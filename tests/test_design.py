"""The design, enforced: imports run one way, nothing is pickled, one file touches torchvision."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "simulator": set(),
    "attackers": {"simulator"},
    "clients": {"simulator"},
    "scenarios": {"attackers", "clients", "simulator"},
}
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    strange = {name.split(".")[0] for name in imports(file)} & ROOMS.keys() - ROOMS[room] - {room}
    assert not strange, f"{room} imports {strange}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_pickled(file: Path) -> None:
    assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal"} & imports(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save"), f"{called}: tensors travel as safetensors"
            allowed = {word.arg: word.value for word in node.keywords}.get("allow_pickle")
            assert allowed is None or ast.unparse(allowed) == "False"


def test_only_vision_imports_torchvision_and_lpips() -> None:
    users = {file.name for file in FILES if {"torchvision", "lpips"} & {name.split(".")[0] for name in imports(file)}}
    assert users <= {"vision.py"}


def test_no_room_touches_flowers_legacy_api() -> None:
    """SecAgg+, which Flower has there alone, is run by a test; the rooms have a listener behind it."""
    legacy = ("flwr.server", "flwr.client", "flwr.common", "flwr.compat")
    for file in FILES:
        assert not [
            name for name in imports(file) if name.startswith(tuple(f"{old}." for old in legacy)) or name in legacy
        ]


def test_every_scenario_asks_a_question_and_says_what_to_expect() -> None:
    from fedtap.scenarios import SCENARIOS
    from fedtap.simulator.scenario import question_of

    for kind in SCENARIOS.values():
        assert question_of(kind).splitlines()[0].endswith("?")
        assert "Expect:" in question_of(kind)
