"""What the page says of images that were extracted: how many came back, beside the pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.columns import Group, grouped, label, scrolled, setting
from fedtap.simulator.report.pictures import picture_html
from fedtap.simulator.scenario import Row

CURVES = (
    ("identified", "share of samples identified"),
    ("gap_samples", "gap to held-out images"),
    ("extracted", "share of private images extracted"),
)
"""Columns that are drawn -> what they are."""


def extraction_sentences(rows: Group, swept: Sequence[str]) -> list[str]:
    """How much came back, for each value of what is swept."""
    said = []
    for some in grouped(rows, map(setting, swept)):
        where, known = label(some, map(setting, swept)), [row for row in some if row.get("identified") is not None]
        if known:
            sentence = _sentence(known)
            said.append(f"{where}: {sentence}" if where else sentence)
    return said


def _sentence(rows: Group) -> str:
    attacks = grouped(rows, [setting("attack")])
    best = max(attacks, key=lambda some: (_mean(some, "identified"), _mean(some, "gap")))
    found, gap = _mean(best, "extracted"), _mean(best, "gap")
    begin = "Images of the clients were extracted" if found > 0 and gap > 0 else "No image of the clients was extracted"
    said = (
        f"{begin}: of those that {best[0]['attack']} draws, {_mean(best, 'identified'):.0%} are nearer to a private "
        f"image than to any other, and {found:.0%} of the private images have an extracted one that counts as a copy."
    )
    rest = [some for some in attacks if some is not best]
    if rest:
        others = ", ".join(f"{some[0]['attack']} {_mean(some, 'identified'):.0%}" for some in rest)
        said += f" Of the other attacks' samples, this share is nearer to a private image than to any other: {others}."
    return said


def extraction_charts(rows: Sequence[Row], swept: Sequence[str]) -> Mapping[str, str]:
    """Scores against what is swept first, and against w where attacks differ in it."""
    found = {f"Against {name.replace('_', ' ')}": _course(rows, name) for name in swept[:1]}
    values = {row["w"] for row in rows if row.get("w") is not None}
    if len(values) > 2 and not swept:
        found["Against w"] = _course([row for row in rows if row.get("w") is not None], "w")
    return found


def _course(rows: Sequence[Row], name: str) -> str:
    ticks = list(dict.fromkeys(str(row[name]) for row in sorted(rows, key=lambda row: _order(row[name]))))
    panels = []
    for column, words in CURVES:
        series = []
        for attack in dict.fromkeys(str(row["attack"]).partition("(")[0] for row in rows):
            mine = [row for row in rows if str(row["attack"]).partition("(")[0] == attack]
            points = {
                at: [r[column] for r in mine if str(r[name]) == tick and r.get(column) is not None]
                for at, tick in enumerate(ticks)
            }
            means = {float(at): statistics.fmean(values) for at, values in points.items() if values}
            series.append(Series(attack, [*means], [*means.values()]))
        panels.append(Panel(name.replace("_", " "), words, series, ticknames=ticks))
    return chart(panels, f"share identified, gap and share extracted against {name}")


def _order(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def beside(
    extracted: Float[Tensor, "images channel height width"],
    private: Float[Tensor, "images channel height width"],
    similarities: Float[Tensor, "images"],
    held_out: Float[Tensor, "images channel height width"],
    held_out_similarities: Float[Tensor, "images"],
) -> str:
    """Each extracted image, the private image nearest to it, and the held-out one nearest to it."""
    columns = (
        ("extracted", extracted, None),
        ("nearest private image", private, similarities),
        ("nearest held-out image", held_out, held_out_similarities),
    )
    body = ""
    for name, images, alike in columns:
        said = ["" if alike is None else f"{float(one):.2f}" for one in (similarities if alike is None else alike)]
        cells = "".join(
            f"<td>{picture_html(image[None], name)}<span class='pale'>{below}</span></td>"
            for image, below in list(zip(images, said, strict=True))[:SHOWN_IMAGES]
        )
        body += f"<tr><td>{name}</td>{cells}</tr>"
    table = f"<table class='pictures'><tbody>{body}</tbody></table>"
    return (
        scrolled(table, "Extracted images and those nearest to them", "max-height: none")
        + "<p class='pale'>Below each image stands its similarity to the extracted one.</p>"
    )


SHOWN_IMAGES = 8
"""Extracted images that the page shows of a victim."""


def _mean(rows: Group, name: str) -> float:
    """0 where none has a value."""
    return statistics.fmean([row[name] for row in rows if row.get(name) is not None] or [0.0])
