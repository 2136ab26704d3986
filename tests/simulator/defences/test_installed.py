"""Defences of other packages, by their entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.simulator import registry
from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.notation import described, first_line, names, strengths, usage
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.scoring import adaptation
from fedtap.simulator.registry import Registry
from tests.support.top_k import TopK


def install(patch: pytest.MonkeyPatch, **entries: str) -> None:
    found = [EntryPoint(name, value, DEFENCES.group) for name, value in entries.items()]
    patch.setattr(registry, "entry_points", lambda group: found if group == DEFENCES.group else [])
    patch.setitem(vars(DEFENCES), "entries", Registry.entries.func(DEFENCES))  # type: ignore[attr-defined]


def test_an_installed_defence_is_written_listed_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FedtapError, match="no defence named 'top_k'"):
        described("top_k(3)")
    install(monkeypatch, top_k="tests.support.top_k:TopK")
    assert "top_k" in names()
    assert described("clip(1.0)+top_k(k=3)")[1] == TopK(3)
    assert parse("top_k(3)").update.parts == (TopK(3),)
    assert strengths("top_k(3)") == ("top_k(1000)", "top_k(100)", "top_k(10)", "top_k(1)")
    assert (usage("top_k"), first_line("top_k")) == ("top_k(k)", "Keeps the k largest entries of each tensor.")
    assert adaptation(IDLG(adaptive=True), "top_k(3)") == {"adaptive": True}
    assert adaptation(ExactGIT(), "top_k(3)") == {"adaptive": False}
    assert adaptation(IDLG(adaptive=True), "precode(8)+top_k(3)")["adaptive_note"] == "does not know precode(8)"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gone", "tests.support.gone:Gone", "defence gone cannot be loaded .ModuleNotFoundError"),
        ("other", "tests.support.top_k:TopK", "rows call each defence by its file"),
        ("defences", "tests.support.defences:drawn", "defences is no defence"),
    ],
)
def test_an_installed_defence_that_is_none_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **{name: value})
    with pytest.raises(FedtapError, match=said) as caught:
        described(f"{name}(1)")
    assert len(str(caught.value)) < 300
    assert described("clip(1)"), "others do without it"


def test_an_installed_package_cannot_take_a_name_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, clip="tests.support.top_k:TopK")
    assert type(described("clip(1)")[0]).__module__ == "fedtap.simulator.defences.clip"
    assert names().count("clip") == 1


@pytest.mark.parametrize("text", ["tests.support.top_k:TopK(3)", "tests.support.top_k.TopK(3)"])
def test_no_text_names_code(text: str) -> None:
    with pytest.raises(FedtapError, match="cannot be read"):
        described(text)
