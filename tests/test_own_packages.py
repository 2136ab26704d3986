"""Attacks, defences and scenarios of a user's own package, which lies beside the work and touches none of our files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtap.attackers import ATTACKS, parse, parse_saved
from fedtap.attackers.wrappers.saved import Saved
from fedtap.scenarios import SCENARIOS, app
from fedtap.scenarios.command.plan import plan_of
from fedtap.simulator.attack import TRAINED_FORMAT
from fedtap.simulator.auxiliary import Provenance
from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Protocol
from fedtap.simulator.models.registry import OWN_MODELS
from tests.scenarios.test_cli import rows, run

ATTACK = '''"""My attack: looks at its starting point for some steps.

A baseline without a paper.
"""

from dataclasses import dataclass

from fedtap.simulator.attack import Attack, Reconstruction
from fedtap.simulator.leaks import GradientLeak


@dataclass(frozen=True)
class MyAttack(Attack):
    """Gives the start back."""

    leaks = (GradientLeak,)
    steps: int = 1
    """Looks."""

    def reconstruct(self, leak, start):
        labels = start.new_zeros(start.shape[:2]).long()
        return Reconstruction(start, labels, start.new_full((len(leak),), float(self.steps)))
'''

SCENARIO = '''"""Does a scenario of a package of my own play?

Expect: yes.
"""

from dataclasses import dataclass
from typing import Annotated

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import Option


@dataclass(frozen=True)
class MyScenario(ImageScenario):
    """One client with an MLP, of whose gradient the first layer is read."""

    patience: Annotated[int, Option("how long we wait", 1, 9)] = 3
    victims: int = 1
    model: str = "mlp"
    attack: str = "linear"
'''

LEARNER = '''"""A wrapper without a paper."""

from dataclasses import dataclass

from fedtap.attackers.gradients.lti import LTI


@dataclass(frozen=True)
class MyLearner(LTI):
    """LTI under another name."""
'''

COLON_ATTACK, COLON_SCENARIO = "my_package.my_attack:MyAttack", "my_package.my_scenario:MyScenario"

QUICK = ("--victims", "1", "--model", "mlp")


def forgotten() -> None:
    """The registries look anew, and the package is imported anew."""
    importlib.invalidate_caches()
    for registry in (ATTACKS, DEFENCES, SCENARIOS):
        vars(registry).pop("entries", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which is not on the path: a package of the user's own lies in it."""
    package = tmp_path / "my_package"
    package.mkdir()
    shutil.copy(Path(__file__).parent / "support/top_k.py", package)
    texts = {"__init__": "", "my_attack": ATTACK, "my_scenario": SCENARIO, "my_learner": LEARNER}
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    (package / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    monkeypatch.setenv(OWN_MODELS, "")
    forgotten()
    yield tmp_path
    forgotten()


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as pip leaves it: on the path, with entry points."""
    groups = {
        "fedtap.attacks": {"my_attack": COLON_ATTACK, "my_learner": "my_package.my_learner:MyLearner"},
        "fedtap.defences": {"top_k": "my_package.top_k:TopK"},
        "fedtap.scenarios": {"my_scenario": COLON_SCENARIO},
    }
    for points in groups.values():
        points["broken"] = "my_package.broken:Broken"
    about = folder / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    )
    (about / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    forgotten()
    return folder


def test_an_attack_that_lies_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", "first_leak", *QUICK, "--attack", f"{COLON_ATTACK}(steps=2),linear", "--out", "out")
    assert run(monkeypatch, *words) == 0
    found = rows(folder / "out")
    assert [(row["attack"], row["objective"] == 2.0) for row in found] == [("my_attack", True), ("linear", False)]
    assert run(monkeypatch, *words, "--resume") == 0
    assert rows(folder / "out") == found
    leak = str(folder / "out/leaks/part_0.safetensors")
    assert run(monkeypatch, "attack", leak, "--attack", COLON_ATTACK, "--out", "attacked") == 0
    assert [row["attack"] for row in rows(folder / "attacked")] == ["my_attack"]


def test_an_attack_of_an_installed_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--attack", "my_attack(steps=2)", "--out", "out") == 0
    assert [(row["attack"], row["objective"]) for row in rows(installed / "out")] == [("my_attack", 2.0)]


@pytest.mark.parametrize("text", [f"{COLON_ATTACK}(steps=2)", f"restarts(attack={COLON_ATTACK}(steps=2))"])
def test_an_attack_is_written_as_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (attack,) = parse(text)
    assert attack.written() == text
    assert parse(attack.written()) == (attack,)


def test_an_installed_attack_is_written_by_its_name(installed: Path) -> None:
    (attack,) = parse("my_attack(steps=2)")
    assert attack.written() == "my_attack(steps=2)"
    assert parse_saved(attack.written()) == attack


def test_a_defence_of_an_installed_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", "first_leak", *QUICK, "--attack", "linear", "--defence", "clip(1.0)+top_k(50)", "--out", "out")
    assert run(monkeypatch, *words) == 0
    assert [row["defence"] for row in rows(installed / "out")] == ["clip(1.0)+top_k(50)"]


@pytest.mark.parametrize("colon", [True, False])
def test_a_scenario_shows_sweeps_checks_and_resumes(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], colon: bool
) -> None:
    if colon:
        shutil.rmtree(installed / "my_package-1.0.dist-info")
        sys.path.remove(str(installed))
        forgotten()
    name = COLON_SCENARIO if colon else "my_scenario"
    assert run(monkeypatch, "run", name, "--help") == 0
    told = capsys.readouterr().out
    assert "Does a scenario of a package of my own play?" in told
    assert "--patience N" in told
    assert "how long we wait" in told
    words = ("run", name, "--patience", "2,4", "--out", "out")
    assert run(monkeypatch, *words) == 0
    found = rows(installed / "out")
    assert [(row["scenario"], row["patience"], row["attack"]) for row in found] == [
        (name, patience, "linear") for patience in (2, 4)
    ]
    assert "package of my own play" in (installed / "out/report.html").read_text()
    monkeypatch.setattr(ATTACKS["linear"], "reconstruct", lambda *_: pytest.fail("an attack is made again"))
    assert run(monkeypatch, *words, "--resume") == 0
    assert rows(installed / "out") == found
    capsys.readouterr()
    assert run(monkeypatch, "run", name, "--patience", "10") == 2
    assert "--patience 10 is out of range" in capsys.readouterr().err


def test_python_plays_a_scenario_with_an_attack_of_the_callers_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    config = {"out": str(folder / "out"), "data-root": str(folder)}
    found = app.in_process(COLON_SCENARIO, {"attack": COLON_ATTACK}, config)
    assert [row["attack"] for row in found] == ["my_attack"]


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            "Reconstruction(start, ",
            "Reconstruction(start[:, 0], ",
            "is not of this leak (images is (1, 3, 32, 32), not",
        ),
        ("labels, start.new_full", "labels.float(), start.new_full", "(labels are torch.float32, and not whole"),
        ("return Reconstruction(", "return (", "returned a value of type tuple from reconstruct"),
        ("@dataclass(frozen=True)", "", "is no frozen dataclass"),
        ("@dataclass(frozen=True)", "@dataclass", "is no frozen dataclass"),
        ("    leaks = (GradientLeak,)", "", "does not say leaks"),
        ("def reconstruct", "def rebuild", "does not say reconstruct"),
    ],
)
def test_an_attack_that_is_none_yet_is_told_what_it_lacks(
    was: str, now: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert was in ATTACK
    (folder / "my_package/my_attack.py").write_text(ATTACK.replace(was, now))
    words = ["run", "first_leak", "--attack", COLON_ATTACK, *QUICK]
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SCENARIO.partition('"""\n\n')[2], "MyScenario has no question, which is the docstring of its file"),
        (
            '"""Is it?"""\nfrom fedtap.simulator.scenario import Scenario\n\nclass MyScenario(Scenario):\n    pass\n',
            "does not say attacks, nodes, observe, reply, score",
        ),
    ],
)
def test_a_scenario_that_is_none_yet_is_told_what_it_lacks(
    text: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_package/my_scenario.py").write_text(text)
    for words in (("--attack", "linear"), ("--help",)):
        assert run(monkeypatch, "run", COLON_SCENARIO, *words) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_a_module_that_fails_on_import_disables_one_entry(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "list") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("broken cannot be loaded") == 3
    assert all(name in told for name in ("my_attack", "my_scenario", "top_k(k)", "first_leak", "idlg", "dp_sgd"))
    for words in (
        ("run", "broken"),
        ("run", "broken", "--help"),
        ("run", "first_leak", "--attack", "broken"),
        ("run", "first_leak", "--defence", "broken(1)"),
    ):
        assert run(monkeypatch, *words) == 2, words
        said = capsys.readouterr().err
        assert "broken cannot be loaded (ModuleNotFoundError" in said, words
        assert said.count("\n") == 1
        assert len(said) < 300
    assert not (installed / "runs").exists()


def test_an_entry_point_is_called_as_its_file_is(installed: Path) -> None:
    points = installed / "my_package-1.0.dist-info/entry_points.txt"
    points.write_text(f"[fedtap.attacks]\nother = {COLON_ATTACK}\n")
    forgotten()
    with pytest.raises(FedtapError, match=r"in my_package\.my_attack, and rows call each attack by its file"):
        parse("other")


def test_a_run_config_names_code_only_where_its_host_allows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    attacked = {"scenario": "first_leak", "options": f"--attack 'linear,{COLON_ATTACK}(steps=2)'"}
    for config, code in ((attacked, COLON_ATTACK), ({"scenario": COLON_SCENARIO}, COLON_SCENARIO)):
        with pytest.raises(FedtapError, match=f"names code to import, '{code}'"):
            plan_of(config)
        assert "my_package" not in sys.modules
        monkeypatch.setenv(OWN_MODELS, code)
        assert plan_of(config)
        forgotten()


@pytest.mark.parametrize("text", ["{}", "{}(width=3)", "identified({})", "restarts(attack={},times=2)"])
def test_a_trained_attacks_file_names_no_code(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    text = text.format("my_package.my_learner:MyLearner")
    about = Provenance(Protocol(model="mlp", shape=(3, 8, 8), classes=10, batch=1), "pictures", pairs=4, digest="")
    saved = {"format": TRAINED_FORMAT, "attack": text, "about": dataclasses.asdict(about), "digest": ""}
    (folder / "saved.json").write_text(json.dumps(saved))
    (folder / "saved.safetensors").write_bytes(b"")
    for ask in (lambda: parse_saved(text), lambda: Saved(str(folder / "saved.safetensors")).name):
        with pytest.raises(FedtapError, match="is code to import, which a file may not name"):
            ask()
        assert "my_package" not in sys.modules
