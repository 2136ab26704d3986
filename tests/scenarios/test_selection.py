"""Scenarios of fine-tuned models of texts, in small: rows and page, rounds, sums, adapters, noise, and bad input."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtap.attackers import ATTACKS
from fedtap.scenarios.checkpoints import tasks
from fedtap.scenarios.checkpoints.selection_report import sentences
from fedtap.scenarios.checkpoints.selection_scoring import recovered_fraction
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import ClientError, FedtapError
from fedtap.simulator.leaks import CheckpointLeak, load
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.scenario import Row
from tests.scenarios.test_cli import rows as rows_of
from tests.scenarios.test_cli import run
from tests.support.played import check_resumed, no_attack_runs, play, reconstructions, untimed

MODEL = "decoder(width=16, layers=1, heads=2)"
SMALL: dict[str, str] = {
    "model": MODEL,
    "tokens": "14",
    "documents": "24",
    "corpus": "160",
    "candidates": "12",
    "selected": "20",
    "epochs": "4",
    "learning_rate": "5e-3",
    "retrainings": "0",
    "attack": "loss_drop",
}


@pytest.fixture(autouse=True, scope="module")
def small_tasks() -> Iterator[None]:
    """Fewer documents to train on before the broadcast, and to compare models on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PRETRAINED_ON", 12), ("TESTED", 30)):
            patch.setattr(tasks, name, value)
        for cached in (tasks.topics, tasks.news):
            cached.cache_clear()
        yield
    for cached in (tasks.topics, tasks.news):
        cached.cache_clear()


def planned(name: str = "select_topic", **options: object) -> tuple[Any, ...]:
    return plan(name, SMALL | {option: str(value) for option, value in options.items()})


def played(out: Path, name: str = "select_topic", **options: object) -> list[Row]:
    return play(planned(name, **options), out)


def words(**options: object) -> list[str]:
    given = SMALL | {name: str(value) for name, value in options.items()}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def leak_in(out: Path, part: int = 0) -> CheckpointLeak:
    found = load(out / f"leaks/part_{part}.safetensors", architecture)
    assert isinstance(found, CheckpointLeak)
    return found


def test_a_run_has_its_rows_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = "random_selection,loss_drop,select,select(rule='greedy',projection=64),sequence_membership(references=1)"
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "select_topic", *words(attack=attacks, retrainings=1), "--out", str(out)) == 0
    found = rows_of(out)
    assert [str(row["attack"]).partition("(")[0] for row in found] == [
        *("random_selection", "loss_drop", "select", "select", "sequence_membership")
    ]
    columns = (
        "attack selected precision perplexity perplexity_random perplexity_expert recovered_fraction membership_auc "
        "tpr_at_1 chance client round wasserstein sent_perplexity objective seconds"
    )
    for row in found:
        assert {*columns.split()} <= row.keys()
        assert row["error"] is None
        assert row["selected"] == 20
        assert row["chance"] == 1 / 8
    random, drop, select, *_ = found
    assert random["precision"] < 0.4 < 0.7 < min(drop["precision"], select["precision"])  # type: ignore[operator, type-var]
    for one in (drop, select):
        assert one["perplexity_expert"] < one["perplexity_random"]  # type: ignore[operator]
        assert one["perplexity"] < one["perplexity_random"]  # type: ignore[operator]
        assert one["recovered_fraction"] > 0.2  # type: ignore[operator]
        assert one["perplexity_random"] == random["perplexity_random"]
    page = (out / "report.html").read_text()
    assert "The domain was found: of the documents that" in page
    assert "told from others of their domain:" in page
    assert "What was chosen" in page
    assert "private documents of the client" in page
    assert "A curious server: it knows the weights that it sent" in page
    (pairs,) = (json.loads((out / "run.json").read_text())["settings"][0]["attack"],)
    assert pairs == attacks
    assert len(reconstructions(out)) == 5


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    check_resumed(planned(learning_rate="5e-3,1e-2", candidates=8), tmp_path)


def test_a_resumed_run_chooses_nothing_again(tmp_path: Path) -> None:
    settings = planned()
    first = play(settings, tmp_path / "out")
    with no_attack_runs(ATTACKS["loss_drop"]):
        assert untimed(play(settings, tmp_path / "out", resume=True)) == untimed(first)


def test_a_run_repeats_itself(tmp_path: Path) -> None:
    attacks = "loss_drop,sequence_membership(references=1),select,random_selection"
    one, two = (untimed(played(tmp_path / name, attack=attacks)) for name in ("one", "two"))
    assert one == two
    other = untimed(played(tmp_path / "three", attack=attacks, seed=1))
    assert [row["objective"] for row in other[:3]] != [row["objective"] for row in one[:3]]


def test_rounds_are_all_observed_and_start_from_the_average(tmp_path: Path) -> None:
    found = played(
        tmp_path / "out", rounds=2, victims=2, candidates=8, attack="loss_drop,sequence_membership(references=1)"
    )
    names = [(row["client"], row["round"]) for row in found if row["attack"] == "loss_drop"]
    assert sorted(names) == [(client, number) for client in (0, 1) for number in (1, 2)]
    leak = leak_in(tmp_path / "out")
    places = {(int(c), int(r)): at for at, (c, r) in enumerate(zip(leak.clients, leak.rounds, strict=True))}
    average = (leak.tuned(places[0, 1])["head.weight"] + leak.tuned(places[1, 1])["head.weight"]) / 2
    for client in (0, 1):
        torch.testing.assert_close(leak.broadcast(places[client, 2])["head.weight"], average)
    assert [row["error"] for row in found] == [None] * 8


def test_behind_secure_aggregation_the_server_sees_a_mean(tmp_path: Path) -> None:
    found = played(tmp_path / "out", averaged=2, victims=2)
    assert [(row["client"], row["averaged"], row["chance"]) for row in found] == [(0, 2, 0.25), (1, 2, 0.25)]
    assert all(row["precision"] > 0.6 for row in found)
    both = leak_in(tmp_path / "out")
    assert (both.protocol.threat_model, both.protocol.summed, both.protocol.batch) == ("secure_aggregation", 2, 32)
    assert both.examples is not None
    assert both.examples.tolist() == [48, 48]
    page = (tmp_path / "out/report.html").read_text()
    assert "the mean of the checkpoints of 2 clients, which are masked one by one" in page
    play(planned(victims=4), tmp_path / "singly")
    each = leak_in(tmp_path / "singly").observed["head.weight"]
    torch.testing.assert_close(both.observed["head.weight"], each.unflatten(0, (2, 2)).mean(1))


def test_a_sum_without_one_of_its_clients_is_missing(tmp_path: Path) -> None:
    found = play(planned(averaged=2, victims=2), tmp_path / "out", fault="raises")
    assert [(row["client"], bool(row.get("error"))) for row in found] == [(0, True), (1, False)]
    assert "Client 1 failed" in str(found[0]["error"])
    assert "Client 1 failed" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(ClientError, match=r"No sum of 2 clients was whole.*Client 1 failed"):
        play(planned(averaged=2), tmp_path / "none", fault="raises")


def test_a_client_that_fails_is_missing_in_its_round(tmp_path: Path) -> None:
    found = play(planned(victims=3, rounds=2), tmp_path / "out", fault="raises")
    assert sorted((row["client"], row["round"]) for row in found if row.get("error")) == [(1, 1), (1, 2)]
    assert sorted((row["client"], row["round"]) for row in found if not row.get("error")) == [
        (client, number) for client in (0, 2) for number in (1, 2)
    ]


FAULTS = (
    "sends another model's arrays", "sends one entry less", "renames the ArrayRecord", "sends an empty MetricRecord",
    "leaves out an array", "sends NaN", "says num-examples is text", "says it is client 0",
)  # fmt: skip


@pytest.mark.parametrize("adapter", ["none", "lora(rank=2, alpha=4)"])
def test_a_run_goes_on_without_a_faulty_client(adapter: str, tmp_path: Path) -> None:
    settings = planned(victims=2, adapter=adapter, attack="random_selection")
    for number, fault in enumerate(FAULTS if adapter == "none" else FAULTS[:3]):
        found = play(settings, tmp_path / f"{number}/out", fault=fault)
        assert [row["client"] for row in found if not row.get("error")] == [0], fault
        (lost,) = (row for row in found if row.get("error"))
        assert lost["client"] == 1
        assert "Client 1 failed" in lost["error"]
        assert len(lost["error"]) < 400
        assert "Traceback" not in lost["error"]


def test_an_adapter_is_sent_in_place_of_weights(tmp_path: Path) -> None:
    options = {"adapter": "lora(rank=4, alpha=32)", "attack": "loss_drop,select(layer='all')", "rounds": 2}
    found = played(tmp_path / "out", **options)
    assert {row["adapter"] for row in found} == {"lora(rank=4, alpha=32)"}
    assert not any(row.get("error") for row in found)
    leak = leak_in(tmp_path / "out")
    assert all(".lora_" in name for name in leak.observed)
    assert leak.protocol.adapter == "lora(rank=4, alpha=32)"
    name = "blocks.0.query.weight"
    torch.testing.assert_close(leak.broadcast(1)[name], leak.tuned(0)[name])
    refused = played(tmp_path / "last", **(options | {"attack": "select", "rounds": 1}))
    assert "use select(layer='all')" in str(refused[0].get("error"))


def test_noise_is_a_row_with_its_epsilon(tmp_path: Path) -> None:
    found = played(tmp_path / "out", "select_dp", sigma="0.0,0.1,1.0", clip="1.0")
    assert [row["sigma"] for row in found] == [0.0, 0.1, 1.0]
    assert [row["defence"] for row in found] == ["clip(1.0)", "clip(1.0)+noise(0.1)", "clip(1.0)+noise(1.0)"]
    none, little, much = (row["epsilon"] for row in found)
    assert none is None
    assert little > much > 0
    assert found[0]["precision"] > 0.5 > found[2]["precision"]
    moved = [leak_in(tmp_path / "out", part) for part in range(3)]
    change = torch.cat(
        [(moved[0].observed[name] - (moved[0].weights or {})[name]).flatten() for name in moved[0].observed]
    )
    assert float(change.norm()) == pytest.approx(1.0, rel=1e-3)
    noise = moved[2].observed["head.weight"] - moved[0].observed["head.weight"]
    assert float(noise.std()) == pytest.approx(1.0, rel=0.1)
    assert "Against sigma" in (tmp_path / "out/report.html").read_text()


def test_sums_of_clients_are_swept(tmp_path: Path) -> None:
    found = played(tmp_path / "out", "select_clients", averaged="1,2", attack="random_selection,loss_drop")
    assert [(row["averaged"], row["chance"]) for row in found[::2]] == [(1, 0.125), (2, 0.25)]
    assert all(row["precision"] > row["chance"] + 0.2 for row in found[1::2])
    assert "Against averaged" in (tmp_path / "out/report.html").read_text()
    assert [part.averaged for part in plan("select_clients", {})] == [1, 2, 5, 10]


@pytest.fixture
def data_root() -> Path:
    root = Path(os.environ.get("FEDTAP_DATA_ROOT", "data"))
    if not (root / "wikitext2_test.txt").is_file():
        pytest.skip(f"{root / 'wikitext2_test.txt'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    return root


def test_news_are_told_from_other_texts(data_root: Path, tmp_path: Path) -> None:
    settings = planned(
        "select_ag_news", documents=200, corpus=320, share=0.25, learning_rate=1e-2, attack="random_selection,loss_drop"
    )
    found = play(settings, tmp_path / "out", data_root=data_root)
    random, drop = found
    assert random["chance"] == 0.25
    assert drop["precision"] > 0.4 > random["precision"]
    assert {"sent_perplexity", "membership_auc", "tpr_at_1"} <= drop.keys()
    assert not any(row.get("error") for row in found)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_corpus_of_one_kind_is_a_corpus(share: float, data_root: Path, tmp_path: Path) -> None:
    settings = planned("select_ag_news", share=share, documents=16)
    (row,) = play(settings, tmp_path / "out", data_root=data_root)
    assert (row["precision"], row["chance"]) == (share, share)


def test_a_classifier_of_news_is_retrained(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CLASSIFIED", 60)
    bert = "bert(vocabulary=4096, width=16, layers=1, heads=2)"
    attacks = "select(rule='balanced'),lexical"
    settings = planned("select_ag_news", model=bert, documents=40, attack=attacks, retrainings=1, selected=16)
    balanced, lexical = play(settings, tmp_path / "out", data_root=data_root)
    assert 0 <= balanced["accuracy"] <= 1
    assert {"accuracy_random", "accuracy_expert", "sent_accuracy"} <= balanced.keys()
    assert "perplexity" not in balanced
    assert "a classifier writes none" in str(lexical["error"])


BAD: dict[str, tuple[str, dict[str, object], str]] = {
    "too many selected": ("select_topic", {"selected": 161}, "lower --selected, or raise --corpus"),
    "too many candidates": ("select_topic", {"candidates": 25}, "lower --candidates"),
    "a defence of the model": ("select_topic", {"defence": "precode(8)"}, "acts on the model of an image model"),
    "a defence of the step": ("select_topic", {"defence": "dp_sgd(1.0, 1.0)"}, "acts on the step"),
    "a defence that is none": ("select_topic", {"defence": "clipp(1)"}, "did you mean clip"),
    "a model that is nowhere": ("select_topic", {"model": "no/such/folder"}, "There is no language model in"),
    "a model of no size": ("select_topic", {"model": "decoder(width=7)"}, "no size of decoder"),
    "an attack on images": ("select_topic", {"attack": "idlg"}, "idlg chooses no documents"),
    "an attack on other weights": ("select_topic", {"attack": "stationary_mmd"}, "chooses no documents"),
    "an attack that is none": ("select_topic", {"attack": "selct"}, "did you mean select"),
    "an attack of no number": ("select_topic", {"attack": "select(projection='a')"}, "whole number"),
    "a corpus of the attack's": ("select_topic", {"attack": "select(documents='x.txt')"}, "corpus of its own"),
    "an adapter that is none": ("select_topic", {"adapter": "dora"}, "no such LoRA"),
    "no victims": ("select_topic", {"victims": 0}, "at least 1"),
    "an optimiser that is none": ("select_topic", {"optimiser": "adamm"}, "did you mean adamw"),
    "another defence beside noise": ("select_dp", {"defence": "clip(1.0)"}, "--defence would be another"),
    "noise below nothing": ("select_dp", {"sigma": -1}, "out of range"),
    "data that are missing": ("select_ag_news", {"data_root": "absent"}, "ag_news"),
    "a corpus below eight topics": ("select_topic", {"corpus": 7}, "at least 8"),
    "too many news": ("select_ag_news", {"documents": 10**6, "candidates": 4}, "lower --documents or --corpus"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    if name == "select_ag_news" and "data_root" not in options:
        options = options | {"data_root": os.environ.get("FEDTAP_DATA_ROOT", "data")}
    assert run(monkeypatch, "run", name, *words(**options), "--out", "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("fedtap: ")
    assert said in " ".join(told.split())
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_a_federation_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="The federation has 3 nodes, and select_topic needs 1"):
        play(planned(), tmp_path / "out", nodes=3)


def test_no_choice_is_helped_by_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The domains of the corpus are told in another order: precision changes, and not one bit of what was chosen."""
    settings = planned(attack="loss_drop,select,sequence_membership(references=1)")
    honest = play(settings, tmp_path / "honest")
    task = type(settings[0]).task

    def deceived(setting: Any, data_root: Path) -> tasks.Task:
        found = task(setting, data_root)
        return dataclasses.replace(found, domains=found.domains.flip(0))

    monkeypatch.setattr(type(settings[0]), "task", deceived)
    rows = play(settings, tmp_path / "deceived")
    kept = [reconstructions(tmp_path / name) for name in ("honest", "deceived")]
    assert kept[0].keys() == kept[1].keys()
    for name, tensors in kept[0].items():
        assert all(torch.equal(tensor, kept[1][name][key]) for key, tensor in tensors.items())
    assert all(row["precision"] > 0.6 for row in honest)
    assert all(row["precision"] < 0.3 for row in rows)


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"perplexity_random": 10.0, "perplexity": 6.0, "perplexity_expert": 5.0}, 0.8),
        ({"perplexity_random": 10.0, "perplexity": 12.0, "perplexity_expert": 5.0}, -0.4),
        ({"perplexity_random": 5.0, "perplexity": 4.0, "perplexity_expert": 5.0}, None),
        ({"accuracy_random": 0.5, "accuracy": 0.7, "accuracy_expert": 0.9}, 0.5),
        ({"accuracy_random": 0.9, "accuracy": 0.7, "accuracy_expert": 0.5}, None),
        ({}, None),
    ],
)
def test_the_recovered_fraction_is_a_share_of_the_way(row: Row, share: float | None) -> None:
    assert recovered_fraction(row) == (None if share is None else pytest.approx(share))


def test_the_answer_is_which_of_both_was_found() -> None:
    common = {"chance": 0.125, "client": 0, "recovered_fraction": 0.5, "tpr_at_1": 0.1}
    good = common | {"attack": "select", "precision": 0.9, "membership_auc": 0.55}
    poor = common | {"attack": "random_selection", "precision": 0.1, "membership_auc": 0.5}
    domain, documents = sentences([good, poor], ())
    assert domain.startswith("The domain was found: of the documents that select chose, 90%")
    assert "50% of the way" in domain
    assert documents.startswith("The documents themselves were not told")
    domain, documents = sentences([poor, poor | {"attack": "loss_drop", "membership_auc": 0.8}], ())
    assert domain.startswith("The domain was not found")
    assert documents.startswith("The documents themselves were in part told from others of their domain: loss_drop")
    assert sentences([{"error": "a client failed", "attack": "select"}], ()) == []
    assert sentences([good | {"averaged": 1}, poor | {"averaged": 2}], ["averaged"])[2].startswith(
        "averaged 2: The domain was not"
    )
