"""A film has few frames, evenly spaced, and changes nothing; a run leaves it as a GIF and on its page."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fedtap.attackers.gradients.dlg import DLG
from fedtap.attackers.gradients.gradinversion import GradInversion
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.inverting_gradients import InvertingGradients
from fedtap.simulator.attack import Attack
from fedtap.simulator.film import MOST_FRAMES, Film, filming, shown
from fedtap.simulator.models.registry import build
from fedtap.simulator.report.film import film_html, gif
from tests.attackers.test_gradients import leak_of, pictures
from tests.support.played import command


@given(steps=st.integers(1, 600))
def test_frames_are_few_and_evenly_spaced(steps: int) -> None:
    film, calls = Film(), []

    def present() -> tuple[Tensor, Tensor]:
        calls.append(None)
        return torch.zeros(1, 1, 2, 2), torch.tensor(1.0)

    for _ in range(steps):
        film.take(present)
    assert len(film.frames) == len(film.objectives) == len(film.steps) <= MOST_FRAMES
    assert film.steps == list(range(1, steps + 1, film.every))
    assert steps < MOST_FRAMES * 2 or len(film.frames) >= MOST_FRAMES // 2
    assert len(calls) <= MOST_FRAMES * 8


@pytest.mark.parametrize(
    "attack", [IDLG(steps=20), DLG(steps=20), InvertingGradients(steps=20), GradInversion(steps=20, seeds=2)], ids=str
)
def test_a_film_ends_near_the_reconstruction_and_changes_nothing(attack: Attack) -> None:
    images, labels = pictures(3, 2)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=5), "lenet")
    plain = attack(leak, seed=0)
    with filming() as film:
        filmed = attack(leak, seed=0)
    assert torch.equal(filmed.images, plain.images)
    assert 18 <= len(film.frames) <= 20
    assert film.frames[0].shape == images[0].shape
    apart = [float((frame - plain.images[0]).abs().mean()) for frame in film.frames]
    assert min(apart) == apart[-1] or apart[-1] < apart[0]
    assert film.objectives[-1] < film.objectives[0]
    shown(lambda: pytest.fail("nobody films"))


def fading(*objectives: float) -> Film:
    """A frame for each objective, from white to black."""
    film = Film()
    for number, objective in enumerate(objectives):
        level = 1 - number / (len(objectives) - 1)
        film.take(lambda level=level, one=objective: (torch.full((1, 3, 8, 8), level), torch.tensor(one)))  # type: ignore[misc]
    return film


def marks(made: Image.Image, left: int) -> list[tuple[float, float]]:
    """Of each frame the middle of what is red right of `left`, in pixels."""
    found = []
    for number in range(made.n_frames):  # type: ignore[attr-defined]
        made.seek(number)
        pixels = np.asarray(made.convert("RGB")).astype(int)
        red = (pixels[..., 0] > pixels[..., 1] + 60) & (np.arange(made.width) >= left)
        rows, columns = red.nonzero()
        found.append((float(columns.mean()), float(rows.mean())))
    return found


def test_a_gif_has_the_original_and_the_objective_beside_each_frame() -> None:
    film, truth = fading(1.0, 0.5, 1e-3), torch.zeros(1, 3, 8, 8)
    for original, wide in ((truth, 2 * 192 + 20), (None, 192)):
        made = Image.open(io.BytesIO(gif(film, original)))
        assert (made.n_frames, made.width) == (3, wide + 20 + 192)
        made.seek(2)
        last = made.convert("RGB")
        assert max(last.getpixel((wide - 96, 96))) < 8  # type: ignore[arg-type]
        across, down = zip(*marks(made, wide + 10), strict=True)
        assert list(across) == sorted({*across})  # the mark goes on with the step, and falls with the objective
        assert list(down) == sorted({*down})
        assert (down[1] - down[0]) / (down[2] - down[0]) == pytest.approx(math.log(2) / math.log(1e3), abs=0.02)
    without = Image.open(io.BytesIO(gif(fading(1.0, math.nan), truth)))
    assert without.width == 2 * 192 + 20
    assert film_html(b"", "idlg", film).count("<svg") == 1
    assert "<svg" not in film_html(b"", "idlg", None)


def test_a_run_leaves_its_films_and_goes_on_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", "first_leak", "--victims", "2", "--attack", "idlg(steps=5),linear", "--model", "mlp")
    out = ("--out", str(tmp_path / "run"))
    assert command(monkeypatch, *words, *out, "--film") == 0
    assert [path.name for path in (tmp_path / "run/films").iterdir()] == ["part_0-0-idlg.gif"]
    assert (tmp_path / "run/report.html").read_text().count("data:image/gif") == 1
    assert command(monkeypatch, *words, *out, "--film", "--resume") == 0
    assert (tmp_path / "run/report.html").read_text().count("data:image/gif") == 1
    assert command(monkeypatch, *words, *out) == 0
    assert not (tmp_path / "run/films").exists()
