"""The documentation: tutorials run, commands parse, links lead somewhere, and the site has every page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from torch import nn

from fedtap.attackers import parse
from fedtap.scenarios.certificates import main as certificates
from fedtap.scenarios.command.grid import attack_grid
from fedtap.scenarios.command.main import cli
from fedtap.scenarios.command.options import pairs
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import FedtapError

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
COMMAND = typer.main.get_command(cli)
MOST_WORDS = 800
ELSEWHERE = ("docker", "conda", "flwr", "flower-superlink", "flower-supernode")
"""Programs whose options are not ours to check; test_deploy.py starts Flower's."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Python.


def run_blocks(page: Path) -> dict[str, Any]:
    """The names that a page's Python leaves, its blocks run in order as a script of their own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_there_are_five_tutorials() -> None:
    assert len(TUTORIALS) >= 5


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", None)  # so that what a tutorial puts there is taken away again
    assert sum("assert " in code for code in blocks(page, "python")) >= 2, "a tutorial checks what it says"
    run_blocks(page)


def test_the_readmes_python_reconstructs_an_image_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    names = run_blocks(README)
    assert names["found"].labels.item() == 3
    assert (names["found"].images[0] - names["image"]).abs().max() < 0.01
    assert capsys.readouterr().out.startswith("3 ")


@pytest.mark.parametrize(("page", "name"), [("own_model", "net"), ("defences", "fixed")])
def test_a_documented_model_takes_images(page: str, name: str) -> None:
    names: dict[str, Any] = {"__name__": page}
    (code,) = (block for block in blocks(ROOT / f"docs/{page}.md", "python") if f"def {name}(shape, classes)" in block)
    exec(compile(code, page, "exec", dont_inherit=True), names)
    model = names[name]((3, 32, 32), 10)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# Commands.


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, and what follows `fedtap run` in the last column of its tables."""
    shell = [re.sub(r"\\\n\s*", "", block) for block in blocks(page, "sh")]  # a line may go on after a backslash
    lines = [line.strip() for block in shell for line in block.splitlines() if line.strip()]
    tables = re.findall(r"\| `fedtap run …` \|\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"))
    rows = [row for table in tables for row in table.splitlines()]
    return lines + [f"fedtap run {cell}" for row in rows for cell in re.findall(r"\| `([^`]*)` \|$", row)]


def parsed(line: str) -> None:
    """Parse a command as the shell and the program that it names do, and play nothing."""
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        command, *rest = words
        (package,) = (word for word in rest if re.fullmatch(r"(fedtap|\.)(\[[\w,]+\])?", word))
        options = {word for word in rest if word.startswith("-")}
        assert options in ({"-e"}, {"--wheel-dir"}, {"--no-index", "--find-links"})
        assert command == ("wheel" if "--wheel-dir" in options else "install")
        assert set(re.findall(r"\w+", package.removeprefix("fedtap"))) <= extras.keys()
    elif program == "fedtap":
        parsed_fedtap(words)
    elif words[:2] == ["-m", "fedtap.scenarios.certificates"]:
        application = typer.Typer()
        application.command()(certificates)
        typer.main.get_command(application).make_context("certificates", words[2:])
    else:
        assert program in ELSEWHERE, f"no test knows the program of {line!r}"


def parsed_fedtap(words: list[str]) -> None:
    name, *rest = words
    assert isinstance(COMMAND, typer.core.TyperGroup)
    command = COMMAND.commands[name]
    shown = "--help" in rest
    context = command.make_context(name, [word for word in rest if word != "--help"])
    known = context.params
    if name == "run":
        assert not shown or not context.args
        plan(known["name"], pairs(context.args))
    elif name == "tune":
        plan("tuning", pairs([*context.args, "--attack", ",".join(attack_grid(known["attack"], known["tries"]))]))
    elif name == "attack" and known["attack"]:
        parse(known["attack"])


WRITTEN = [(page, line) for page in (README, CONTRIBUTING, *PAGES) for line in commands_of(page)]
WHOLE = [pytest.param(line, id=f"{page.stem}: {line}"[:90]) for page, line in WRITTEN if "…" not in line]


@pytest.mark.parametrize("line", WHOLE)
def test_a_documented_command_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text("A document.\n" * 200)
    monkeypatch.chdir(tmp_path)
    parsed(line)


def test_the_documented_workflow_of_an_audit_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (workflow,) = blocks(ROOT / "docs/audit.md", "yaml")
    (audit,) = (
        run for step in yaml.safe_load(workflow)["jobs"]["audit"]["steps"] if "audit" in (run := step.get("run", ""))
    )
    parsed(audit)


def test_every_command_of_the_readme_is_whole() -> None:
    assert not [line for page, line in WRITTEN if page == README and "…" in line]
    assert len(commands_of(README)) >= 18


@pytest.mark.parametrize(
    "line",
    ["fedtap run first_leak --victim 3", "fedtap run first_leek", "fedtap attack a.safetensors --attack idgl"],
)
def test_a_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(FedtapError):
        parsed(line)


# Length, links, and the site.


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site writes them; a page that is included counts as the page's own."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r'^--8<-- "(.*?)"$', text, re.MULTILINE):
        text += (ROOT / name).read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not target.startswith(("https://", "http://")):
            yield target


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_a_file_and_its_heading(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if path == "first_leak.png":  # which docs/hooks.py brings
            continue
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target
        inside = file.is_relative_to(ROOT / "docs")
        assert inside or page.parent == ROOT, f"{target}: the site has its own pages alone"


def listed(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, dict):
            for below in entry.values():
                yield from listed(below)
        else:
            yield entry


def test_the_site_lists_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    names = [str(page.relative_to(ROOT / "docs").as_posix()) for page in PAGES]
    assert sorted(listed(site["nav"])) == names
    assert site["strict"]


# What the hosting site, Docker and conda read.


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_commands_that_exist(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = yaml.safe_load(file.read_text())["jobs"].values()
    lines = [line.strip() for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert lines
    for line in lines:
        if line.startswith(("make ", "fedtap run", "fedtap list")):
            parsed(line)
    assert all(job["timeout-minutes"] for job in jobs)


def test_the_workflow_tests_each_declared_python_on_three_systems() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {one.rpartition(" :: ")[2] for one in project["classifiers"] if "Python :: 3." in one}
    matrix = yaml.safe_load(WORKFLOWS[-1].read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert declared <= set(matrix["python"])
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}


@pytest.mark.parametrize("name", ["bug", "idea", "result"])
def test_an_issue_form_asks_for_something(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_container_holds_the_whole_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    recipe = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"^COPY (\w+) /source/\w+$", recipe, re.MULTILINE)) == folders
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} >= folders
    for bound in ("torch", "torchvision"):
        (wanted,) = (one for one in project["project"]["dependencies"] if one.startswith(f"{bound}>"))
        assert f"'{wanted}'" in recipe
    extras = project["project"]["optional-dependencies"]
    (pip,) = (
        one["pip"]
        for one in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if "pip" in one and isinstance(one, dict)
    )
    assert set(re.findall(r"\w+", pip[0].removeprefix("-e ."))) <= extras.keys()
