"""The noise scenario: which attacks it plays at which noise, and the genie's bound beside them."""

from __future__ import annotations

import itertools
from pathlib import Path

from fedtap.scenarios.command.plan import plan
from tests.support.played import planned

SMALL = {"size": 8, "victims": 2, "model": "lenet(width=3)", "attack": "idlg(steps=1)"}


def test_noise_git_is_played_where_there_is_noise_enough() -> None:
    last = {setting.sigma: setting.attacks[-1].name for setting in plan("noise", {})}  # type: ignore[attr-defined]
    assert {noise for noise, name in last.items() if name == "noise_git"} == {1e-1}
    assert [attack.name for attack in plan("noise", {"sigma": "0.1", "attack": "idlg"})[0].attacks] == ["idlg"]


def test_a_genies_error_stands_in_every_row_whose_noise_and_weights_are_known(tmp_path: Path) -> None:
    rows = planned("noise", SMALL | {"sigma": "0.0,0.001,0.1,10.0"}, tmp_path / "out")
    found = [
        [row["genie_mse"] for row in rows if row["defence"] == defence]
        for defence in ("none", "noise(0.001)", "noise(0.1)", "noise(10.0)")
    ]
    assert found[0] == [None, None]
    for less, more in itertools.pairwise(found[1:]):
        assert all(0 < low < high for low, high in zip(less, more, strict=True))
    unknown = planned(
        "noise",
        SMALL | {"sigma": "0.1", "threat_model": "eavesdropper", "attack": "training_mean"},
        tmp_path / "unknown",
    )
    assert [row["genie_mse"] for row in unknown] == [None, None]
    assert "genie MSE" in (tmp_path / "out/report.html").read_text()
