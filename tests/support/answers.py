"""The answer box against `rows.csv`: each figure in it is computed again, from nothing but the rows."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import unescape
from pathlib import Path

Rows = Sequence[Mapping[str, str]]

_ONE = re.compile(
    r"(\d+) of (\d+) images? (?:recognisable|≥[\d.]+ dB)(?: \(95 % interval [\d–]+ %\))?(?:, (\d+) of them)?"
)
_EACH = re.compile(r"(.+?): (\d+) of (\d+)(?:, (-?[\d.]+) dB)?(?:; |\.$|(?=; \d+ victims? without))")
_VALUE = (
    r"(?P<middle>-?\d[\d.e+-]*)(?: \((?:median of )?(?P<many>\d+)(?: times|, (?P<low>\S+) to (?P<high>[^)\s]+))\))?"
)

_FIGURE = re.compile(r"(?P<title>\D+?) " + _VALUE)

_FIGURES = re.compile(r"(?P<where>[^:;]+): " + _VALUE)

_ENDS = re.compile(
    r"from (\d+) of (\d+) images? \((\w+) (\S+|.*?\)?)\) to (\d+) of (\d+) \((\w+) (\S+|.*?\)?)\) recognisable"
)

_SHARES = {
    r"that (?P<attack>\S+) chose, (\d+)%": ("precision",),
    r"(?P<attack>\S+) has an AUC of ([\d.]+)": ("membership_auc",),
    r"that (?P<attack>\S+) draws, (\d+)% .*? and (\d+)% of the private": ("identified", "extracted"),
}
"""What sentences about documents and about extracted images say of an attack -> the columns."""


def check_answers(run: Path) -> int:
    """How many figures of the page's answer were held against the rows.

    Raises:
        AssertionError: one differs.
    """
    page = (run / "report.html").read_text(encoding="utf-8")
    box = re.search(r"<section class='answer'>(.*?)</section>", page, re.DOTALL)
    sentences = [unescape(one) for one in re.findall(r"<p>(.*?)</p>", box[1], re.DOTALL)] if box else []
    with (run / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("attack") and not _failed(row)]
    return sum(_checked(sentence, rows) for sentence in sentences)


def _failed(row: Mapping[str, str]) -> bool:
    """Whether there is no result; in some scenarios `error` is a number."""
    return bool(row.get("error")) and not re.fullmatch(r"-?[\d.e+-]+", row["error"])


def _checked(sentence: str, rows: Rows) -> int:
    named = max((row["attack"] for row in rows if sentence.startswith(row["attack"])), key=len, default="")
    own = [row for row in rows if row["attack"] == named]
    if own and ", images " in sentence:
        return _each(sentence, own)
    if found := _ONE.match(sentence):  # several attacks of the same share
        attacks = re.findall(
            r"([^,:]\S*(?:\([^)]*\))?(?: \+ \S+| \S+(?= \())?) \((-?[\d.]+) dB\)", sentence.partition("%): ")[2]
        )
        for attack, middle in attacks:
            some = [row for row in rows if row["attack"] == attack.strip()]
            assert _levels(some)[:2] == (int(found[1]), int(found[2])), sentence
            assert abs(statistics.median(_psnrs(some)) - float(middle)) <= 0.051, sentence
        assert attacks, sentence
        return len(attacks)
    if own and (found := _ONE.search(sentence)) and "over " not in sentence:
        won, many, identical = _levels(own)
        assert (won, many) == (int(found[1]), int(found[2])), sentence
        assert found[3] is None or int(found[3]) == identical, sentence
        if middle := re.search(r"median (-?[\d.]+) dB", sentence):
            assert abs(statistics.median(_psnrs(own)) - float(middle[1])) <= 0.051, sentence
        return 1
    if own and (found := _ENDS.search(sentence)):
        for won, images, name, value in (found.groups()[:4], found.groups()[4:]):
            some = [row for row in own if _same(row[name], value)]
            assert _levels(some)[:2] == (int(won), int(images)), sentence
        return 2
    for pattern, columns in _SHARES.items():
        if found := re.search(pattern, sentence):
            return _share(sentence, found, columns, rows)
    said = sentence.removeprefix(f"{named}: ")
    if own and "levels" not in own[0] and re.match(r"[a-z ]+(\(.*?\))?: ", said, re.IGNORECASE):
        title, _, rest = said.partition(": ")
        found = list(_FIGURES.finditer(rest))
        for one in found:
            words = [word.rpartition(" ") for word in one["where"].strip().split(", ")]
            some = [row for row in own if all(_same(row[name.replace(" ", "_")], value) for name, _, value in words)]
            _figure(title.partition(" (")[0], one, some)
        return len(found)
    if own and "levels" not in own[0] and (one := _FIGURE.match(said)) and "settings" not in one["title"]:
        _figure(one["title"], one, own)
        return 1
    return 0


def _share(sentence: str, found: re.Match[str], columns: Sequence[str], rows: Rows) -> int:
    """Medians or means of an attack's columns, in the setting that the sentence begins with, if it names one."""
    setting = re.match(r"([a-z ]+) (\S+): ", sentence)
    some = [row for row in rows if row["attack"] == found["attack"]]
    if setting:
        some = [row for row in some if _same(row[setting[1].replace(" ", "_")], setting[2])]
    for column, said in zip(columns, found.groups()[1:], strict=True):
        values = _numbers(row[column] for row in some)
        true = float(said) if "." in said else int(said) / 100
        assert any(abs(middle(values) - true) <= 0.0051 for middle in (statistics.median, statistics.fmean)), sentence
    return len(columns)


def _each(sentence: str, rows: Rows) -> int:
    """A sentence that names settings one by one: the counts of all are those of the rows, and of each its median."""
    pieces = _EACH.findall(sentence.partition("dB): ")[2])
    won, many, _ = _levels(rows)
    assert pieces, sentence
    named = {word.rpartition(" ")[0].replace(" ", "_") for piece in pieces for word in piece[0].split(", ")}
    assert (sum(int(piece[1]) for piece in pieces), sum(int(piece[2]) for piece in pieces)) == (won, many), sentence
    for where, back, images, middle in pieces:
        some, words = rows, [word.rpartition(" ") for word in where.split(", ")]
        said = {name.replace(" ", "_"): value for name, _, value in words}
        for name in named & rows[0].keys():  # a defence with a comma in it is not looked up
            some = [row for row in some if _same(row[name], said.get(name, ""))]
        if some and len(some) < len(rows):
            assert _levels(some)[:2] == (int(back), int(images)), (where, sentence)
            assert not middle or abs(statistics.median(_psnrs(some)) - float(middle)) <= 0.051, (where, sentence)
    return len(pieces)


def _same(cell: str, said: str) -> bool:
    try:
        return float(f"{float(cell):.3g}") == float(f"{float(said.replace(',', '')):.3g}")
    except ValueError:
        return cell == said


def _levels(rows: Rows) -> tuple[int, int, int]:
    """Images that came back, all images, and identical ones."""
    levels = [level for row in rows if row.get("levels") for level in json.loads(row["levels"])]
    return sum(level != "nothing" for level in levels), len(levels), sum(level == "identical" for level in levels)


def _psnrs(rows: Rows) -> list[float]:
    return [
        value
        for row in rows
        for value in (json.loads(row["psnr_images"]) if row.get("psnr_images") else [float(row["psnr"])])
    ]


def _figure(title: str, found: re.Match[str], rows: Rows) -> None:
    """The median over these rows is that of a column called so."""
    name = title.lower().replace(" ", "_")
    columns = [column for column in rows[0] if column == name or name.endswith(column)]
    said = [found[group] for group in ("middle", "low", "high") if found[group]]
    assert any(_ends(_numbers(row[column] for row in rows), said, found["many"]) for column in columns), found[0]


def _numbers(cells: Iterable[str]) -> list[float]:
    words = {"yes": 1.0, "no": 0.0}
    found = []
    for cell in cells:
        try:
            found.append(words.get(cell) if cell in words else float(cell))
        except ValueError:
            continue
    return [value for value in found if value is not None and math.isfinite(value)]


def _ends(values: Sequence[float], said: Sequence[str], many: str | None) -> bool:
    """Whether median, least and largest of the values are those that are said, to the digits that stand there."""
    if not values or many not in (None, str(len(values))):
        return False
    true = (statistics.median(values), min(values), max(values))
    return all(
        math.isclose(one, float(text), rel_tol=0.051, abs_tol=5e-4) for one, text in zip(true, said, strict=False)
    )
