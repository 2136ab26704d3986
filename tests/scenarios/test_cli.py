"""The command line as a user meets it: what a run leaves, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import fedtap.simulator.data.vision
import fedtap.simulator.federation.settings
from fedtap.attackers import ATTACKS, parse
from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.main import main
from fedtap.scenarios.command.options import RENAMED, absolute, combinations, options_text, pairs
from fedtap.scenarios.command.plan import plan, plan_of
from fedtap.scenarios.gradients.canary import Canary
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.leaks import Protocol, load
from fedtap.simulator.models.registry import build
from fedtap.simulator.options import options_of
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.recorder import recorder

QUICK = ["--victims", "2", "--attack", "linear", "--model", "mlp"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedtap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--out", str(tmp_path)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "rows.jsonl",
        "rows.csv",
        "leaks",
        "reconstructions",
        "strip.png",
        "report.html",
    }
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["finished"]
    assert about["schema"] == 2
    assert [setting["model"] for setting in about["settings"]] == ["mlp"]
    assert about["settings"][0]["victims"] == 2
    page = (tmp_path / "report.html").read_text()
    assert all(f"alt='linear on mlp, client {client}'" in page for client in (0, 1))
    assert {"seed", "device", "versions", "question"} <= about.keys()
    columns = (
        "scenario attack defence dataset model client round seed mse psnr ssim lpips label_correct recovered psnr_blind"
    )
    for row in rows(tmp_path):
        assert {*columns.split(), "seconds"} <= row.keys()
        assert row["psnr"] > 40 > 20 > row["psnr_blind"]  # type: ignore[operator]
        assert row["recovered"] == 1
        assert row["error"] is None
    page = (tmp_path / "report.html").read_text()
    assert "curious server" in page
    assert "Does a photograph come back" in page
    assert Image.open(tmp_path / "strip.png").size[0] > 300


def test_a_sweep_plays_every_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["batch_size", *QUICK, "--batch", "1,2", "--size", "16", "--out", str(tmp_path)]
    assert run(monkeypatch, *words) == 0  # `run` may be left out
    assert [(row["batch"], row["client"]) for row in rows(tmp_path)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(row["lpips"] is None and "31" in str(row["lpips_note"]) for row in rows(tmp_path))


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "first_leak", "--victims", "2", "--attack", "linear,idlg(steps=5)", "--model", "mlp"]
    calls: list[str] = []

    def stops(*_: object) -> object:
        calls.append("idlg")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ATTACKS["idlg"], "reconstruct", stops)
        assert run(patch, *words, "--out", str(tmp_path)) != 0
    assert calls
    assert [row["attack"] for row in rows(tmp_path)] == ["linear"] * 2
    assert not json.loads((tmp_path / "run.json").read_text())["finished"]
    finished = rows(tmp_path)

    assert run(monkeypatch, *words, "--victims=2", "--out", str(tmp_path), "--resume") == 2  # given twice
    with monkeypatch.context() as patch:
        patch.setattr(ATTACKS["linear"], "reconstruct", stops)  # what is finished is not played again
        assert run(patch, *words, "--out", str(tmp_path), "--resume") == 0
    assert rows(tmp_path)[:2] == finished
    assert [row["attack"] for row in rows(tmp_path)] == ["linear"] * 2 + ["idlg"] * 2
    assert run(monkeypatch, *words, "--seed", "3", "--out", str(tmp_path), "--resume") == 2  # another run


def test_a_resumed_run_must_hear_what_it_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dataset(seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 3), np.uint8)
        labels = np.arange(40) % 3
        np.savez(tmp_path / "w.npz", x_train=pixels[:30], y_train=labels[:30], x_test=pixels[30:], y_test=labels[30:])

    words = ["run", "first_leak", *QUICK, "--dataset", str(tmp_path / "w.npz"), "--out", str(tmp_path / "out")]
    dataset(seed=0)
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, *words, "--resume") == 0
    dataset(seed=1)
    fedtap.simulator.federation.settings.dataset_of.cache_clear()
    private_data.cache_clear()
    before = rows(tmp_path / "out")
    assert run(monkeypatch, *words, "--resume") == 2
    assert "data or the clients have changed" in capsys.readouterr().err
    assert rows(tmp_path / "out") == before


def test_a_new_run_leaves_nothing_of_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path)]
    words = ["run", "first_leak", "--victims", "1", "--model", "mlp"]
    assert run(monkeypatch, *words, "--attack", "linear,idlg(steps=1)", *out) == 0
    assert run(monkeypatch, *words, "--attack", "linear", *out, "--overwrite") == 0
    assert [path.name for path in (tmp_path / "reconstructions").iterdir()] == ["part_0-0-linear.safetensors"]
    assert len(rows(tmp_path)) == 1


def test_results_are_not_replaced_by_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert run(monkeypatch, "run", "first_leak", *QUICK, *out) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    leak = str(tmp_path / "leaks/part_0.safetensors")
    assert run(monkeypatch, "attack", leak, "--attack", "linear", *out) == 2
    assert "would replace" in capsys.readouterr().err
    assert run(monkeypatch, "run", "batch_size", *QUICK, "--batch", "1", *out) == 2
    assert run(monkeypatch, "run", "first_leak", "--attack", "linear", "--model", "lenet", *out) == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_sweep_does_not_repeat_what_it_does_not_touch() -> None:
    parts = plan("first_leak", {"model": "lenet,convnet", "victims": "1"})
    assert [part.model for part in parts] == ["lenet", "mlp", "convnet"]


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show"], "Missing argument 'RUN': see fedtap show --help."),
        (["--versoin"], "see fedtap --help."),
        (["results", "biuld"], "No such command 'biuld': "),
        (["run", "first_leak", "--parallel", "0"], "0 is not in the range x>=1: see fedtap run --help."),
        (["run", "first_leak", "--victims", "9" * 20], "at most 1e+06"),
        (["run", "first_leak", "--rounds", "9" * 20], "at most 1e+06"),
        (["run", "first_leak", "--clients", "9" * 20], "at most 1e+06"),
        (["run", "first_leak", "--defence", "clip(nan)"], "(a value in it is no constant): write none, or"),
        (["run", "first_leak", "--attack", "idlg("], "cannot be read (invalid syntax): write attacks as"),
        (["run", "first_leak", "--device", "gpu"], "'gpu' is no device on which fedtap computes: give cpu,"),
        (["run", "first_leak", "--device", "cuda:99999"], "is not to be had here"),
        (["bench", "compare", "nosuch", "a"], "fedtap: nosuch is no file, so it cannot be read: check the path."),
        (["run", "first_leak", "--dataset", "my_pictures"], "or a folder, a .zip or an .npz by its path"),
    ],
)
def test_words_that_cannot_be_used_are_told_of_in_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert said.casefold() in told.casefold()  # typer's versions differ in what they suggest
    assert told.startswith("fedtap: ")
    assert told.count("\n") == 1


def test_a_saved_leak_is_attacked_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--out", str(tmp_path / "a")) == 0
    leak = str(tmp_path / "a/leaks/part_0.safetensors")
    assert run(monkeypatch, "attack", leak, "--attack", "linear", "--out", str(tmp_path / "b")) == 0
    (first, _) = rows(tmp_path / "b")
    assert "psnr" not in first
    assert first["objective"] is not None
    assert (tmp_path / "b/strip.png").is_file()
    same = (tmp_path / "a/reconstructions/part_0-0-linear.safetensors").read_bytes()
    assert (tmp_path / "b/reconstructions/0-linear.safetensors").read_bytes() == same


def test_an_attack_on_a_saved_leak_ends_with_labels_explanation_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--out", str(tmp_path / "a")) == 0
    leak, out = str(tmp_path / "a/leaks/part_0.safetensors"), str(tmp_path / "b")
    capsys.readouterr()
    assert run(monkeypatch, "attack", leak, "--attack", "linear", "--client", "1", "--out", out) == 0
    said = capsys.readouterr().out.splitlines()
    (found,) = rows(tmp_path / "b")
    assert f"linear: labels {found['labels'][0]}; what it brought back explains the gradient (0 of it is left)." in said
    assert f"Picture: {tmp_path / 'b' / found['picture']}" in said
    assert (tmp_path / "b" / found["picture"]).is_file()
    attack = "linear,idlg(steps=1)"
    assert run(monkeypatch, "attack", leak, "--attack", attack, "--out", out, "--overwrite") == 0
    said = capsys.readouterr().out.splitlines()
    assert "linear: 2 of 2 gradients are explained." in said
    assert any(line.startswith("idlg: 0 of 2 gradients are explained; the others: not converged") for line in said)
    assert f"Pictures: {tmp_path / 'b/pictures'}" in said


def test_a_folder_of_recorded_leaks_is_attacked_with_those_of_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, shape = "mlp(width=8)", (1, 4, 4)
    network = build(model, shape, 3, seed=0)
    LocalGrid(ClientApp(), 1)  # names the run, without which Flower makes no message
    folder = tmp_path / "leaks"
    ear = recorder(folder, Protocol(model, shape, 3, batch=1, learning_rate=0.1), network)
    before, draw = ArrayRecord(network.state_dict()), torch.Generator().manual_seed(0)
    for rnd in (1, 2):
        for client in (7, 8, 9):
            image, label = torch.rand(1, *shape, generator=draw), torch.tensor([client % 3])
            loss = F.cross_entropy(network(image), label)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            names = [name for name, _ in network.named_parameters()]
            after = dict(network.state_dict())
            after |= {name: after[name] - 0.1 * each for name, each in zip(names, gradients, strict=True)}
            order = Message(RecordDict({"a": before, "c": ConfigRecord({"server-round": rnd})}), client, "train")
            ear(order, Message(RecordDict({"a": ArrayRecord(after)}), reply_to=order))
    last = load(folder / "round_2.safetensors", build)[-1]
    last.save(folder / "by_itself.safetensors")  # as one victim, with its weights
    (folder / "torn.safetensors").write_bytes(b"x")
    assert run(monkeypatch, "attack", str(folder), "--attack", "linear", "--out", str(tmp_path / "all")) == 0
    found = rows(tmp_path / "all")
    good = [(row["client"], row["round"]) for row in found if "error" not in row]
    assert sorted(good) == sorted([(c, r) for r in (1, 2) for c in (7, 8, 9)] + [(9, 2)])
    assert sum("torn" in str(row["leak"]) for row in found) == 1
    some = ["attack", str(folder), "--attack", "linear", "--client", "8", "--client", "7", "--round", "2"]
    assert run(monkeypatch, *some, "--out", str(tmp_path / "some")) == 0
    good = [(row["client"], row["round"]) for row in rows(tmp_path / "some") if "error" not in row]
    assert good == [(7, 2), (8, 2)]
    (folder / "torn.safetensors").unlink()
    capsys.readouterr()
    assert run(monkeypatch, "attack", str(folder), "--client", "5", "--out", str(tmp_path / "none")) == 2
    assert "No leak there is of client [5]" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_ones_own_model_is_named_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
    )
    words = ["run", "first_leak", "--victims", "2", "--attack", "linear", "--model", "mine:net", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedtap.scenarios", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(row["psnr"] > 40 for row in rows(tmp_path / "out"))  # type: ignore[operator]
    leak = str(tmp_path / "out/leaks/part_0.safetensors")
    assert run(monkeypatch, "attack", leak, "--attack", "linear", "--out", str(tmp_path / "no")) == 2
    assert "may not name code" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_list_names_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    for name in ("first_leak", "batch_size", "local_steps", *ATTACKS, "photos", "cifar10", "resnet20", "vit", "mlp"):
        assert name in shown


def test_help_explains_a_scenarios_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "run", "batch_size", "--help") == 0
    shown = capsys.readouterr().out
    assert "1,2,4,8,16" in shown
    assert "--learning-rate" in shown
    assert "eavesdropper" in shown


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_help_of_a_scenario_goes_on_one_screen_and_names_every_option(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flags = [option.flag for option in options_of(SCENARIOS[name]).values()]
    for word, most in (("--help", 45), ("--help-all", 120)):
        assert run(monkeypatch, "run", name, word) == 0
        said = capsys.readouterr().out
        assert len(said.splitlines()) <= most
        told = said.split("With their meaning by --help-all:")
        assert len(told) == 1 or word == "--help"
        assert all(flag in re.findall(r"--[a-z-]+", said) for flag in flags)
        assert "--attack" not in flags or "--attack" in told[0]


@pytest.mark.parametrize("words", ["--version", "list", "run git --help", "run attention --help"])
def test_help_and_lists_need_no_torch(words: str) -> None:
    code = (
        "import sys; from fedtap.scenarios.command.main import main\n"
        f"sys.argv = ['fedtap', *{words.split()!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'flwr', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_former_names_of_options_are_refused_with_the_new_ones(name: str) -> None:
    known = options_of(SCENARIOS[name])
    for former, now in RENAMED.items():
        if now in known and former not in known:
            with pytest.raises(FedtapError, match=f"is called --{now.replace('_', '-')}"):
                plan(name, {former: "1"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "first_lek"], "did you mean first_leak?"),
        (["run", "first_leak", "--attack", "idgl"], "did you mean idlg?"),
        (["run", "first_leak", "--attack", "idlg(step=3)"], "did you mean steps?"),
        (["run", "first_leak", "--attack", "idlg(steps=0)"], "steps"),
        (["run", "first_leak", "--attack", "__import__('os')"], "attack"),
        (["run", "first_leak", "--victim", "3"], "did you mean --victims?"),
        (["run", "first_leak", "--victims", "three"], "is not a whole number"),
        (["run", "first_leak", "--batch", "0"], "at least 1"),
        (["run", "first_leak", "--learning-rate", "-1"], "out of range"),
        (["run", "first_leak", "--learning-rate", "nan"], "out of range"),
        (["run", "first_leak", "--victims", "1,,2"], "empty value"),
        (["run", "first_leak", "--victims"], "has no value"),
        (["run", "first_leak", "stray"], "belongs to no option"),
        (["run", "--victims", "2", "first_leak"], "comes before its options"),
        (["atack", "leak.safetensors"], "did you mean attack?"),
        (["first_lek"], "did you mean first_leak?"),
        (["run", "first_leak", "--alpha", "0.1"], "add --rounds"),
        (["run", "first_leak", "--seed", ",".join(map(str, range(99))), "--victims", "0"], "out of range"),
        (["run", "first_leak", "--dataset", "a" * 300], "no dataset named"),
        (["run", "first_leak", "--threat-model", "eavesdroper"], "did you mean eavesdropper?"),
        (["run", "first_leak", "--threat-model", "eavesdropper"], "does not know them"),
        (["run", "first_leak", "--model", "lenett"], "did you mean lenet?"),
        (["run", "first_leak", "--model", "no.such:thing"], "cannot be imported"),
        (["run", "first_leak", "--dataset", "photo"], "did you mean photos?"),
        (["run", "first_leak", "--dataset", "no/such/folder"], "no/such/folder"),
        (["run", "first_leak", "--victims", "100000"], "target data of photos holds"),
        (["run", "first_leak", "--clients", "5000"], "lower --clients"),
        (["run", "first_leak", "--device", "tpu7"], "'tpu7' is no device on which fedtap computes"),
        (["run", "first_leak", "--model", "lenet", "--attack", "linear"], "linear"),
        (["attack", "no.safetensors"], "does not exist"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert told.startswith("fedtap: ")
    assert said in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_cifar10_that_is_nowhere_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def no_network(data_root: Path) -> None:
        raise FedtapError("CIFAR-10 is not here and could not be downloaded: put a cifar10.npz there.")

    monkeypatch.setattr(fedtap.simulator.data.vision, "cifar10_arrays", no_network)
    words = [
        "run",
        "first_leak",
        "--dataset",
        "cifar10",
        "--data-root",
        str(tmp_path / "d"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert run(monkeypatch, *words) == 2
    assert "npz" in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--out", str(tmp_path)) == 2
    assert "no fedtap run left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_told_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path.open

    class HalfWritten:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, content: bytes) -> int:
            self._file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    def full(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        file = plain(path, mode, *given, **options)
        return HalfWritten(file) if "w" in mode and path.is_relative_to(tmp_path) else file

    monkeypatch.setattr(Path, "open", full)
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--out", str(tmp_path / "out")) == 2
    assert "No space left" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_dataset_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=pixels[:40], y_train=labels[:40], x_test=pixels[40:], y_test=labels[40:])
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--dataset", str(tmp_path / "own.npz"), "--out", str(out)) == 0
    assert all(row["psnr"] > 40 for row in rows(out))  # type: ignore[operator]


IMAGE_SCENARIOS = sorted(name for name, kind in SCENARIOS.items() if {"size", "batch"} <= options_of(kind).keys())


@hypothesis.settings(deadline=None)
@given(name=st.sampled_from(IMAGE_SCENARIOS), batch=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
def test_swept_knobs_make_one_part_each(name: str, batch: list[int]) -> None:
    parts = plan(name, {"batch": ",".join(map(str, batch)), "local_steps": "1", "attack": "linear", "model": "mlp"})
    parts = tuple(part for part in parts if not isinstance(part, Canary))
    assert list(dict.fromkeys(part.batch for part in parts)) == batch  # a scenario may sweep more by itself
    assert all(part.name == name and part.question for part in parts)


@pytest.mark.parametrize("name", IMAGE_SCENARIOS)
def test_every_scenario_can_be_planned_as_it_is(name: str) -> None:
    parts = plan(name, {})
    assert all(part.attacks for part in parts)
    for part in parts:
        for attack in part.attacks:
            assert parse(attack.written()) == (attack,)


def test_a_threat_model_that_is_named_is_the_one_that_listens() -> None:
    for words, threat_models in (
        ({}, {"eavesdropper", "curious_server"}),
        ({"threat_model": "curious_server"}, {"curious_server"}),
        ({"attack": "ridge"}, {"eavesdropper"}),
        ({"attack": "exact_git"}, {"curious_server"}),  # it compares gradients at the weights
        ({"attack": "idlg", "threat_model": "curious_server"}, {"curious_server"}),
    ):
        assert {part.threat_model for part in plan("git", words)} == threat_models
    with pytest.raises(FedtapError, match="no attacks of its own for the curious_server"):
        plan("drift", {"threat_model": "curious_server"})
    with pytest.raises(FedtapError, match="--sigma is the defence"):
        plan("noise", {"defence": "noise(0.5)"})
    assert plan("noise", {"sigma": "0.10"})[0].defence == "noise(0.1)"
    assert plan("first_leak", {"defence": " noise ( 1e-1 ) "})[0].defence == "noise(0.1)"
    swept = plan("first_leak", {"defence": "local_dp(1, 1,1,0.5),clip(1)+sign", "attack": "idlg"})
    assert [part.defence for part in swept] == ["local_dp(1.0, 1.0, 1.0, 0.5)", "clip(1.0)+sign()"]
    for text in ("clip(1", "clip(1,sign()", "clip)1(,sign()"):
        with pytest.raises(FedtapError, match="--defence"):
            plan("first_leak", {"defence": text})


@given(word=st.text(max_size=12), knob=st.sampled_from(["victims", "learning_rate", "batch", "alpha", "threat_model"]))
def test_any_word_is_a_value_or_a_clear_error(word: str, knob: str) -> None:
    try:
        found = combinations(options_of(SCENARIOS["first_leak"]), {knob: word})
    except FedtapError as error:
        assert knob.replace("_", "-") in str(error)  # noqa: PT017
    else:
        assert len(found) == word.count(",") + 1


def test_run_config_means_the_same_as_the_command_line() -> None:
    words = ["--victims", "3", "--batch=2,4", "--attack", "linear,idlg(steps=20)", "--dataset", "my 'own' photos"]
    config: UserConfig = {"scenario": "batch_size", "options": shlex.join(words), "data-root": "/data", "out": ""}
    assert plan_of(config) == plan("batch_size", pairs(words))
    assert plan_of({"scenario": "noise", "options": ""}) == plan_of({"scenario": "noise"}) == plan("noise", {})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "names no scenario"),
        ({"scenario": "", "options": "--victims 3"}, "names no scenario"),
        ({"scenario": "first_leak", "victims": 3}, "no key 'victims': a scenario's options go into one string"),
        ({"scenario": "first_leak", "options": "--attack 'idlg"}, "cannot be split into words .No closing quotation"),
        ({"scenario": "first_leak", "options": 3}, "'3' belongs to no option"),
        ({"scenario": "first_leak", "options": "--victims 3 --victims 4"}, "--victims is given twice"),
        ({"scenario": "first_leak", "options": "--victim 3"}, "did you mean --victims"),
    ],
)
def test_a_run_config_that_cannot_be_read_is_one_sentence(config: UserConfig, sentence: str) -> None:
    with pytest.raises(FedtapError, match=sentence) as error:
        plan_of(config)
    assert len(str(error.value)) < 300


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]*", fullmatch=True), st.text(), max_size=4))
def test_options_in_one_string_are_read_as_they_were_written(knobs: dict[str, str]) -> None:
    found = pairs(shlex.split(options_text(knobs)))
    assert {name.replace("-", "_"): value for name, value in found.items()} == knobs


def test_files_that_options_name_are_absolute_before_they_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.npz", "b,c.npz", "photos", "net.safetensors"):
        (tmp_path / name).touch()
    given = {"dataset": "a.npz,cifar10,photos,gone.npz", "target-dataset": "b,c.npz", "weights": "net.safetensors"}
    found = absolute(options_of(SCENARIOS["first_leak"]), {**given, "auxiliary": "to_be_made", "attack": "a.npz"})
    assert found == {
        "dataset": f"{tmp_path / 'a.npz'},cifar10,photos,gone.npz",
        "target_dataset": str(tmp_path / "b,c.npz"),
        "weights": str(tmp_path / "net.safetensors"),
        "auxiliary": str(tmp_path / "to_be_made"),
        "attack": "a.npz",
    }


def test_each_option_that_speaks_of_a_file_is_marked() -> None:
    marked = set()
    for name, scenario in SCENARIOS.items():
        for option, known in options_of(scenario).items():
            about = known.option.help
            if known.type is str and re.search(r"\b(files?|folders?|paths?|zip|npz|json|safetensors)\b", about, re.I):
                assert known.option.file, f"--{option} of {name} names a file: file=True"
            marked |= {option} if known.option.file else set()
    files = {"dataset", "target_dataset", "data", "draws", "weights", "trained_attack", "auxiliary", "model"} | {
        "encoder",
        "pretraining",
    }
    assert marked == files
