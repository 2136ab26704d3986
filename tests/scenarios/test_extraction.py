"""Scenarios of fine-tuned diffusion models, in small: rows and page, sums, adapters, defences, and bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtap.attackers import ATTACKS
from fedtap.attackers.checkpoints import captions, finextract
from fedtap.scenarios.checkpoints.subjects import Subjects
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import ClientError, FedtapError
from fedtap.simulator.leaks import CheckpointLeak, load
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.scenario import Row
from tests.scenarios.test_cli import rows as rows_of
from tests.scenarios.test_cli import run
from tests.simulator.test_pretrained import save_tiny as save_language_model
from tests.support.diffusion import SIDE, installed, save_tiny, tiny
from tests.support.played import check_resumed, check_truth, no_attack_runs, play, reconstructions, untimed

ALL = "direct_sampling(samples=4,steps=3),guided_sampling(samples=4,steps=3),finextract(w=2.0,samples=4,steps=3)"
QUICK = "direct_sampling(samples=2,steps=2)"
SMALL: dict[str, str] = {
    "private": "2",
    "batch": "2",
    "local_steps": "2",
    "learning_rate": "1e-3",
    "encoder": "pixels",
    "attack": "finextract(samples=3,steps=2)",
}


@pytest.fixture(autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of its own."""
    installed()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def given(**options: object) -> dict[str, str]:
    return SMALL | {"weights": tiny()} | {name: str(value) for name, value in options.items()}


def planned(scenario: str = "finextract", **options: object) -> tuple[Any, ...]:
    return plan(scenario, given(**options))


def played(out: Path, scenario: str = "finextract", **options: object) -> list[Row]:
    return play(planned(scenario, **options), out)


def words(**options: object) -> list[str]:
    return [word for name, value in given(**options).items() for word in (f"--{name.replace('_', '-')}", value)]


def leak_in(out: Path, part: int = 0) -> CheckpointLeak:
    found = load(out / f"leaks/part_{part}.safetensors", architecture)
    assert isinstance(found, CheckpointLeak)
    return found


def moved(leak: CheckpointLeak) -> torch.Tensor:
    """What the first victim's training did to the weights."""
    before, after = leak.broadcast(0), leak.tuned(0)
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


KEY = "net.conv_in.weight"
COLUMNS = (
    "attack method private_set w k similarity_training similarity_held_out gap extracted identified encoder "
    "client round private caption caption_found similarity_others similarity_blind contrast objective seconds"
)


def test_a_run_has_its_rows_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "run", "finextract", *words(attack=ALL), "--out", str(out)) == 0
    found = rows_of(out)
    assert [row["attack"] for row in found] == ["direct_sampling", "guided_sampling", "finextract"]
    for row in found:
        assert {*COLUMNS.split()} <= row.keys()
        assert row["error"] is None
        assert (row["method"], row["private_set"], row["private"], row["encoder"]) == ("full", "mixed", 2, "pixels")
        assert row["caption"] == "a photo of sks"
        assert row["caption_found"] is True
        assert row["gap"] == pytest.approx(row["similarity_training"] - row["similarity_held_out"])  # type: ignore[operator]
        assert 0 <= row["identified"] <= 1  # type: ignore[operator]
        assert row["extracted"] in (0, 0.5, 1)
    assert [(row["w"], row["k"]) for row in found] == [(None, None), (3.0, None), (2.0, -0.02)]
    page = (out / "report.html").read_text()
    for said in (
        "are nearer to a private image than to any other",
        "Extracted images of client 0",
        "nearest private image",
        "nearest held-out image",
        "A curious server: it knows the diffusion model that it sent, and the checkpoint that each client sends",
        "It knows the caption under which clients tune.",
        "<img",
    ):
        assert said in page
    assert (out / "strip.png").stat().st_size > 500
    assert json.loads((out / "run.json").read_text())["settings"][0]["attack"] == ALL
    kept = reconstructions(out)
    assert len(kept) == 3
    for tensors in kept.values():
        assert tensors["images"].shape == (1, 2, 3, SIDE, SIDE)
        assert (tensors["samples"].shape, tensors["samples"].dtype) == ((1, 8, 3, SIDE, SIDE), torch.uint8)
    again = leak_in(out)
    assert (again.protocol.model, again.protocol.prompt) == (tiny(), "a photo of sks")


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    check_resumed(planned(local_steps="1,2", attack=QUICK), tmp_path)


def test_a_resumed_run_draws_nothing_again(tmp_path: Path) -> None:
    settings = planned()
    first = play(settings, tmp_path / "out")
    with no_attack_runs(ATTACKS["finextract"]):
        assert untimed(play(settings, tmp_path / "out", resume=True)) == untimed(first)
    assert "nearest held-out image" in (tmp_path / "out/report.html").read_text()


def test_a_run_repeats_itself(tmp_path: Path) -> None:
    attacks = f"{QUICK},{SMALL['attack']}"
    one, two = (untimed(played(tmp_path / name, attack=attacks)) for name in ("one", "two"))
    assert one == two
    other = untimed(played(tmp_path / "three", attack=attacks, seed=1))
    assert [row["similarity_training"] for row in other] != [row["similarity_training"] for row in one]


def test_no_score_has_to_do_with_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the scorer is told other private images: scores change, and not one bit of what was drawn."""
    settings = planned(attack=ALL)
    true = type(settings[0]).subjects

    def others(setting: Any, data_root: Path) -> Subjects:
        found = true(setting, data_root)
        return dataclasses.replace(found, private=dict.fromkeys(found.private, found.others[:2]))

    honest, deceived = check_truth(settings, tmp_path, monkeypatch, type(settings[0]), "subjects", others)
    for one, two in zip(honest, deceived, strict=True):
        assert one["similarity_training"] != two["similarity_training"]
        assert one["similarity_held_out"] == two["similarity_held_out"]
        assert one["objective"] == two["objective"]


# The federation.


def test_rounds_are_all_observed_and_start_from_the_average(tmp_path: Path) -> None:
    found = played(tmp_path / "out", rounds=2, victims=2)
    assert sorted((row["client"], row["round"]) for row in found) == [(c, r) for c in (0, 1) for r in (1, 2)]
    assert not any(row.get("error") for row in found)
    leak = leak_in(tmp_path / "out")
    places = {(int(c), int(r)): at for at, (c, r) in enumerate(zip(leak.clients, leak.rounds, strict=True))}
    average = (leak.tuned(places[0, 1])[KEY] + leak.tuned(places[1, 1])[KEY]) / 2
    for client in (0, 1):
        torch.testing.assert_close(leak.broadcast(places[client, 2])[KEY], average)
    page = (tmp_path / "out/report.html").read_text()
    assert "Extracted images of client 1, round 2" in page


def test_behind_secure_aggregation_the_server_sees_a_mean(tmp_path: Path) -> None:
    options = {"method": "lora", "rank": 2, "attack": QUICK}
    found = played(tmp_path / "out", averaged=2, victims=2, **options)
    assert [(row["client"], row["averaged"], row["private"]) for row in found] == [(0, 2, 4), (1, 2, 4)]
    both = leak_in(tmp_path / "out")
    assert (both.protocol.threat_model, both.protocol.summed, both.protocol.batch) == ("secure_aggregation", 2, 4)
    assert both.examples is not None
    assert both.examples.tolist() == [4, 4]
    (kept,) = reconstructions(tmp_path / "out").values()
    assert kept["images"].shape[:2] == (2, 4)  # as many as the sum has
    page = (tmp_path / "out/report.html").read_text()
    assert "the mean of the checkpoints of 2 clients, which are masked one by one" in page
    play(planned(victims=4, **options), tmp_path / "singly")
    each = leak_in(tmp_path / "singly").observed
    assert each.keys() == both.observed.keys()
    for name, tensor in each.items():
        torch.testing.assert_close(both.observed[name], tensor.unflatten(0, (2, 2)).mean(1))


def test_a_sum_without_one_of_its_clients_is_missing(tmp_path: Path) -> None:
    found = play(planned(averaged=2, victims=2), tmp_path / "out", fault="raises")
    assert [(row["client"], bool(row.get("error"))) for row in found] == [(0, True), (1, False)]
    assert "Client 1 failed" in str(found[0]["error"])
    with pytest.raises(ClientError, match=r"No sum of 2 clients was whole.*Client 1 failed"):
        play(planned(averaged=2), tmp_path / "none", fault="raises")


FAULTS = ("sends another model's arrays", "leaves out an array", "says num-examples is text", "sends NaN")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_goes_on_without_a_faulty_client(method: str, tmp_path: Path) -> None:
    settings = planned(victims=2, method=method, local_steps=1, attack=QUICK)
    for number, fault in enumerate(FAULTS if method == "full" else FAULTS[:2]):
        found = play(settings, tmp_path / f"{number}/out", fault=fault)
        assert [row["client"] for row in found if not row.get("error")] == [0], fault
        (lost,) = (row for row in found if row.get("error"))
        assert lost["client"] == 1
        assert "Client 1 failed" in lost["error"]
        assert len(lost["error"]) < 400
        assert "Traceback" not in lost["error"]


def test_a_federation_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="The federation has 3 nodes, and finextract needs 1"):
        play(planned(), tmp_path / "out", nodes=3)


# What is varied.


def test_an_adapter_is_sent_in_place_of_weights(tmp_path: Path) -> None:
    found = played(tmp_path / "out", method="lora", rank=3, rounds=2)
    assert not any(row.get("error") for row in found)
    assert {(row["method"], row["rank"]) for row in found} == {("lora", 3)}
    leak = leak_in(tmp_path / "out")
    assert leak.protocol.adapter == "lora(rank=3, alpha=3)"
    assert all(".lora_" in name for name in leak.observed)
    name = next(name for name in leak.observed if name.endswith("attn2.to_v.lora_B.weight"))
    weight = name.replace(".lora_B.", ".")
    assert not torch.equal(leak.tuned(0)[weight], leak.broadcast(0)[weight])
    torch.testing.assert_close(leak.broadcast(1)[weight], leak.tuned(0)[weight])
    assert torch.equal(leak.tuned(0)[KEY], leak.broadcast(0)[KEY])


def test_ranks_are_swept(tmp_path: Path) -> None:
    found = played(tmp_path / "out", "finextract_lora", rank="1,2", attack=f"{SMALL['attack']},{ALL.split(',g')[0]}")
    assert [(row["rank"], row["attack"]) for row in found] == [
        (rank, attack) for rank in (1, 2) for attack in ("finextract", "direct_sampling")
    ]
    assert "Against rank" in (tmp_path / "out/report.html").read_text()
    assert [part.rank for part in plan("finextract_lora", {"weights": tiny()})] == [2, 8, 32, 64]
    assert {part.method for part in plan("finextract_lora", {"weights": tiny()})} == {"lora"}


def test_sums_of_clients_are_swept(tmp_path: Path) -> None:
    found = played(tmp_path / "out", "finextract_clients", averaged="1,2")
    assert [(row["averaged"], row["private"], row["method"]) for row in found] == [(1, 2, "lora"), (2, 4, "lora")]
    assert "Against averaged" in (tmp_path / "out/report.html").read_text()
    assert [part.averaged for part in plan("finextract_clients", {"weights": tiny()})] == [1, 2, 5, 10]


def test_countermeasures_are_rows_with_their_epsilon(tmp_path: Path) -> None:
    found = played(tmp_path / "out", "finextract_defences", stopped=1, sigma=0.5, clip=1.0, noise_multiplier=2.0)
    rows = {row["countermeasure"]: row for row in found}
    assert list(rows) == ["none", "cutout", "randaugment", "early_stop", "noise", "dp_sgd"]
    assert not any(row.get("error") for row in found)
    assert {name: row["defence"] for name, row in rows.items() if row["defence"] != "none"} == {
        "noise": "clip(1.0)+noise(0.5)",
        "dp_sgd": "dp_sgd(1.0, 2.0)",
    }
    for name in ("none", "cutout", "randaugment"):
        assert rows[name]["augmentation"] == name
    assert [rows[name]["local_steps"] for name in ("none", "early_stop")] == [2, 1]
    assert {name for name, row in rows.items() if row.get("epsilon") is not None} == {"noise", "dp_sgd"}
    assert all(rows[name]["epsilon"] > 0 for name in ("noise", "dp_sgd"))
    plain, noisy = (leak_in(tmp_path / "out", part).observed for part in (0, 4))
    noise = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain])
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)
    changes = [moved(leak_in(tmp_path / "out", part)) for part in range(6)]
    assert len({float(change.norm()) for change in changes}) == 6  # each does something
    page = (tmp_path / "out/report.html").read_text()
    assert "Against countermeasure" in page


def test_epsilon_is_of_all_steps_and_rounds(tmp_path: Path) -> None:
    def epsilon(**options: object) -> float:
        (setting,) = planned("finextract_defences", countermeasure="dp_sgd", noise_multiplier=2.0, **options)
        row = setting.settled(setting.attacks[0], "finextract", None)
        return float(row["epsilon"])

    once = epsilon(local_steps=1)
    assert once < epsilon(local_steps=4) < epsilon(local_steps=4, rounds=3)
    assert epsilon(local_steps=12) == pytest.approx(epsilon(local_steps=4, rounds=3))
    (silent,) = planned("finextract_defences", countermeasure="noise", sigma=0.0)
    assert silent.settled(silent.attacks[0], "finextract", None)["epsilon"] is None


def test_a_defence_of_the_change_acts(tmp_path: Path) -> None:
    played(tmp_path / "out", defence="clip(0.01)")
    assert float(moved(leak_in(tmp_path / "out")).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.fixture
def few_nouns(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    names = ("dog", "teapot", "wolf")
    monkeypatch.setattr(captions, "NOUNS", names)
    return names


@pytest.mark.parametrize("announced", ["partly", "nothing"])
def test_a_caption_that_is_not_announced_is_guessed(announced: str, tmp_path: Path, few_nouns: tuple[str, ...]) -> None:
    (row,) = played(tmp_path / "out", announced=announced, caption="a photo of dog")
    prompt = {"partly": "a photo of *", "nothing": ""}[announced]
    assert leak_in(tmp_path / "out").protocol.prompt == prompt
    assert row["caption"] in captions.filled_in(prompt, few_nouns)
    assert row["caption_found"] is (row["caption"] == "a photo of dog")
    assert row["caption_found"] or announced == "nothing"  # two steps are enough for a word
    page = (tmp_path / "out/report.html").read_text()
    said = {"partly": "but for one word, and a list of words", "nothing": "is not told the caption"}
    assert said[announced] in page


def test_a_prompt_of_the_attacks_own_is_not_the_clients(tmp_path: Path) -> None:
    (row,) = played(tmp_path / "out", attack="direct_sampling(samples=2,steps=2,prompt='a dog')")
    assert (row["caption"], row["caption_found"]) == ("a dog", False)


def test_a_guidance_that_is_chosen_stands_in_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finextract, "CANDIDATES", (1.0, 2.0))
    attacks = ",".join(f"finextract(w={w},samples=2,steps=2)" for w in ("'auto'", 0.5, 2.5, 3.5))
    found = play(planned(victims=2, attack=attacks), tmp_path / "out", fault="raises")
    sound, lost = ([row for row in found if bool(row.get("error")) is failed] for failed in (False, True))
    assert sound[0]["w"] in (1.0, 2.0)
    assert [row["w"] for row in sound[1:]] == [0.5, 2.5, 3.5]
    assert lost[0]["w"] == "auto"
    assert "Against w" in (tmp_path / "out/report.html").read_text()


def test_a_subject_is_a_class(tmp_path: Path) -> None:
    found = played(tmp_path / "out", subject="coffee,rocket", victims=2, local_steps=1)
    assert [row["private_set"] for row in found][::2] == ["coffee", "rocket"]
    assert len({row["private_set"] for row in found[:2]}) == 2


def test_images_of_the_pretraining_count_as_other_images(tmp_path: Path) -> None:
    """A sample that is nearer to one of those is not identified."""
    attacks = f"{QUICK},{SMALL['attack']}"
    without = played(tmp_path / "without", attack=attacks)
    known = played(tmp_path / "known", attack=attacks, pretraining="photos")
    for one, two in zip(without, known, strict=True):
        assert two["identified"] <= one["identified"]
        assert {name: two[name] for name in ("gap", "objective")} == {name: one[name] for name in ("gap", "objective")}


def test_attacks_go_by_the_scenarios_encoder_unless_they_have_their_own() -> None:
    (setting,) = planned(attack="finextract,direct_sampling(encoder='efficientnet_lite0')")
    assert [attack.encoder for attack in setting.attacks] == ["pixels", "efficientnet_lite0"]


def test_full_tuning_and_lora_have_settings_of_their_own() -> None:
    full, lora = plan("finextract", {"weights": tiny(), "method": "full,lora", "private": "3"})
    assert full.training.steps < lora.training.steps
    assert full.training.batch == lora.training.batch == 3
    assert full.lora is None
    assert lora.lora.written() == "lora(rank=16, alpha=16)"


# Bad input.


def a_grey_dataset(folder: Path) -> str:
    draw = np.random.default_rng(0)
    images = {f"x_{name}": draw.integers(0, 256, (24, SIDE, SIDE), dtype=np.uint8) for name in ("train", "test")}
    np.savez(folder / "grey.npz", **images, y_train=np.arange(24) % 2, y_test=np.arange(24) % 2)
    return str(folder / "grey.npz")


BAD: dict[str, tuple[str, dict[str, object], str]] = {
    "too many private images": ("finextract", {"private": 1000}, "lower --private"),
    "too many of a subject": ("finextract", {"private": 900, "subject": "coffee"}, "at least one that is held out"),
    "a subject that is none": ("finextract", {"subject": "cofee"}, "did you mean coffee"),
    "a caption that is none": ("finextract", {"caption": "  "}, "--caption"),
    "a caption of nothing": ("finextract", {"caption": ""}, "--caption has an empty value"),
    "an attack on texts": ("finextract", {"attack": "select"}, "select extracts no images from a diffusion model"),
    "an attack on gradients": ("finextract", {"attack": "idlg"}, "idlg extracts no images"),
    "an attack that is none": ("finextract", {"attack": "finextrakt"}, "did you mean finextract"),
    "guidance out of range": ("finextract", {"attack": "finextract(w=1000)"}, "w of finextract is 1000"),
    "a defence of an image model": ("finextract", {"defence": "precode(8)"}, "the model of an image classifier"),
    "a defence of the layers": ("finextract", {"defence": "soteria(0.5)"}, "of an image classifier"),
    "a defence that is none": ("finextract", {"defence": "clipp(1)"}, "did you mean clip"),
    "a method that is none": ("finextract", {"method": "dora"}, "lora"),
    "a rank of 0": ("finextract_lora", {"rank": 0}, "out of range"),
    "no encoder": ("finextract", {"encoder": "pixles"}, "did you mean pixels"),
    "an encoder that is not there": ("finextract", {"encoder": "absent.safetensors"}, "absent.safetensors"),
    "weights that are not there": ("finextract", {"weights": "absent"}, "There is no diffusion model in"),
    "no dataset": ("finextract", {"dataset": "fotos"}, "did you mean photos"),
    "no dataset of the pretraining": ("finextract", {"pretraining": "fotos"}, "did you mean photos"),
    "another defence beside one": ("finextract_defences", {"defence": "clip(1.0)"}, "--countermeasure says what"),
    "another augmentation beside one": ("finextract_defences", {"augmentation": "cutout"}, "--countermeasure says"),
    "a countermeasure that is none": ("finextract_defences", {"countermeasure": "prayer"}, "countermeasure"),
    "no victims": ("finextract", {"victims": 0}, "at least 1"),
    "tau above 1": ("finextract", {"tau": 1.5}, "out of range"),
}  # fmt: skip


def refused(
    scenario: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **options: object
) -> str:
    """What the command says of these options, in one sentence."""
    assert run(monkeypatch, "run", scenario, *words(**options), "--out", "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("fedtap: ")
    assert "Traceback" not in told
    assert len(told) < 500
    assert not Path("out").exists()
    return told


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, options, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert said in refused(scenario, monkeypatch, capsys, **options)


def test_images_of_another_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused("finextract", monkeypatch, capsys, dataset=a_grey_dataset(tmp_path))
    assert "1x8x8, and the diffusion model draws 3x8x8" in told
    language = save_language_model("gpt2", tmp_path / "text")
    capsys.readouterr()  # transformers draws a bar as it saves
    told = refused("finextract", monkeypatch, capsys, weights=language)
    assert "There is no diffusion model in" in told
    narrow = save_tiny(tmp_path / "wide", cross_attention_dim=16)
    capsys.readouterr()
    told = refused("finextract", monkeypatch, capsys, weights=narrow)
    assert "its text encoder gives 384" in told


def test_without_weights_the_pretrained_model_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(monkeypatch, "run", "finextract", "--out", "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("fedtap: ")
    assert "run `fedtap pretrain diffusion`" in told
    assert "give --weights FOLDER" in told
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "net")
    weights = tmp_path / "net/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    told = refused("finextract", monkeypatch, capsys, weights=tmp_path / "net")
    assert "pickled and may run code when it is read: load it where you trust it, and save it with" in told
