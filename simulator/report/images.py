"""Rows about images: their columns, curves, answers and alarms. A row is what one attack made of one victim."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import (
    Alarm,
    Column,
    Group,
    Html,
    follows,
    grouped,
    label,
    setting,
    settings,
    telling,
)
from fedtap.simulator.report.defences import BLIND, attacker, epsilon_shown, price, rounded, section, trade_table
from fedtap.simulator.report.outcomes import median, outcome, psnrs, ranged
from fedtap.simulator.report.page import Page
from fedtap.simulator.scores import LEVELLED
from fedtap.simulator.wire.soundness import CAUSES, EXPLAINED

_HIDDEN = (
    *("recovered", "recognisable", "psnr_images", "psnr_blind_images", "ssim_note", "lpips_note", "drift_norm"),
    *("adaptive", "strongest", "upper_bound_psnr", "overhead", "held_out", "accuracy_lost", "fit_seconds"),
    *("delta", "adjacency", "sensitivity", "epsilon_note", "releases", "not_covered", "canaries", "exchanges"),
    *("success", "success_low", "success_high", "success_db", "trials", "broken_mechanism"),
)
"""What a row holds beside settings and columns: details, and what is told with another value."""

SENTENCES = 8
"""Settings of an attack that its answer names one by one."""

_LINES, _MOST_LINES = 6, 24
"""Attacks and settings from which on a chart shows them one below the other, since of fewer the pictures tell more; and
lines up to which it does."""

UNCONVERGED = 0.1
"""Share of an undefended gradient, left unexplained, above which an attack did not converge."""

CERTIFIED = "share of victims whose images, without a look at the truth, cause the gradient to the wire's precision"

GENIE = (
    "the MSE that one expects who knows the weights, the label, the gradient's derivative at the true image and no "
    "more than mean and covariance of public images"
)

DOTS = "the mark is a blind guess, and what is over 60 dB stands at the end"

CAUTION = "An attack that fails shows that this attack fails here: it does not show that the data are private."


def image_columns(rows: Group) -> tuple[Column, ...]:
    """The columns of these rows. ε is one of them where it is asked for, and else follows from the defence."""
    asked = any("success" in row for row in rows)
    pairs = {(epsilon_shown([row]), str(row.get("defence"))) for row in rows}
    epsilons = {epsilon for epsilon, _ in pairs}
    varies = asked and len(epsilons) > 1
    guarantee = (
        Column("epsilon_all", "", "ε of all exchanges", of=_all, page=True),
        Column("protects", "", "ε is for", of=_protected, page=True),
        Column("defence", over="same", page=True),  # ε stands for it, as its numbers are long
    )
    alone = [] if len({row.get("seed") for row in rows}) > 1 else ["seed"]
    hidden = [*_HIDDEN, *["epsilon_all", "protects"] * (not asked), *alone]
    attacked = not rows or any("attack" in row for row in rows)
    measure = outcome(rows).measure if attacked else "trials won"
    images = ["share of images, with its 95 % interval (Clopper-Pearson)"] * attacked
    trials = ["share of trials won, with one-sided limits that are wrong in one honest run of 10,000"]
    back = ", or ".join(images + trials * any("trials" in row for row in rows))
    middle = "median over images, with its 95 % interval (order statistics, of few the least and the largest)"
    left = f"share of the gradient that the reconstruction does not cause; over {EXPLAINED:g} it is {CAUSES}"
    return (
        Column("epsilon", "of the attacked exchanges", "ε", over="same" if varies else "hidden", of=epsilon_shown),
        *[Column("sigma", "", "σ", ".3g", "median" if asked else "hidden")] * any("epsilon" in row for row in rows),
        Column("attack", over="same", of=attacker),
        *(Column(name, over="rows") for name in ("client", "round", "seed") if name not in hidden),
        Column("dots", DOTS, "PSNR of each image (0–60 dB)", over="group", of=_dots, page=True),
        Column("n", "victims (× images of each)" + ", or trials" * asked, over="group", of=_count),
        Column("levels", back, measure, over="group", of=_back),
        Column("levels", "", measure, ".0%", "rows", _own),
        Column("identical", form=".0%", of=_identical, page=asked),
        Column("psnr", middle, "PSNR dB", of=lambda some: ranged(psnrs(some))),
        BLIND,
        Column("accuracy", "of the trained model, on test images", "", ".0%", "median" if asked else "rows"),
        Column("bound", "on the share, where a prior is known, as of canaries: 2302.07225", "", ".3f"),
        Column("bound_renyi", "another bound: 2201.04845", "Rényi", ".3f", page=attacked),
        Column("expected", "what the optimal attacker expects of these canaries", "best", ".3f", page=attacked),
        Column("mse", "mean over victims, whose PSNR is -10 log10(MSE)", "MSE", ".2g", "mean", page=True),
        *[Column("genie_mse", GENIE, "genie MSE", ".2g", "mean", page=True)] * any("genie_mse" in row for row in rows),
        Column("ssim", "", "SSIM", ".3f", page=True),
        Column("lpips", "", "LPIPS", ".3f", page=True),
        *[Column("certified", CERTIFIED, over="share")] * any("certified" in row for row in rows),
        Column("label_correct", "share that is right", "label", ".0%", "mean", page=asked),
        Column("unexplained", left, "left", ".0e", page=asked),
        Column("objective", "the attack's own, lower is better", "", ".2g", "rows"),
        Column("seconds", "for each victim", "", ".2f", "mean", page=True),
        *guarantee[: 2 * asked + (asked and len(pairs) == len(epsilons))],
        *(Column(name, over="rows") for name in ("labels", "adaptive_note", "doubts", "error")),
        *(Column(name, over="hidden") for name in hidden),
    )  # fmt: skip


def _count(rows: Group) -> str:
    images, failed = outcome(rows).images, sum(bool(row.get("error")) for row in rows)
    each = f"×{images // (len(rows) - failed)}" if images > len(rows) - failed else ""
    return str(rows[0].get("trials") or f"{len(rows)}{each}") + (f" ({failed} failed)" if failed else "")


def _back(rows: Group) -> str:
    back, first = outcome(rows), rows[0]
    if "trials" not in first:
        return Alarm(back) if back.won else str(back)
    words = "{success:.3f} [{success_low:.3f}–{success_high:.3f}]".format(**first)
    return Alarm(words) if first["success_low"] > first["bound"] else words


def _own(rows: Group) -> str | float | None:
    return _back(rows) if "trials" in rows[0] else outcome(rows).share


def _identical(rows: Group) -> float | None:
    back = outcome(rows)
    return None if back.identical is None or not back.images else back.identical / back.images


def _dots(rows: Group) -> str | None:
    """A dot for each image on a line from 0 to 60 dB, and a mark at the blind guess."""
    if not psnrs(rows):
        return None
    blind = [f"<b style='left:{_percent(value)}'></b>" for value in {median(psnrs(rows, "psnr_blind"))} - {None}]
    dots = (  # at several heights, so that equal ones do not hide each other
        f"<i style='left:{_percent(value)};top:{6 + number * 7 % 15}px'></i>"
        for number, value in enumerate(psnrs(rows))
    )
    return Html(f"<span class='dots'>{''.join((*blind, *dots))}</span>")


def _percent(decibels: float | None) -> str:
    return f"{100 * min(max((decibels or 0.0) / 60, 0.0), 1.0):.1f}%"


def _all(rows: Group) -> str | None:
    first = rows[0]
    return f"{rounded(first['epsilon_all'])} ({first['releases']})" if "releases" in first else None


def _protected(rows: Group) -> str | None:
    first = rows[0]
    if "protects" not in first:
        return None
    whom = "an example" if first["protects"] == "example" else "a client"
    far = "no clip" if first["sensitivity"] is None else f"sensitivity {rounded(first['sensitivity'])}"
    return f"{whom}, {first['adjacency']}, {far}"


def chosen(rows: Group) -> list[Column]:
    """The settings that vary, ε among them where it is asked for."""
    known = image_columns(rows)
    return [*(column for column in known if column.name == "epsilon" and column.over == "same"), *settings(rows, known)]


def answers(rows: Group) -> list[str]:
    """A sentence for each attack, made of the rows alone; none where there is no truth to score them against."""
    keys, attacks = chosen(rows), grouped(rows, [setting("attack")])
    attacks = [some for some in attacks if outcome(some).images or any(row.get("error") for row in some)]
    if len(attacks) > SENTENCES and all(len(grouped(some, keys)) == 1 for some in attacks):
        return _by_share(attacks)
    return [_answer(some, keys) for some in attacks]


def _by_share(attacks: Sequence[Group]) -> list[str]:
    """A sentence for all attacks that brought back as many images, the most first: too many for one each."""
    found: dict[tuple[float, int], list[Group]] = {}
    for some in attacks:
        back = outcome(some)
        found.setdefault((-1.0 if back.share is None else back.share, back.images), []).append(some)
    said = []
    for (share, _), equal in sorted(found.items(), reverse=True):
        middles, back = [median(psnrs(some)) for some in equal], outcome(equal[0])
        names = ", ".join(
            some[0]["attack"] + ("" if middle is None else f" ({middle:.1f} dB)")
            for some, middle in zip(equal, middles, strict=True)
        )
        low, high = (f"{100 * end:.0f}" for end in back.interval) if back.images else ("", "")
        images = "images" if back.images > 1 else "image"
        what = f"{back.won} of {back.images} {images} {back.measure} (95 % interval {low}–{high} %)"
        said.append(f"{what if share >= 0 else 'No result'}: {names}.")
    blinds = [value for some in attacks if (value := median(psnrs(some, "psnr_blind"))) is not None]
    return [
        *said,
        *[f"Blind guess: {statistics.median(blinds):.1f} dB; figures in brackets are medians."] * bool(blinds),
    ]


def _answer(rows: Group, keys: Sequence[Column]) -> str:
    attack, failed = rows[0]["attack"], sum(bool(row.get("error")) for row in rows)
    lost = f"; {failed} {'victim' if failed == 1 else 'victims'} without a result" if failed else ""
    groups = [some for some in grouped(rows, keys) if outcome(some).images]
    if not groups:
        return f"{attack}: no result{lost}."
    names = telling([key for key in keys if len({key.cell(some) for some in groups}) > 1], groups)
    blinds = sorted(value for some in groups if (value := median(psnrs(some, "psnr_blind"))) is not None)
    ends = dict.fromkeys(f"{value:.1f}" for value in (*blinds[:1], *blinds[-1:]))
    blind, measure = f" (blind guess {'–'.join(ends)} dB)" * bool(ends), outcome(rows).measure
    backs, middles = [outcome(some) for some in groups], [median(psnrs(some)) for some in groups]
    counted = [f"{back.won} of {back.images} {'images' if back.images > 1 else 'image'}" for back in backs]
    if len(groups) == 1:
        low, high = (f"{100 * end:.0f}" for end in backs[0].interval)
        same = "" if backs[0].identical is None else f", {backs[0].identical} of them identical"
        decibels = "" if middles[0] is None else f"; median {middles[0]:.1f} dB{blind}"
        return f"{attack}: {counted[0]} {measure} (95 % interval {low}–{high} %){same}{decibels}{lost}."
    where = [label(some, names) or "otherwise" for some in groups]
    if len(groups) > SENTENCES:
        ranked = sorted(range(len(groups)), key=lambda at: (backs[at].share or 0.0, middles[at] or 0.0))
        least, most = ranked[0], ranked[-1]
        span = f"{counted[least]} ({where[least]}) to {backs[most].won} of {backs[most].images} ({where[most]})"
        return f"{attack}: over {len(groups)} settings from {span} {measure}{blind}{lost}."
    words = ["" if middle is None else f", {middle:.1f} dB" for middle in middles]
    shares = (f"{back.won} of {back.images}{middle}" for back, middle in zip(backs, words, strict=True))
    each = "; ".join(f"{one}: {share}" for one, share in zip(where, shares, strict=True))
    return f"{attack}, images {measure}{blind}: {each}{lost}."


def _unexplained(rows: Group) -> tuple[str, bool]:
    """A sentence on how much of the gradients is left unexplained, empty where that is little; and whether an attack
    on an undefended gradient did not converge, so that it is an alarm."""
    known = [row for row in rows if row.get("unexplained") is not None]
    many = sum(row["unexplained"] > EXPLAINED for row in known)
    far = [row for row in known if row.get("defence") == "none" and row["unexplained"] > UNCONVERGED]
    plain = f"{many} of {len(known)} reconstructions leave more than {EXPLAINED:.2%} of the gradient unexplained"
    worst = " and ".join(
        f"{some[0]['attack']} did not converge on {len(some)} {'victim' if len(some) == 1 else 'victims'}"
        for some in grouped(far, [setting("attack")])
    )
    if far:
        plain = (
            f"{worst}: more than {UNCONVERGED:.0%} of the undefended gradient is left unexplained there, so that its "
            f"failure says nothing of what the gradient tells. In all, {plain}"
        )
    return f"{plain}: {CAUSES}." if many else "", bool(far)


def alarms(rows: Group) -> list[str]:
    """What has to be known before a figure of these rows is believed; nothing of a sound run."""
    sentence, alarm = _unexplained(rows)
    doubted = (f"The gradient is doubted: {row['doubts']}" for row in rows if row.get("doubts"))
    return [*[sentence] * alarm, *dict.fromkeys(doubted)]


def notes(rows: Group) -> list[str]:
    """Why scores are empty, what attacks do not know, and what is left unexplained: each reason once."""
    sentence, alarm = _unexplained(rows)
    empty = dict.fromkeys(str(row[name]) for name in ("ssim_note", "lpips_note") for row in rows if row.get(name))
    unknown = dict.fromkeys(f"{row['attack']} {row['adaptive_note']}" for row in rows if row.get("adaptive_note"))
    return [*empty, *unknown, *[sentence] * (bool(sentence) and not alarm)]


def page_of(page: Page, rows: Group) -> tuple[Page, Group]:
    """The page with all that these rows tell, and those of them that its tables show."""
    attacked, shown = ([row for row in rows if names & row.keys()] for names in ({"attack"}, {"attack", "trials"}))
    return dataclasses.replace(
        page,
        columns=image_columns(shown),
        charts={**page.charts, **price(rows), **section(rows), **curves(attacked)},
        answers=answers(attacked),
        alarms=alarms(attacked),
        notes=[*page.notes, *[LEVELLED, CAUTION] * bool(attacked), *notes(attacked)],
        beside=[compared] if (compared := trade_table(rows)) else [],
    ), shown


def curves(rows: Group) -> dict[str, str]:
    """PSNR against each setting that varies over numbers, and then MSE."""
    keys, charts, errors, attack = chosen(rows), dict[str, str](), dict[str, str](), setting("attack")
    groups = grouped([row for row in rows if row.get("mse") is not None and psnrs([row])], [attack, *keys])
    for key in keys:
        others = [other for other in keys if other != key and not follows(other, [attack, key], groups)]
        lines: dict[str, list[tuple[float, Group]]] = {}
        for some in groups:
            if (value := _number(key.cell(some))) is not None:
                lines.setdefault(label(some, [attack, *others]), []).append((value, some))
        ticks = sorted({value for points in lines.values() for value, _ in points})
        if len(ticks) < 2:
            continue
        quality, error = [], []
        counts = {len(psnrs(some)) for points in lines.values() for _, some in points}
        for name, points in lines.items():
            points.sort(key=lambda point: point[0])
            at = [value for value, _ in points]
            low, middle, high = zip(*(_quartiles(psnrs(some)) for _, some in points), strict=True)
            quality.append(Series(name, at, middle, low=low, high=high))
            error.append(Series(name, at, [statistics.fmean(row["mse"] for row in some) for _, some in points]))
        blinds = [value for some in groups if (value := median(psnrs(some, "psnr_blind"))) is not None]
        levels = {"blind guess": statistics.median(blinds)} if blinds else {}
        psnr, mse = (f"{name} against {key.title}" for name in ("PSNR", "MSE"))
        of = f"{key.title} ({'–'.join(map(str, sorted({min(counts), max(counts)})))} images a point)"
        charts[psnr] = chart(
            [Panel(of, "PSNR, dB (median, quartiles)", quality, levels=levels, ticks=ticks)], psnr, 3.6
        )
        errors[mse] = chart([Panel(of, "MSE (mean)", error, log=True, ticks=ticks)], mse, 3.6)
    return charts | errors or _lines(groups, keys)


def _lines(groups: Sequence[Group], keys: Sequence[Column]) -> dict[str, str]:
    """A line for each setting with the medians of its attacks, or for each attack with its images; nothing of few."""
    attack = setting("attack")
    names = telling([key for key in keys if key.name != "attack" and not follows(key, [attack], groups)], groups)
    attacks = list(dict.fromkeys(some[0]["attack"] for some in groups))
    where = [names[0].cell(some) if len(names) == 1 else label(some, names) or "otherwise" for some in groups]
    lines = list(dict.fromkeys(where)) if names else attacks
    if len(groups) < _LINES or len(lines) > _MOST_LINES:
        return {}
    blinds = [value for some in groups if (value := median(psnrs(some, "psnr_blind"))) is not None]
    mark, images = (statistics.median(blinds) if blinds else None), sorted({len(psnrs(some)) for some in groups})
    many = "–".join(map(str, dict.fromkeys((images[0], images[-1]))))
    series = []
    if names:
        for number, name in enumerate(attacks):
            own = [(some, line) for some, line in zip(groups, where, strict=True) if some[0]["attack"] == name]
            lower = 0.5 * (number + 0.5) / len(attacks) - 0.25  # so that equal ones do not hide each other
            points = [(statistics.median(psnrs(some)), lines.index(line) + lower) for some, line in own]
            series.append(Series(name, *unzipped(points), "dots"))
    else:
        each = [(value, lines.index(some[0]["attack"])) for some in groups for value in psnrs(some)]
        series.append(Series("an image", *unzipped(each), "pale"))
        middles = [(statistics.median(psnrs(some)), lines.index(some[0]["attack"])) for some in groups]
        series.append(Series("median", *unzipped(middles), "open"))
    said = f"PSNR, dB ({f'median of {many} images' if names else f'{many} images'}; dashed: blind guess)"
    heading = f"PSNR of each {'setting' if len(names) > 1 else names[0].title if names else 'attack'}"
    panel = Panel(said, "", series, mark=mark, row_names=lines)
    return {heading: chart([panel], heading, 1.3 + 0.175 * len(lines))}


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles([*values, *values[:1]][: max(2, len(values))], method="inclusive")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
