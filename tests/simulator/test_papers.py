"""Papers that attacks and defences cite: each one is found, and its BibTeX says what the citation says."""

from __future__ import annotations

import re

import pytest

from fedtap.attackers import ATTACKS
from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.defences.notation import described
from fedtap.simulator.report.papers import Paper, bibtex, cited, papers_html, papers_of

NAMES = [(registry, name) for registry in (ATTACKS, DEFENCES) for name in registry]


@pytest.mark.parametrize(("registry", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_paper_that_a_file_cites_is_found(registry: object, name: str) -> None:
    text = (ATTACKS if registry is ATTACKS else DEFENCES).about(name).partition("Departs from")[0]
    addresses = {url.rstrip(".,:;)") for url in re.findall(r"https://\S+", text)}
    if "without a paper" not in text:
        assert {paper.url for paper in cited(text)} == addresses


@pytest.mark.parametrize(
    ("text", "paper"),
    [
        ("by Zhu, Liu and Han, NeurIPS 2019. https://arxiv.org/abs/1", (("Zhu", "Liu", "Han"), False, "NeurIPS", 2019)),
        ("After Chen and Liu 2025 (GIT),\nhttps://arxiv.org/abs/1;", (("Chen", "Liu"), False, "", 2025)),
        ("noise, Jin et al., S&P 2022, https://arxiv.org/abs/1).", (("Jin",), True, "S&P", 2022)),
        ("Wu, Zhang, Wu, ICML 2025. https://arxiv.org/abs/1", (("Wu", "Zhang", "Wu"), False, "ICML", 2025)),
        ("of X (Zhang et al. 2017), https://arxiv.org/abs/1.", (("Zhang",), True, "", 2017)),
        ("Dwork and Roth 2014, theorem A.1, https://arxiv.org/abs/1", (("Dwork", "Roth"), False, "", 2014)),
    ],
)
def test_a_citation_is_read(text: str, paper: tuple[tuple[str, ...], bool, str, int]) -> None:
    assert cited(text) == [Paper(*paper, "https://arxiv.org/abs/1")]


def test_departures_are_no_sources() -> None:
    assert cited("Wynne 2025, https://a.example. Departs from it as in Wu 2026, https://b.example") == [
        Paper(("Wynne",), False, "", 2025, "https://a.example")
    ]


def test_bibtex_has_an_entry_for_each_paper_and_no_key_twice() -> None:
    text = "Müller 2025, https://arxiv.org/abs/2505.20026; Müller et al., S&P 2025, https://doi.org/10.1000/x_1; "
    assert bibtex(cited(text) * 2) == (
        "@misc{muller2025,\n  author = {Müller},\n  year = {2025},\n  eprint = {2505.20026},\n"
        "  archivePrefix = {arXiv},\n  url = {https://arxiv.org/abs/2505.20026},\n}\n\n"
        "@misc{muller2025b,\n  author = {Müller and others},\n  year = {2025},\n  howpublished = {S\\&P},\n"
        "  doi = {10.1000/x_1},\n  url = {https://doi.org/10.1000/x_1},\n}\n"
    )


def test_attacks_within_attacks_and_defences_have_papers() -> None:
    best = ATTACKS["best_of"](first=ATTACKS["idlg"](), second=ATTACKS["grey"]())
    found = papers_of([best, *described("clip(1)+noise(0.1)")])
    assert {name: [paper.year for paper in papers] for name, papers in found.items()} == {
        "idlg": [2020],
        "clip": [2018],
        "noise": [2014, 2019],
    }
    html = papers_html(found)
    assert "<a href='https://arxiv.org/abs/2001.02610'>Zhao, Mopuri and Bilen 2020</a>" in html
    assert papers_html({}) == ""
