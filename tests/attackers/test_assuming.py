"""Being wrong about the model: numbers are moved, none is made up, and who computes with the model goes blind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers import parse
from fedtap.attackers.baselines.ridge import Ridge
from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.wrappers.assuming import Assuming, taken_for
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.models.registry import build
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures


def of_lenet(victims: int = 3) -> Leak:
    return leak_of(*pictures(victims, 1), build("lenet", (3, 16, 16), 10, seed=1234), "lenet")


def row(tensors: Tensors, lead: int = 1) -> Tensor:
    return torch.cat([tensor.flatten(lead) for tensor in tensors.values()], -1)


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 20), depth=st.integers(1, 5))
def test_the_end_of_the_row_is_kept_and_the_rest_is_zero(width: int, depth: int) -> None:
    leak = of_lenet()
    wrong = taken_for(f"lenet(width={width}, depth={depth})", leak)
    wrong.check()
    for mine, theirs, lead in ((wrong.observed, leak.observed, 1), (wrong.weights or {}, leak.weights or {}, 0)):
        cut, whole = row(mine, lead), row(theirs, lead)
        same = min(cut.shape[-1], whole.shape[-1])
        assert torch.equal(cut[..., -same:], whole[..., -same:])
        assert not cut[..., :-same].any()


def test_whoever_assumes_right_changes_nothing(tmp_path: Path) -> None:
    leak = of_lenet()
    assert torch.equal(Assuming("lenet", IDLG(steps=20))(leak).images, IDLG(steps=20)(leak).images)
    auxiliary = auxiliary_for(leak, tmp_path)
    right, plain = (attack.fit(auxiliary)(leak).images for attack in (Assuming("lenet", Ridge()), Ridge()))
    assert torch.equal(right, plain)


def test_a_wrong_width_blinds_who_computes_with_the_model_and_not_who_reads_a_row(tmp_path: Path) -> None:
    leak, truth = of_lenet(), pictures(3, 1)[0]
    auxiliary = auxiliary_for(leak, tmp_path, pairs=200)

    def error(name: str, model: str) -> float:
        (attack,) = parse(f"assuming({model!r}, {name})")
        return float((attack.fit(auxiliary)(leak).images.clamp(0, 1) - truth).square().mean())

    assert error("idlg(steps=60)", "lenet(width=11)") > 2 * error("idlg(steps=60)", "lenet")
    assert error("coarse_git(epochs=0)", "lenet(width=11)") > 1.5 * error("coarse_git(epochs=0)", "lenet")
    assert error("ridge", "lenet(width=16)") == pytest.approx(error("ridge", "lenet"), rel=0.05)


def test_what_was_learned_is_of_the_assumed_model(tmp_path: Path) -> None:
    leak = of_lenet()
    fitted = Assuming("lenet(width=4)", CoarseGIT(epochs=0)).fit(auxiliary_for(leak, tmp_path))
    (learned,) = fitted.learned()
    assert learned.about.protocol.model == "lenet(width=4)"
    assert "pairs=40" in repr(learned.about)
    fitted.accepts(leak)
    with pytest.raises(FedtapError, match="trained on"):
        learned.accepts(leak)


def test_fewer_pairs_are_the_first_ones(tmp_path: Path) -> None:
    leak = of_lenet()
    for name in ("identified(exact_git, pairs=30)", "training_mean"):
        (attack,) = parse(f"assuming('lenet(width=12)', {name})")
        auxiliary = auxiliary_for(leak, tmp_path, 300).first(35)
        if name == "training_mean":
            guess = attack.fit(auxiliary)(leak).images[0, 0]
            torch.testing.assert_close(guess, pictures(300, 1, seed=100)[0][:35, 0].mean(0))
        else:
            with pytest.raises(FedtapError, match="pairs"):
                attack.fit(auxiliary)


def test_models_with_statistics_and_unknown_ones_are_refused() -> None:
    with pytest.raises(FedtapError, match="without BatchNorm"):
        Assuming("resnet20", IDLG())(of_lenet())
    for model, said in (
        ("lenet(width=0)", "whole numbers from 1"),
        ("lenet(width=1.5)", "width=16"),
        ("lenet(size=3)", "width=16"),
        ("lenet()", "width=16"),
        ("lenet(", "width=16"),
        ("lenet(3)", "width=16"),
        ("vit(width=3)", "it has one"),
        ("mplp(width=3)", "mplp"),
    ):
        with pytest.raises(FedtapError, match=said):
            build(model, (3, 16, 16), 10)


@given(width=st.integers(1, 9), depth=st.integers(1, 4))
@settings(deadline=None, max_examples=10)
def test_a_sized_model_is_what_its_name_says(width: int, depth: int) -> None:
    assert len(list(build(f"lenet(width={width},depth={depth})", (3, 16, 16), 10).parameters())) == 2 * depth + 2
    hidden = [
        p.shape[0] for p in build(f"mlp(depth={depth}, width={width})", (3, 16, 16), 10).parameters() if p.ndim > 1
    ]
    assert hidden == [width] * depth + [10]


def test_commas_within_brackets_do_not_sweep() -> None:
    parts = plan("git", {"model": "lenet(width=8,depth=2),mlp", "attack": "idlg"})
    assert [part.model for part in parts] == ["lenet(width=8,depth=2)", "mlp"]


def test_the_scenario_misleads_whoever_it_is_told_to() -> None:
    part, *rest = plan("wrong_architecture", {"attack": "idlg,ridge"})
    assert len(rest) == 4
    assert part.swept == (("assumed", "lenet"),)
    assert part.attacks == (Assuming("lenet", IDLG()), Assuming("lenet", Ridge()))
    same = {"attack": "", "assumed": "", "swept": ()}
    assert dataclasses.replace(part, **same) == dataclasses.replace(rest[0], **same)
