"""What is installed: one package, which works from a wheel beside folders of the same names as ours."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import fedtap
from fedtap.attackers.gradients.linear import Linear
from fedtap.simulator.errors import FedtapError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("simulator", "attackers", "clients", "scenarios")


def said(*command: str | Path, cwd: Path) -> str:
    """Standard output of a program that ends well, without this environment's own paths."""
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_folder_with_an_init_is_packaged() -> None:
    folders = [file.parent.relative_to(ROOT) for name in FOLDERS for file in (ROOT / name).rglob("__init__.py")]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        ["fedtap", *(".".join(("fedtap", *folder.parts)) for folder in folders)]
    )
    holding = {file.parent for name in FOLDERS for file in (ROOT / name).rglob("*.py")} - {
        ROOT / one for one in folders
    }
    without = {folder for folder in holding if not folder.is_relative_to(ROOT / "scenarios/course/units")}  # data
    assert not without, "these hold code, and no __init__.py"


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_importing_fedtap_imports_no_torch() -> None:
    code = "import sys, fedtap; print(fedtap.__version__, sorted({'torch', 'flwr', 'numpy'} & {*sys.modules}))"
    assert said(sys.executable, "-c", code, cwd=Path("/")) == f"{PROJECT['project']['version']} []\n"


def test_the_example_in_the_docstring_holds() -> None:
    assert doctest.testmod(fedtap) == (0, 10)


def test_an_attack_is_a_text_or_a_value(tmp_path: Path) -> None:
    image, model = torch.rand(1, 1, 4, 4), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    loss = torch.nn.functional.cross_entropy(model(image), torch.tensor([2]))
    leak = fedtap.leak(model, torch.autograd.grad(loss, list(model.parameters())), shape=(1, 4, 4))
    for attack in ("linear", Linear()):
        torch.testing.assert_close(fedtap.attack(leak, attack).images[0], image, rtol=0, atol=1e-4)
    with pytest.raises(FedtapError, match="names 2 attacks, and one is run at a time"):
        fedtap.attack(leak, "linear,idlg")


def test_a_run_from_python_returns_the_rows_that_it_leaves(tmp_path: Path) -> None:
    options = {"victims": 1, "model": "mlp", "size": 8, "attack": "linear", "seed": [1, 2]}
    found = fedtap.run("first_leak", out=tmp_path, device="cpu", as_frame=False, **options)
    assert [(row["attack"], row["seed"], row["label_correct"]) for row in found] == [("linear", 1, 1), ("linear", 2, 1)]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]) == found[0]
    leak = fedtap.load(tmp_path / "leaks" / "part_0.safetensors")
    assert fedtap.attack(leak, "linear").labels.shape == (1, 1)
    with pytest.raises(FedtapError, match="add --overwrite"):
        fedtap.run("first_leak", out=tmp_path, **{**options, "victims": 2})
    with pytest.raises(FedtapError, match="did you mean --victims"):
        fedtap.run("first_leak", victim=1)


def test_rows_are_a_frame_if_pandas_is_there(tmp_path: Path) -> None:
    options = {"victims": 1, "model": "mlp", "size": 8, "attack": "linear,grey", "seed": [1, 2], "device": "cpu"}
    pandas = pytest.importorskip("pandas")
    frame = fedtap.run("first_leak", out=tmp_path, **options)
    assert isinstance(frame, pandas.DataFrame)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [*frame["psnr"]] == [row["psnr"] for row in rows]
    assert {*frame.columns} == {name for row in rows for name in row}
    assert frame.groupby("attack")["psnr"].count().to_dict() == {"grey": 2, "linear": 2}


def test_rows_are_a_list_without_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = {"victims": 1, "model": "mlp", "size": 8, "attack": "linear", "device": "cpu"}
    assert type(fedtap.run("first_leak", out=tmp_path, **options)) is list
    with pytest.raises(FedtapError, match=r"pip install 'fedtap\[pandas\]'"):
        fedtap.run("first_leak", out=tmp_path, as_frame=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    there = tmp_path_factory.mktemp("packaging")
    for name in ("fedtap", "tests", *FOLDERS):
        shutil.copytree(ROOT / name, there / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, there / "tree")
    said(
        sys.executable,
        "-c",
        f"from setuptools import build_meta as b; b.build_sdist({str(there)!r})",
        cwd=there / "tree",
    )
    (archive,) = there.glob("*.tar.gz")
    shutil.unpack_archive(archive, there)
    shutil.rmtree(there / "tree")
    (unpacked,) = there.glob("fedtap-*/")
    return built(unpacked, there)


def built(source: Path, folder: Path) -> Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    said(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_its_data_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        assert f"Version: {PROJECT['project']['version']}\n" in packed.read(metadata).decode()
    assert {name.split("/")[0] for name in names} == {"fedtap", metadata.split("/")[0]}
    code = {
        "/".join(("fedtap", *file.relative_to(ROOT).parts)) for name in FOLDERS for file in (ROOT / name).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == {"fedtap/__init__.py", *code}
    assert sum(name.startswith("fedtap/scenarios/course/units/") for name in names) == 7 + 6 + 7 + 1 + 2
    forms = {f"fedtap/simulator/report/{form}.schema.json" for form in ("row", "run")}
    assert {"fedtap/py.typed", *forms} <= names
    assert {Path(name).name for name in names if "lpips" in name} == {
        "lpips_alexnet_features.safetensors",
        "lpips_alexnet_features.LICENSE.txt",
    }


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """Python of an environment with the wheel; the dependencies are this environment's."""
    venv = wheel.parent / "venv"
    said(sys.executable, "-m", "venv", "--without-pip", venv, cwd=wheel.parent)
    paths = {"base": str(venv), "platbase": str(venv)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", site)
    said(sys.executable, "-m", "pip", "install", *options, wheel, cwd=wheel.parent)
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python"


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A user's folder, whose own code has the names of fedtap's folders."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is the user\\'s own')\n")
    return tmp_path


def test_a_wheel_plays_a_scenario_beside_folders_of_the_same_names(python: Path, beside: Path) -> None:
    options = ("--victims", "1", "--size", "32", "--model", "mlp", "--attack", "linear", "--out", "out")
    said(python, "-m", "fedtap.scenarios", "run", "first_leak", *options, cwd=beside)
    (row,) = map(json.loads, (beside / "out/rows.jsonl").read_text().splitlines())
    assert row["label_correct"] == 1
    assert row["lpips"] < 0.01, "the features for LPIPS come with the wheel"


def test_a_wheel_copies_the_course(python: Path, beside: Path) -> None:
    said(python, "-m", "fedtap.scenarios", "course", "new", "made", "--student", "Ada", cwd=beside)
    assert len([*beside.glob("made/*/notebook.py")]) == 7
    assert len([*beside.glob("made/*/answers.json")]) == 6


def test_the_documented_client_mod_works_from_a_wheel(python: Path, beside: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/defences.md").read_text(), re.DOTALL)
    (example,) = (code for code in blocks if "mods=[mod_of(" in code)
    (beside / "mine.py").write_text(f"{example}\nimport fedtap.clients.mod\nprint(fedtap.clients.mod.__file__)\n")
    assert python.parents[1] in Path(said(python, "mine.py", cwd=beside).strip()).parents


def test_a_wheel_is_not_hidden_by_the_repository_as_the_current_folder(python: Path) -> None:
    code = "import fedtap.scenarios.command.options as ours; print(ours.__file__)"
    assert python.parents[1] in Path(said(python, "-c", code, cwd=ROOT).strip()).parents
