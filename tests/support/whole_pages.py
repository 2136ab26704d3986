"""Pages of whole runs, with every setting and attack that a scenario plays unless told otherwise, of made-up rows."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from fedtap.scenarios.checkpoints.vulnerability import SCORES
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.report.page import Page, html
from fedtap.simulator.run import label_of

MADE = ("secagg", "defences", "git", "vulnerability")


def made(name: str) -> str:
    """The page of such a run, in which some attacks did not converge, so that it begins with an alarm."""
    settings, draw = plan(name, {}), random.Random(0)
    rows = []
    for setting in settings:
        for attack in setting.attacks:
            swept = {field: getattr(setting, field) for field, _ in setting.swept}
            common = swept | {"attack": label_of(attack, setting.attacks), "seed": 0, "round": 1}
            if name == "vulnerability":
                rows.append(common | _case(setting, draw))
            else:
                rows += [common | _victim(setting, draw) | {"client": client} for client in range(setting.victims)]
    page = Page(name, settings[0].question, "", {}, {}, charts=dict(settings[0].charts(rows)))
    return html(*settings[0].shown_on(page, rows))


def _victim(setting: Any, draw: random.Random) -> dict[str, Any]:
    images = setting.clients if setting.threat_model == "secure_aggregation" else 1
    psnrs = [draw.uniform(8, 60) for _ in range(images)]
    levels = ["nothing" if psnr < 20 else "recognisable" for psnr in psnrs]
    return {
        **{field: getattr(setting, field) for field in ("model", "defence", "threat_model", "others")},
        **{"levels": levels, "psnr_images": psnrs, "psnr": sum(psnrs) / images, "psnr_blind": draw.uniform(10, 13)},
        **{"mse": 10 ** (-sum(psnrs) / images / 10), "unexplained": draw.uniform(0, 0.3), "error": None},
    }


def _case(setting: Any, draw: random.Random) -> dict[str, Any]:
    scores = {name: draw.uniform(0, 3) for name in SCORES}
    return dataclasses.asdict(setting.case) | scores | {"validation": setting.validation, "recovered": draw.random()}
