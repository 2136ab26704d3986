"""`fedtap tune`: the grid is every combination, victims' images are out of reach, the least error leads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtap.attackers import parse
from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.scenarios.command.grid import attack_grid
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients.tuning import public_alone, ranking
from fedtap.simulator.data.images import Dataset, Side, photos
from fedtap.simulator.errors import FedtapError
from tests.support.played import command, play

QUICK = ["--size", "16", "--victims", "3", "--pairs", "60", "--model", "mlp(width=8, depth=1)"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(1e-6, 1, allow_nan=False), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 50), min_size=1, max_size=3, unique=True),
)
def test_a_grid_is_every_combination_in_order(rates: list[float], epochs: list[int]) -> None:
    tries = [f"rate={','.join(map(repr, rates))}", f"epochs = {', '.join(map(str, epochs))}"]
    found = attack_grid("coarse_git(width=8)", tries)
    wanted = tuple(CoarseGIT(width=8, rate=r, epochs=e) for r, e in itertools.product(rates, epochs))
    assert parse(",".join(found)) == wanted


def test_a_grid_reaches_into_wrapped_attacks_and_swaps_them() -> None:
    tries = ["prior.rate=1e-3,0.001,4e-3", "steps=5"]
    assert attack_grid("fused_git(prior=coarse_git(epochs=3))", tries) == (
        "fused_git(prior=coarse_git(epochs=3, rate=0.001), steps=5)",
        "fused_git(prior=coarse_git(epochs=3), steps=5)",
    )
    swapped = attack_grid("refine(grey,gauss_newton)", ["start=grey,restarts(idlg(steps=3), 2)"])
    assert swapped[1] == "refine(start=restarts(attack=idlg(steps=3), times=2), finish=gauss_newton)"


ONE_TRY = st.text(max_size=20) | st.builds(
    "{}={}".format, st.sampled_from(["rate", "epochs", "x"]), st.text(max_size=12)
)


@given(st.sampled_from(["coarse_git", "fused_git", "grey"]), st.lists(ONE_TRY, max_size=2))
def test_any_text_is_a_grid_or_one_sentence(attack: str, tries: list[str]) -> None:
    try:
        found = attack_grid(attack, tries)
    except FedtapError as error:
        assert len(str(error)) < 300  # noqa: PT017
    else:
        assert len(parse(",".join(found))) == len(found)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["coarse_git"], "nothing to try of coarse_git: write --try"),
        (["coarse_git,lti", "--try", "rate=1"], "names 2 attacks, and one is tuned at a time"),
        (["coarse_git", "--try", "rat=1"], "did you mean rate"),
        (["coarse_git", "--try", "rate"], "'rate' is not a field and its values"),
        (["coarse_git", "--try", "rate=1,,2"], "is not a field and its values"),
        (["coarse_git", "--try", "rate=fast"], "'fast' in --try is not a value of rate"),
        (["coarse_git", "--try", "epochs=0.5"], "epochs of CoarseGIT is 0.5, and it is a whole number"),
        (["coarse_git", "--try", "rate=1", "--try", "rate=2"], "--try has rate twice"),
        (["coarse_git", "--try", "rate.x=1"], "rate of coarse_git is no attack, so it has no field x"),
        (["grey", "--try", "rate=1"], "There is no field of grey named 'rate': there are none."),
        (["coarse_git", "--try", f"rate={','.join(map(str, range(1, 202)))}", "--try",
          f"width={','.join(map(str, range(1, 202)))}"], "40,401 combinations"),
        (["--try", "rate=1"], "Missing argument"),
        (["--size", "8", "--try", "rate=1"], "The attack comes before the options"),
        (["coarse_git", "--try", "rate=1", "--attack", "lti"], "--attack would be another"),
        (["coarse_git", "--try", "rate=1", "--target-dataset", "photos"], "tuned on public images alone"),
        (["coarse_git", "--try", "rate=1", "--victims", "9000"], "the target data of photos holds"),
        (["coarse_git", "--try", "rate=1", "--pairs", "9000"], "are more than the"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "tune", *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.rglob("*.jsonl")]


class Sealed(Side):
    """A side that nobody may look at."""

    def __init__(self) -> None:
        pass


def sealed(name: str, data_root: Path, size: int) -> Dataset:
    return dataclasses.replace(photos(size), train=Sealed(), target=Sealed())


def keys(side: Side) -> list[bytes]:
    return [image.numpy().tobytes() for image in side.images]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=25, max_size=60), st.integers(0, 9))
def test_public_images_are_shared_out_once_each(labels: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(labels), 1, 4, 4), generator=draw, dtype=torch.uint8)
    public = Side(images, torch.tensor(labels))
    made = public_alone(Dataset("own", tuple("abcde"), public, Sealed(), Sealed()))
    parts = [made.auxiliary, made.train, made.target]
    assert sorted(key for side in parts for key in keys(side)) == sorted(keys(public))
    for label in range(5):
        has = [int((side.labels == label).sum()) for side in parts]
        assert has[1] == has[2] == labels.count(label) // 5
    with pytest.raises(FedtapError, match="five public images"):
        public_alone(Dataset("own", tuple("abcde"), Side(images[:4], public.labels[:4]), Sealed(), Sealed()))


def test_victims_images_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("settings", "private_data"):
        monkeypatch.setattr(f"fedtap.simulator.federation.{module}.dataset_of", sealed)
    options: dict[str, Any] = {"size": "16", "victims": "3", "pairs": "60", "model": "mlp(width=8, depth=1)"}
    options |= {"rounds": "1", "local_samples": "4", "local_epochs": "1", "attack": "ridge,training_mean"}
    with pytest.raises(AttributeError):  # negative control: any other scenario looks at the victims' images
        play(plan("git", options), tmp_path / "git")
    one, two = (play(plan("tuning", options), tmp_path / name) for name in ("one", "two"))
    assert [row["mse"] for row in one] == [row["mse"] for row in two]
    assert all(row["mse"] is not None for row in one)


def test_attacks_are_ranked_and_the_best_can_be_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, "tune", "lti(width=8)", "--try", "epochs=1,30", *QUICK, "--out", str(out)) == 0
    said = " ".join(capsys.readouterr().out.split())
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    best = ranking(rows)[0]["attack"]
    assert f'--attack "{best}"' in said
    assert parse(best)[0].epochs in (1, 30)  # type: ignore[attr-defined]
    assert said.index("the least error first") < said.index("blind guess 0.0")


def test_failures_come_last() -> None:
    def row(attack: str, mse: float | None) -> dict[str, Any]:
        return {"attack": attack, "mse": mse, "psnr": 10.0}

    rows = [row("a", 0.3), row("b", 0.2), row("a", 0.1), row("b", 0.4), row("c", 0.01), row("c", None), row("d", None)]
    found = ranking(rows)
    assert [one["attack"] for one in found] == ["a", "b", "c"]
    assert [one["failed"] for one in found] == [0, 0, 1]
    assert found[0]["mse"] == pytest.approx(0.2)
