"""The run folder: nothing in it is lost, and a run that is stopped anywhere goes on to the same rows."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtap.clients.app import client_app
from fedtap.simulator import files
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.report import page as report
from fedtap.simulator.report.folder import Folder, check_folder, place, read_rows
from fedtap.simulator.run import described_run, device_named, run
from fedtap.simulator.wire.grid import LocalGrid
from tests.support.scenes import Scene

ABOUT: dict[str, Any] = {
    "name": "ask",
    "settings": [{"scenario": "Ask", "seed": 0}],
    "seed": 0,
    "device": "a CPU",
    "versions": {"fedtap": "0.1.0", "torch": "2"},
    "started": "2026-01-01T00:00:00Z",
}
OTHER = ABOUT | {"settings": [{"scenario": "Ask", "seed": 1}]}
CPU = torch.device("cpu")
PART = ".run.json.0123abcd.fedtap-part"


def left(out: Path, about: dict[str, Any] = ABOUT) -> Path:
    """A folder with a run of these settings."""
    Folder(out, dict(about)).add([{"unit": "part_0"}])
    return out


def sentence(error: pytest.ExceptionInfo[FedtapError]) -> str:
    said = str(error.value)
    assert len(said) < 300
    assert "\n" not in said
    return said


def test_temporaries_of_a_killed_run_are_no_obstacle_and_are_removed(tmp_path: Path) -> None:
    for name in (PART, "notes/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FedtapError, match="no fedtap run left"):
        check_folder(tmp_path, ABOUT)
    (tmp_path / "notes/x").unlink()
    (tmp_path / "notes").rmdir()
    for resume in (True, False):
        (tmp_path / PART).touch()
        for folder in ("leaks", "reconstructions", "trained_attacks", "auxiliary/0f"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / PART).touch()
        if not (tmp_path / "run.json").exists():
            (tmp_path / "run.json").write_text(json.dumps(ABOUT))
        Folder(tmp_path, dict(ABOUT), resume=resume)
        assert not list(tmp_path.rglob("*.fedtap-part"))


def test_a_temporary_alone_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / PART).touch()
    assert check_folder(tmp_path, ABOUT, resume=True) is None
    assert place(ABOUT, None, tmp_path) == tmp_path


def test_a_rerun_removes_what_fedtap_named_and_nothing_else(tmp_path: Path) -> None:
    ours = [
        "rows.jsonl",
        "strip.png",
        "report.html",
        "leaks/part_0.safetensors",
        "leaks/part_10.json",
        "reconstructions/part_0-1-idlg.safetensors",
        "reconstructions/0-linear.safetensors",
        "trained_attacks/part_0-0-ridge.safetensors",
        "trained_attacks/part_0-0-ridge.json",
        "trained_attacks/part_0-0-1-lti.json",
    ]
    mine = [
        "notes.md",
        "leaks/mine.safetensors",
        "reconstructions/best.png",
        "trained_attacks/tuned.json",
        "auxiliary/a/auxiliary.json",
    ]
    left(tmp_path)
    for name in ours + mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    Folder(tmp_path, dict(ABOUT))
    kept = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert kept == {"run.json", *mine}
    for folder in ("leaks", "reconstructions", "trained_attacks"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
    Folder(tmp_path, dict(ABOUT))
    assert not (tmp_path / "leaks").exists()


def test_another_run_is_not_replaced_unless_that_is_said(tmp_path: Path) -> None:
    left(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for about in (OTHER, ABOUT | {"name": "attack"}, ABOUT | {"seed": 3}, ABOUT | {"leak": "0f"}):
        with pytest.raises(FedtapError, match="would replace: add --overwrite, or name another --out") as error:
            Folder(tmp_path, dict(about))
        sentence(error)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    Folder(tmp_path, dict(OTHER), overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == OTHER["settings"]
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_is_overwritten_is_never_called_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old run's files go: no rows of the old run under the new run's name."""
    left(tmp_path, ABOUT | {"finished": True})
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        Folder(tmp_path, dict(OTHER), overwrite=True)
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["settings"], about["finished"]) == (ABOUT["settings"], False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("versions", {"fedtap": "0.1.0", "torch": "1"}),
        ("device", "a GPU"),
        ("settings", [{"scenario": "Ask", "seed": 1}]),
        ("seed", 1),
        ("leak", "0f"),
    ],
)
def test_a_run_is_resumed_with_the_same_settings_alone(name: str, value: Any, tmp_path: Path) -> None:
    left(tmp_path)
    with pytest.raises(FedtapError, match=f"a run that differs in {name}, so it cannot be resumed") as error:
        Folder(tmp_path, ABOUT | {name: value}, resume=True)
    sentence(error)
    assert Folder(tmp_path, dict(ABOUT), resume=True).before == {"part_0": [{"unit": "part_0"}]}


def test_a_run_takes_the_next_free_folder(tmp_path: Path) -> None:
    usual = tmp_path / "runs/ask"
    assert place(ABOUT, None, usual) == usual
    assert not usual.parent.exists()
    left(usual)
    assert place(ABOUT, None, usual) == usual  # played again in place
    second = place(OTHER, None, usual)
    assert second == usual.with_name("ask-2")
    left(second, OTHER)
    (usual.with_name("ask-3")).mkdir()
    (usual.with_name("ask-3") / "thesis.tex").write_text("precious")
    (usual.with_name("ask-x")).touch()
    third = ABOUT | {"seed": 7}
    assert place(third, None, usual) == usual.with_name("ask-4")
    assert place(third, None, usual, overwrite=True) == usual
    assert place(OTHER, None, usual) == second
    with pytest.raises(FedtapError, match="holds a run that differs in settings and seed, so it cannot be resumed"):
        place(third, None, usual, resume=True)
    assert place(OTHER, None, usual, resume=True) == second
    newer = left(usual.with_name("ask-12"), ABOUT | {"started": "2026-01-02T00:00:00Z"})
    assert place(ABOUT, None, usual, resume=True) == newer
    with pytest.raises(FedtapError, match="leave out one of them"):
        place(ABOUT, usual, usual, resume=True, overwrite=True)


def test_a_resumed_run_that_never_began_begins(tmp_path: Path) -> None:
    assert place(ABOUT, None, tmp_path / "runs/ask", resume=True) == tmp_path / "runs/ask"


ROW = {"unit": "part_0-0-dlg", "attack": "dlg", "client": 0, "round": 1, "error": None}
LINE = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    "content",
    [
        LINE,
        LINE + b"\n" + LINE[:-9] + b"\n",
        b"[]\n",
        b"3\n",
        b"null\n",
        b"\n",
        b"{}\n",
        b'{"unit": 3}\n',
        LINE.replace(b'"round": 1', b'"round": NaN') + b"\n",
        LINE.replace(b'"round": 1', b'"round": 1e999') + b"\n",
        LINE.replace(b'"round": 1', b'"round": ' + b"9" * 5000) + b"\n",
        LINE.replace(b"dlg", b"\xff") + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"unit":' * 100_000 + b"\n",
    ],
    ids=range(14),
)
def test_damaged_rows_are_told_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    left(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(FedtapError, match=r"rows.jsonl is damaged \(line \d: .*run again without --resume") as error:
        check_folder(tmp_path, ABOUT, resume=True)
    sentence(error)
    Folder(tmp_path, dict(ABOUT))  # as it says


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_are_rows_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(LINE + b"\n" + b"\n".join(lines))
    try:
        assert all(type(row["unit"]) is str for row in read_rows(file))
    except FedtapError as error:
        assert len(str(error)) < 300  # noqa: PT017


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"versions": "fedtap"}', b'{"versions": 3}']
)
def test_a_folder_with_another_run_json_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    for flag in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FedtapError, match="no fedtap run left"):
            Folder(tmp_path, dict(ABOUT), **flag)
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_folder_that_cannot_be_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for name in ("loop", "loop/x", "dangling", "file", "file/x", "a" * 300, "new/" + "a" * 300, "nul\0", "new/nul\0"):
        for where in (tmp_path / name, tmp_path / name / "deep"):
            with pytest.raises(FedtapError, match="--out") as error:
                place(ABOUT, where, tmp_path)
            sentence(error)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(FedtapError, match="Permission denied"):
        place(ABOUT, tmp_path / "a/b", tmp_path)
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """As kill -9: nothing after it is done."""


class Writes:
    """Every write of fedtap, of which the one numbered `last` is cut short, with its temporary left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last = 0, 0
        true = files.write_atomically

        def write(path: Path, content: bytes) -> None:
            self.count += 1
            if self.count == self.last:
                path.parent.mkdir(parents=True, exist_ok=True)
                files._beside(path).write_bytes(content[: len(content) // 2])
                raise Killed
            true(path, content)

        for module in list(sys.modules.values()):
            if getattr(module, "write_atomically", None) is true:
                monkeypatch.setattr(module, "write_atomically", write)


TINY = Scene(attack="linear,training_mean", name="tiny", model="mlp", victims=2, size=8, pairs=2)


@pytest.fixture(autouse=True)
def plain_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drawing would take most of the time; it is written all the same."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    monkeypatch.setattr(report, "html", lambda *_, **__: "a page")
    monkeypatch.setattr(report, "strip", lambda *_: b"a strip")


def play(parts: list[Scene], out: Path, **flags: bool) -> list[dict[str, Any]]:
    def grid(part: Scene) -> LocalGrid:
        return LocalGrid(client_app(lambda config: tuple(parts)), part.victims + 1)

    return run(parts, grid, out, device=CPU, data_root=Path("data"), **flags)


def everything(out: Path) -> dict[str, Any]:
    """What a run left, timings aside."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "rows": [{name: row[name] for name in row if name not in ("seconds", "fit_seconds")} for row in rows],
        "finished": json.loads((out / "run.json").read_text())["finished"],
    }
    for file in out.rglob("*"):
        if file.is_file() and file.parent != out:
            found[str(file.relative_to(out))] = file.read_bytes()
    return found | {file.name: True for file in out.iterdir()}


def test_killed_at_any_write_it_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs, attackers, reconstructions and leaks of two parts; resumed, or run again."""
    device_named("cpu")
    parts = [TINY, dataclasses.replace(TINY, attack="linear", batch=2)]
    writes = Writes(monkeypatch)
    play(parts, tmp_path / "whole")
    whole, total = everything(tmp_path / "whole"), writes.count
    assert total > 15
    assert {"auxiliary", "trained_attacks", "reconstructions", "leaks", "strip.png", "report.html"} <= whole.keys()
    for moment in (1, *range(2, total, 5), total):  # the script kill_moments.py has all of them
        out = tmp_path / str(moment)
        writes.count, writes.last = 0, moment
        with pytest.raises(Killed):
            play(parts, out)
        play(parts, out, resume=moment % 4 != 0)
        assert everything(out) == whole, f"write {moment} of {total}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    play([TINY], out := tmp_path_factory.mktemp("finished") / "run")
    return out


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows[:1] + rows[2:],
        lambda rows: [*rows, rows[0]],
        lambda rows: [rows[0] | {"client": 7}, *rows[1:]],
        lambda rows: [rows[0] | {"psnr": "high"}, *rows[1:]],
        lambda rows: [rows[0] | {"settings": "other"}, *rows[1:]],
        lambda rows: [rows[0] | {"error": "failed"}, *rows[1:]],
        lambda rows: [{name: rows[0][name] for name in rows[0] if name != "model"}, *rows[1:]],
        lambda rows: [*rows, rows[0] | {"unit": "part_9-0-linear"}],
        lambda rows: rows[2:],
        lambda rows: rows[::-1],
    ],
)
def test_a_unit_without_exactly_its_rows_is_attacked_again(damage: Any, finished: Path) -> None:
    before = everything(finished)
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    (finished / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damage(rows)))
    play([TINY], finished, resume=True)
    after = everything(finished)
    assert sorted(map(str, after.pop("rows"))) == sorted(map(str, before.pop("rows")))
    assert after == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", lambda tensor: tensor[:1]),
        ("images", lambda tensor: tensor + 2),
        ("images", lambda tensor: tensor * torch.inf),
        ("images", lambda tensor: tensor.long()),
        ("labels", lambda tensor: tensor[:, :0]),
        ("labels", lambda tensor: tensor.float()),
        ("objective", lambda tensor: tensor[:1]),
    ],
)
def test_a_saved_guess_of_another_form_is_attacked_again(name: str, change: Any, finished: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = finished / "reconstructions/part_0-0-linear.safetensors"
    before, tensors = file.read_bytes(), load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file)
    play([TINY], finished, resume=True)
    assert file.read_bytes() == before


def test_a_resumed_run_attacks_nothing_that_is_whole(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attack in TINY.attacks:
        monkeypatch.setattr(type(attack), "reconstruct", lambda *_: 1 / 0)
    before = everything(finished)
    play([TINY], finished, resume=True)
    assert everything(finished) == before


def test_a_dataset_settings_or_versions_are_part_of_what_is_compared() -> None:
    about = described_run([TINY], CPU)
    assert {"schema", "settings", "seed", "device", "versions", "name"} <= about.keys()
    assert {"fedtap", "python", "torch", "flwr"} <= about["versions"].keys()
