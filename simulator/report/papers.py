"""The papers that attacks and defences come from, as their files name them, for the page: links and BibTeX."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import urlsplit

from fedtap.simulator.attack import Attack
from fedtap.simulator.defences.defence import Defence

_NAME = r"(?!\w*[A-Z]{2})[^\W\d_a-z][\w'’-]+"  # two capitals in a row make a venue: NeurIPS, CVPR
_CITED = re.compile(
    rf"(?P<authors>{_NAME}(?:(?:, and |, | and ){_NAME})*)(?P<others> et al\.)?"
    r"(?:, (?P<venue>[^\s.,:;()]*[A-Z&]{2}[^\s.,:;()]*(?: [A-Z]\w+)?))?"
    r",? (?P<year>(?:19|20)\d\d)(?: \(\w+\)|, [a-z]+ [A-Z\d.]+)?\)?[.,:;] "  # then what it calls itself, or a section
    r"(?P<url>https://[^\s<>]+)"
)
"""A paper as docstrings here cite it: `Zhu, Liu and Han, NeurIPS 2019. https://arxiv.org/abs/1906.08935`."""


@dataclass(frozen=True)
class Paper:
    """A paper, as far as a citation says: without its title."""

    authors: tuple[str, ...]
    """Surnames, in order."""
    more_authors: bool
    """Whether the citation leaves some out."""
    venue: str
    """Empty where the citation has none."""
    year: int
    url: str

    def __str__(self) -> str:
        """The citation in words."""
        names = " and ".join(filter(None, (", ".join(self.authors[:-1]), self.authors[-1])))
        return f"{names}{' et al.' * self.more_authors}{f', {self.venue}' * bool(self.venue)} {self.year}"


def cited(text: str) -> list[Paper]:
    """The papers that a docstring cites with authors, year and address, in its order and each once; what it says of
    its departures from them is left out."""
    found: dict[str, Paper] = {}
    for match in _CITED.finditer(" ".join(text.partition("Departs from")[0].split())):
        authors = tuple(re.split(r", and |, | and ", match["authors"]))
        url = match["url"].rstrip(".,:;)")
        found.setdefault(url, Paper(authors, bool(match["others"]), match["venue"] or "", int(match["year"]), url))
    return list(found.values())


def papers_of(parts: Iterable[Attack[Any] | Defence]) -> dict[str, list[Paper]]:
    """Name of each attack, attack within it, and defence -> what the file that defines it cites; those that cite
    nothing are left out."""
    found: dict[str, list[Paper]] = {}
    for part in parts:
        found[part.name] = cited(sys.modules[type(part).__module__].__doc__ or "")
        found |= papers_of(value for value in vars(part).values() if isinstance(value, Attack))
    return {name: papers for name, papers in found.items() if papers}


def bibtex(papers: Iterable[Paper]) -> str:
    """An entry for each paper, each once; its key is the first author's surname and the year, with a letter where
    another entry has that already."""
    entries: dict[str, str] = {}
    for paper in {paper.url: paper for paper in papers}.values():
        surname = unicodedata.normalize("NFKD", paper.authors[0]).encode("ascii", "ignore").decode()
        stem = re.sub("[^a-z]", "", surname.lower()) + str(paper.year)
        key = next(key for key in (stem, *(stem + chr(letter) for letter in range(98, 123))) if key not in entries)
        place, path = urlsplit(paper.url).netloc, urlsplit(paper.url).path
        fields = {
            "author": " and ".join([*paper.authors, *["others"] * paper.more_authors]),
            "year": str(paper.year),
            "howpublished": paper.venue.replace("&", r"\&"),
            "eprint": path.removeprefix("/abs/") if place == "arxiv.org" else "",
            "archivePrefix": "arXiv" if place == "arxiv.org" else "",
            "doi": path.removeprefix("/") if place == "doi.org" else "",
            "url": paper.url,
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items() if value)
        entries[key] = f"@misc{{{key},\n{lines}}}\n"
    return "\n".join(entries.values())


def papers_html(papers: Mapping[str, Sequence[Paper]]) -> str:
    """Each name's papers as links, and their BibTeX folded; empty where there are none."""
    if not papers:
        return ""
    lines = ""
    for name, some in papers.items():
        links = "; ".join(f"<a href='{escape(one.url)}'>{escape(str(one))}</a>" for one in some)
        lines += f"<dt>{escape(name)}</dt><dd>{links}</dd>"
    entries = bibtex(paper for some in papers.values() for paper in some)
    return (
        f"<dl class='papers'>{lines}</dl><details><summary>BibTeX</summary><pre class='copied'>{escape(entries)}</pre>"
        "<p class='pale'>Titles are not kept here: reference managers fetch them by the number or DOI.</p></details>"
    )
