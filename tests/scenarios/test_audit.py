"""Ten apps in the shape of public ones, and clients that do not send what they train: verdict, settings, sentence."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from flwr.clientapp.mod import LocalDpMod
from torch import nn

from fedtap.scenarios.audit import attacks
from fedtap.scenarios.audit.attacks import InputRange
from fedtap.scenarios.audit.audit import Audit, AuditSettings
from fedtap.scenarios.audit.command import MET, assert_no_leak
from fedtap.scenarios.audit.observe import Observer
from fedtap.scenarios.audit.replay import NotReplayedError, replayed
from fedtap.scenarios.audit.stand_in import NOT_ASKED, standing_in
from fedtap.simulator.data.vision import torchvision_datasets
from fedtap.simulator.errors import FedtapError
from tests.scenarios.test_cli import run as fedtap
from tests.support.app_with_mod import app_with_mod

APPS = Path(__file__).parents[1] / "apps"


@pytest.fixture(autouse=True)
def closed_form_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One quick attack, whose result does not depend on how much time there is."""
    monkeypatch.setattr(attacks, "_PANEL", ("exact_batch",))


def audited(
    name: str, out: Path, *overrides: str, nodes: int = 2, rounds: int = 2, data: Path | None = None
) -> dict[str, Any]:
    """audit.json of one of the apps."""
    settings = AuditSettings(APPS / name, out, nodes=nodes, rounds=rounds, overrides=overrides, data=data, minutes=60.0)
    Audit(settings).run()
    document: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return document


def lead(out: Path) -> str:
    """The page's first sentence."""
    (paragraph,) = re.findall(r"<p class='lead'>(.*?)</p>", (out / "report.html").read_text(), re.DOTALL)
    return unescape(paragraph)


SGD = {"optimiser": "SGD", "loss": "cross_entropy", "momentum": 0.0}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "quickstart": (
        "update",
        SGD | {"momentum": 0.9, "steps": 3, "batch_sizes": [32, 32, 32], "learning_rate": 0.01, "model": "Net"}
        | {"input_range": [[-1.0], [1.0]], "replay_error": 0.0},
        "What the clients of quickstart send was understood, and no attack was completed on it",
    ),
    "table_adam": (
        "update",
        {"optimiser": "Adam", "loss": "bce", "steps": 6, "batch_sizes": [8] * 6, "learning_rate": 1e-3}
        | {"replay_error": 0.0},
        "What the clients of table_adam send was understood, and no attack was completed on it",
    ),
    "no_torch": (
        "not understood",
        {"steps": 0, "model": None, "optimiser": None, "replay_error": None},
        "What the clients of no_torch send was not understood",
    ),
    "rows_query": (
        "raw data",
        {"steps": 0, "reason": "The server reads what is no parameter of the model, as it is: patients of 40x5."},
        "The server of rows_query is sent data as they are, in 2 of 2 exchanges.",
    ),
    "local_heads": (
        "update",
        SGD | {"steps": 2, "batch_sizes": [10, 10], "learning_rate": 0.1, "replay_error": 0.0}
        | {"reason": "Replay of 2 steps of SGD gives what was sent. 2 parameters stay with the client (head.weight, "
           "head.bias)."},
        "What the clients of local_heads send was understood, and no attack was completed on it",
    ),
    "opacus_sgd": (
        "noised",
        SGD | {"steps": 3, "learning_rate": 0.1, "input_range": [[-1.0], [1.0]]},
        "",  # as large as Opacus draws its batches, a closed form may be tried
    ),
    "weighted": (
        "gradient",
        SGD | {"steps": 1, "batch_sizes": [4], "learning_rate": 0.1, "input_range": [[-1.0], [1.0]]}
        | {"replay_error": 0.0},
        "The server of weighted can rebuild inputs of its clients: of those attacked, 8 of 8 (100% [63–100]) came back",
    ),
    "vae": (
        "not understood",
        {"optimiser": "Adam", "steps": 2, "batch_sizes": [8, 8], "loss": "mse", "replay_error": None},
        "What the clients of vae send was not understood, so its risk is not known. Replay cannot check the reply: "
        "what it minimises is not the value of one loss function of torch alone",
    ),
    "legacy": (
        "update",
        SGD | {"steps": 2, "batch_sizes": [8, 8], "learning_rate": 0.05, "replay_error": 0.0}
        | {"input_range": [[-0.424213], [2.821487]]},
        "What the clients of legacy send was understood, and no attack was completed on it",
    ),
    "secagg": (
        "masked",
        {"steps": 0},
        "The server of secagg reads nothing but sums over its clients, which SecAgg+ unmasks.",
    ),
}  # fmt: skip
"""App -> verdict on every exchange, what else is told of each, and how the page begins."""


@pytest.mark.parametrize("name", CASES)
def test_an_app_gets_its_verdict_its_settings_and_its_sentence(name: str, tmp_path: Path) -> None:
    verdict, settings, sentence = CASES[name]
    document = audited(name, tmp_path, nodes=3 if name == "secagg" else 2)
    exchanges = document["exchanges"]
    assert len(exchanges) == {"rows_query": 2, "secagg": 6}.get(name, 4)
    for told in exchanges:
        assert told["verdict"] == verdict
        assert {key: told[key] for key in settings} == settings
    assert lead(tmp_path).startswith(sentence)
    assert name != "opacus_sgd" or "noised" in lead(tmp_path)
    assert document["error"] is None
    assert document["finished"]
    assert document["not_tested"]


@pytest.mark.parametrize(
    ("lie", "verdict", "reason"),
    [
        ("half", "gradient", "The reply is 0.5 times the update that was trained"),
        ("noise", "noised", "what looks like Gaussian noise of standard deviation 0.0"),
        ("layer", "not understood", "The reply is not what the training that was seen makes"),
        ("nothing", "not understood", "The client trained, and yet it sent back what it was sent."),
        ("clipped", "gradient", "On the way the gradient was clipped, in one step to a length of 0.1."),
    ],
)
def test_a_client_that_does_not_send_what_it_trained_is_flagged(
    lie: str, verdict: str, reason: str, tmp_path: Path
) -> None:
    document = audited("tampered", tmp_path, f"lie={lie}", rounds=1)
    for told in document["exchanges"]:
        assert told["verdict"] == verdict
        assert reason in told["reason"]
        assert bool(told["attacks"]) == (verdict == "noised"), "what was changed otherwise is not attacked"
        assert lie == "clipped" or told["replay_error"] > 0.1
    assert document["risk"]["level"] == ("nothing" if verdict == "noised" else "not known")


def test_the_honest_client_of_the_same_app_is_replayed_and_its_rows_come_back(tmp_path: Path) -> None:
    document = audited("tampered", tmp_path, "lie=honest", rounds=1)
    assert [told["replay_error"] for told in document["exchanges"]] == [0.0, 0.0]
    assert document["risk"]["level"] == "identical"
    assert document["risk"]["blind"] == 0


def test_the_noise_of_a_mod_of_the_train_function_is_the_apps_own(tmp_path: Path) -> None:
    decoy = LocalDpMod(1.0, 1.0, 3.0, 1e-5)  # an object of the same kind that the app does not use
    path = app_with_mod(tmp_path / "noisy_train", "LocalDpMod(1.0, 1.0, 0.5, 1e-5)")
    document = audited(str(path), tmp_path / "out")
    assert {one["verdict"] for one in document["exchanges"]} == {"noised"}
    assert document["privacy"]["announced"].startswith("ε = 0.5 at δ = 1e-05")
    assert decoy.epsilon == 3.0


def test_a_client_that_sends_differences_is_understood(tmp_path: Path) -> None:
    document = audited("tampered", tmp_path, "lie=difference", rounds=1)
    for told in document["exchanges"]:
        assert (told["verdict"], told["replay_error"]) == ("gradient", pytest.approx(0.0, abs=1e-6))
    assert document["risk"]["level"] == "identical"


def test_the_rounds_end_where_they_are_told_to(tmp_path: Path) -> None:
    document = audited("weighted", tmp_path, "num-server-rounds=5", rounds=1)
    assert {told["round"] for told in document["exchanges"]} == {1}
    assert document["app"]["run_config"]["num-server-rounds"] == 5


def coarse_pictures(path: Path, examples: int = 40, size: int = 8) -> Path:
    """An .npz of coarse random pictures of so many pixels a side."""
    drawn = np.random.default_rng(0)
    coarse = drawn.integers(0, 256, (examples, 2, 2, 3), dtype=np.uint8)
    images, labels = coarse.repeat(size // 2, 1).repeat(size // 2, 2), np.arange(examples) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    return path


def test_local_data_stand_in_for_what_an_app_would_fetch_and_single_steps_tell_what_hides_its_inputs(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    data = coarse_pictures(tmp_path / "local.npz")
    Audit(AuditSettings(APPS / "fetched", out, data=data, minutes=60.0)).run()
    document = json.loads((out / "audit.json").read_text())
    for told in document["exchanges"]:
        assert (told["verdict"], told["batch_sizes"], told["replay_error"]) == ("update", [2] * 8, 0.0)
        low, high = told["input_range"]
        assert low == pytest.approx([-1.9895, -1.9803, -1.7068], abs=1e-3)  # (0 - mean) / deviation of CIFAR-10
        assert high == pytest.approx([2.0591, 2.1265, 2.1158], abs=1e-3)
        assert "assumed" not in told, "eight steps on two inputs each are known as such"
        assert not told["attacks"], "and exact_batch undoes none of them"
    assert len(document["single_steps"]) == 4
    for single in document["single_steps"]:
        (row,) = single["attacks"]
        assert (row["levels"], row["label_correct"]) == (["identical"], 1.0)
    assert any("local data stood in for them" in one for one in document["not_tested"])
    assert "4 of 4 inputs come back recognisable" in (out / "report.html").read_text()
    assert "flwr_datasets" not in sys.modules


def test_local_images_stand_in_for_those_of_torchvision_that_an_app_splits_by_itself(tmp_path: Path) -> None:
    data = coarse_pictures(tmp_path / "local.npz", size=32)
    document = audited("vision_legacy", tmp_path / "out", data=data)
    assert len(document["exchanges"]) == 4
    told = SGD | {"momentum": 0.9, "learning_rate": 0.001, "steps": 4, "batch_sizes": [4] * 4, "replay_error": 0.0}
    told |= {"verdict": "update", "model": "Net", "input_range": [[-1.0], [1.0]]}
    for exchange in document["exchanges"]:
        assert {key: exchange[key] for key in told} == told
    assert lead(tmp_path / "out").startswith("What the clients of vision-legacy send was understood")
    assert "the app's own data, CIFAR10: local data stood in for them" in document["not_tested"]
    assert not (APPS / "vision_legacy/dataset").exists()


def test_local_data_that_an_app_does_not_ask_for_are_not_said_to_be_used(tmp_path: Path) -> None:
    document = audited("weighted", tmp_path, rounds=1, data=coarse_pictures(tmp_path / "local.npz"))
    assert NOT_ASKED in document["not_tested"]


def test_sets_of_torchvision_hold_local_images_in_their_own_form_until_the_end(tmp_path: Path) -> None:
    path = coarse_pictures(tmp_path / "local.npz", size=32)
    sets = torchvision_datasets()
    before = {name: getattr(sets, name) for name in ("CIFAR10", "MNIST", "SVHN", "ImageFolder", "EMNIST", "STL10")}
    with np.load(path) as arrays, standing_in(path, 2) as asked:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.mnist import MNIST

        cifar = CIFAR10("nowhere", True, None, lambda label: -label, download=True)
        assert (cifar.data == arrays["x_train"]).all()
        assert (len(cifar), cifar.targets, cifar.classes[3]) == (40, arrays["y_train"].tolist(), "cat")
        assert (np.asarray(cifar[7][0]) == arrays["x_train"][7]).all()
        assert cifar[7][1] == -7
        grey = MNIST("nowhere", train=False, transform=lambda image: np.asarray(image, np.float32))
        assert (len(grey), grey.data.shape, grey[1][1], grey.classes[1]) == (4, (4, 28, 28), 1, "1 - one")
        mean = (arrays["x_test"][1] * (0.299, 0.587, 0.114)).sum(2)  # of a picture that is flat in each quarter
        assert np.abs(grey[1][0][:12, :12] - mean[:12, :12]).max() <= 0.51
        assert sets.EMNIST("nowhere", split="letters", train=True)[30][0].size == (28, 28)
        assert sets.SVHN("nowhere", split="test").labels.tolist() == arrays["y_test"].tolist()
        assert sets.STL10("nowhere")[0][0].size == (96, 96)
        folder = sets.ImageFolder("photos/train", transform=np.asarray)
        assert (folder[5][0] == arrays["x_train"][5]).all()
        assert (folder.class_to_idx["9"], len(sets.ImageFolder("photos/val"))) == (9, 4)
    assert [sentence for sentence in asked if "MNIST" in sentence or "CIFAR" in sentence] == [
        "the app's own data, CIFAR10: local data stood in for them",
        "the app's own data, MNIST: local data stood in for them, and their images were brought from 3x32x32 to its "
        "1x28x28 (channels, height, width)",
        "the app's own data, EMNIST: local data stood in for them, and their images were brought from 3x32x32 to its "
        "1x28x28 (channels, height, width)",
    ]
    assert {name: getattr(sets, name) for name in before} == before
    assert sys.modules["torchvision.datasets.mnist"].MNIST is before["MNIST"]


def test_local_labels_that_a_set_of_torchvision_does_not_have_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((12, 32, 32, 3), np.uint8), np.arange(12)
    np.savez(tmp_path / "local.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with standing_in(tmp_path / "local.npz", 2), pytest.raises(FedtapError, match="have a label 11, and CIFAR10, for"):
        torchvision_datasets().CIFAR10("nowhere")
    with standing_in(tmp_path / "local.npz", 2):
        assert len(torchvision_datasets().CIFAR100("nowhere")) == 12


def test_rows_that_stand_in_are_read_as_those_of_a_data_set(tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("age,name,ill\n" + "".join(f"{20 + n},p{n},{n % 2}\n" for n in range(10)))
    with standing_in(table, 3):
        from datasets import load_dataset
        from flwr_datasets import FederatedDataset

        parts = [FederatedDataset(dataset="x", partitioners={"train": 3}).load_partition(n) for n in range(3)]
        assert sorted(age for part in parts for age in part["age"]) == [20, 21, 22, 23, 25, 26, 27, 28]
        test = load_dataset("x", split="test")
    assert test[:] == {"age": [24, 29], "name": ["p4", "p9"], "ill": [0, 1]}
    assert test[-1] == {"age": 29, "name": "p9", "ill": 1}
    assert test.map(lambda row: {"old": row["age"] > 25})["old"] == [False, True]
    assert [row["ill"].dtype for row in test.select([0]).map(lambda row: {"name": 1}).with_format("torch")] == [
        torch.int64
    ]
    halves = parts[0].train_test_split(test_size=1, seed=0)
    assert sorted(halves["train"]["age"] + halves["test"]["age"]) == sorted(parts[0]["age"])


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    with pytest.raises(FedtapError, match="cannot be read as a table"), standing_in(tmp_path / "bad.csv", 1):
        pass


def written(folder: Path, source: str, toml: str = "") -> Path:
    """An app of one module."""
    name = f"app_{abs(hash(source)) % 10**8}"
    about = f'[project]\nname = "bad"\nversion = "1"\n[tool.flwr.app]\npublisher = "tests"\n{toml}'
    components = f'[tool.flwr.app.components]\nserverapp = "{name}:server"\nclientapp = "{name}:client"\n'
    (folder / "pyproject.toml").write_text(about + components)
    (folder / f"{name}.py").write_text(source)
    return folder


CLIENT = """
import torch
from flwr.clientapp.mod import LocalDpMod
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    {train}
    return Message(RecordDict({{"arrays": message.content["arrays"],
        "metrics": MetricRecord({{"num-examples": 1}})}}), reply_to=message)

@server.main()
def main(grid, context):
    {serve}
    FedAvg(min_available_nodes={least}, fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=ArrayRecord({{"w": torch.zeros(2)}}), num_rounds=1)
"""


def app(train: str = "pass", serve: str = "pass", least: int = 2) -> str:
    return CLIENT.format(train=train, serve=serve, least=least)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import not_there", "cannot be imported (ModuleNotFoundError: No module named 'not_there')"),
        ("raise SystemExit(0)", "cannot be imported (SystemExit: 0)"),
        ("client = 1", "cannot be imported (_Unloadable: Unable to load attribute server"),
        (app(), "The app trained nothing"),
        (app('open("data.csv")'), "Every client failed (FileNotFoundError: "),
        (app(serve="1 / 0"), "The app's server ended with ZeroDivisionError: division by zero"),
        (app(least=3), "The app waits for more nodes than the 2 that there are: raise --nodes."),
    ],
    ids=["import", "exit", "attribute", "nothing", "data", "server", "nodes"],
)
def test_what_cannot_be_audited_is_told_in_a_sentence_and_kept(source: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FedtapError, match=re.escape(said)):
        Audit(AuditSettings(written(tmp_path, source), out)).run()
    document = json.loads((out / "audit.json").read_text())
    assert said in document["error"]
    assert unescape((out / "report.html").read_text()).count(said) == 1


def test_what_was_seen_before_a_server_fails_is_attacked_and_kept(tmp_path: Path) -> None:
    source = (APPS / "weighted/weighted.py").read_text().replace("    FedAvg(", "    Failing(")
    source = source.replace("server = ServerApp()", FAILING + "\nserver = ServerApp()")
    folder = written(tmp_path, source, "[tool.flwr.app.config]\nnum-server-rounds = 2\n")
    with pytest.raises(FedtapError, match="The app's server ended with OSError: disk full"):
        Audit(AuditSettings(folder, tmp_path / "out")).run()
    document = json.loads((tmp_path / "out/audit.json").read_text())
    assert document["risk"]["level"] == "identical"
    assert "disk full" in document["error"]


FAILING = """
class Failing(FedAvg):
    def aggregate_train(self, *given):
        raise OSError("disk full")
"""


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (None, "is no Flower app"),
        ("[project]", "is no Flower app"),
        ('[project]\nname = "a"\nversion = "1"\n[tool.flwr.app]\npublisher = "b"\n', "is no Flower app"),
        ("no toml", "is no Flower app"),
    ],
)
def test_a_folder_without_components_is_no_app(toml: str | None, said: str, tmp_path: Path) -> None:
    if toml is not None:
        (tmp_path / "pyproject.toml").write_text(toml)
    with pytest.raises(FedtapError, match=said):
        Audit(AuditSettings(tmp_path, tmp_path / "out")).run()


def test_a_key_that_the_app_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="--set batch=3 cannot be used"):
        Audit(AuditSettings(APPS / "weighted", tmp_path, overrides=("batch=3",))).run()


def test_the_command_plays_the_app_in_a_process_and_exits_with_3_where_inputs_come_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["audit", str(APPS / "rows_query"), "--out", str(out), "--fail-on", "recognisable"]
    assert fedtap(monkeypatch, *words) == MET
    assert "is sent data as they are" in " ".join(capsys.readouterr().out.split())
    assert json.loads((out / "audit.json").read_text())["schema"] == 1
    cases = list(ElementTree.parse(out / "junit.xml").getroot())
    assert [(case.get("name"), [kind.tag for kind in case]) for case in cases] == [
        ("risk", ["failure"]),
        ("round 0, client 0: raw data", ["failure"]),
        ("round 0, client 1: raw data", ["failure"]),
    ]
    assert fedtap(monkeypatch, *words) == 2
    assert "holds an audit already: give --overwrite" in capsys.readouterr().err


def test_a_test_of_ones_own_fails_where_inputs_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def in_process(settings: dict[str, Any], where: Path, minutes: float) -> int:
        Audit(AuditSettings.of(json.dumps(settings))).run()
        return 0

    monkeypatch.setattr("fedtap.scenarios.audit.command._played", in_process)
    with pytest.raises(AssertionError, match=r"The server of weighted can rebuild inputs of its clients: .* See "):
        assert_no_leak(APPS / "weighted", tmp_path / "one", rounds=1, minutes=60)
    document = assert_no_leak(APPS / "table_adam", tmp_path / "other", changed=["num-server-rounds=1"], nodes=3)
    assert document["app"]["run_config"]["num-server-rounds"] == 1
    assert len(document["exchanges"]) == 3
    assert "--nodes 3 --rounds 2 --minutes 5.0 --set num-server-rounds=1" in document["repeat"]


@pytest.mark.parametrize(
    ("train", "minutes", "said"),
    [
        ("import os; os._exit(7)", "1", "The app ended the process that it was played in (exit code 7)"),
        ("import time; time.sleep(60)", "0.1", "The app was not done after 0.1 minutes and was stopped"),
    ],
)
def test_an_app_that_ends_or_blocks_its_process_leaves_a_page_and_exit_code_2(
    train: str,
    minutes: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fedtap.scenarios.audit.process.GRACE", 1.0)
    folder, out = written(tmp_path, app(train)), tmp_path / "out"
    assert fedtap(monkeypatch, "audit", str(folder), "--out", str(out), "--minutes", minutes) == 2
    assert said in capsys.readouterr().err
    assert said in json.loads((out / "audit.json").read_text())["error"]
    assert said in unescape((out / "report.html").read_text())


# The parts.


def trained(net: nn.Module, loss: Any, steps: int = 2, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What an observer sees of a training, and the weights at its end."""
    observer = Observer()
    data = [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(steps)]
    with observer.installed(), observer.watching() as seen:
        adam = torch.optim.Adam(net.parameters(), **options)
        for inputs, labels in data:
            adam.zero_grad()
            loss(net(inputs), labels).backward()
            adam.step()
    return seen, {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.functional.cross_entropy])
def test_a_training_is_replayed_to_the_bit_with_dropout_and_batchnorm(loss: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    seen, after = trained(net, loss, lr=0.01)
    state = torch.get_rng_state()
    again, changed = replayed(seen, start)
    assert torch.equal(torch.get_rng_state(), state)  # an app goes on as if nothing had happened
    assert not changed
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_a_replay_from_other_weights_ends_elsewhere() -> None:
    net = nn.Linear(6, 3)
    seen, after = trained(net, nn.functional.cross_entropy, lr=0.01)
    again, _ = replayed(seen, {"weight": torch.zeros(3, 6), "bias": torch.zeros(3)})
    assert not torch.allclose(again["weight"], after["weight"], atol=1e-3)


def test_a_loss_with_a_term_of_its_own_is_not_replayed() -> None:
    net = nn.Linear(6, 3)

    def proximal(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(scores, labels) + 0.1 * net.weight.square().sum()

    seen, _ = trained(net, proximal, lr=0.01)
    with pytest.raises(NotReplayedError, match="has terms that are not seen"):
        replayed(seen, net.state_dict())


def test_no_graph_of_a_loss_outlives_its_step() -> None:
    seen, _ = trained(nn.Linear(6, 3), nn.functional.cross_entropy, lr=0.01)
    assert [call.value for batch in seen.batches for call in batch.losses] == [None, None]
    assert seen.size == 2 * 5 * 6 * 4


def test_more_than_there_is_room_for_is_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.scenarios.audit.observe.ROOM", 5 * 6 * 4)
    net = nn.Linear(6, 3)
    seen, _ = trained(net, nn.functional.cross_entropy, steps=3, lr=0.01)
    assert (len(seen.steps), [batch.count for batch in seen.batches], seen.whole) == (3, [5, 5, 5], False)
    with pytest.raises(NotReplayedError, match="more than is kept in memory"):
        replayed(seen, net.state_dict())


def test_hooks_are_gone_when_an_app_is_over() -> None:
    load = nn.Module.load_state_dict
    observer = Observer()
    with observer.installed(), observer.watching() as seen:
        pass
    assert nn.Module.load_state_dict is load
    nn.Linear(2, 2)(torch.zeros(1, 2))
    assert seen.start is None


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [
        ((-0.99,), (0.98,), ((-1.0,), (1.0,))),
        ((0.0,), (1.0,), ((0.0,), (1.0,))),
        ((0.0,), (254.0,), ((0.0,), (255.0,))),
        ((-2.1, -2.0, -1.8), (2.2, 2.4, 2.6), ((-2.117904, -2.035714, -1.804444), (2.248908, 2.428571, 2.64))),
        ((-7.0,), (3.0,), ((-7.0,), (3.0,))),
    ],
)
def test_a_normalisation_in_wide_use_is_recognised_by_its_range(low: Any, high: Any, ends: Any) -> None:
    known = InputRange(torch.tensor(low), torch.tensor(high), torch.zeros(len(low), 1, 1), 1)
    assert known.ends() == ends
