"""Do a client's trained weights show its data, when FedProx's pull holds them near the weights it was sent?

Expect: yes, where the model has more weights than the data have numbers. At the end of the training the pull
μ (θ - θ_global) is, to the sign, the sum of the examples' gradients, and the server knows it. Plain restarts find half
of ten examples at widths 64 and 128, and next to none at 16; restarts that are recombined find all there, and half at
16. Weights that travel as float32 show as much, and as float16 still most. Weight decay to zero hides the data: it
brings the first layer to rank 1, in which all data on a line look alike, and the points that explain the weights are
not the private ones. So do trainings that stop early; the rows say where the weights are no stationary point.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from flwr.serverapp import Grid

from fedtap.attackers import parse
from fedtap.attackers.checkpoints.stationary_mmd import StationaryMMD
from fedtap.clients.stationary import PRECISIONS, TRAININGS
from fedtap.scenarios.checkpoints.stationary import Case, Trained
from fedtap.scenarios.command.options import Knob
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.registry import ACTIVATIONS
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.columns import Column, grouped, setting
from fedtap.simulator.report.folder import Row
from fedtap.simulator.study import Outcome, rows_of_failed


@dataclass(frozen=True)
class FedProx(Trained):
    """One case, one attack."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("recovered", "share of examples with a point within 1 % of their length; 0 for random points"),
        Column("distance", "of an example to the nearest point, relative to its length, median"),
        Column("blind_distance", "that of random points"),
        Column("residual", "share of the regulariser's input gradient that the points leave"),
        Column("explained", "residual below 0.001 %", over="share"),
        Column("left", "share of its gradient at which the client stopped, as it says"),
        Column("unexplainable", "share that no points could explain"),
        Column("layer_rank", "of the first layer's weights"),
        Column("error", over="same"),
        *(Column(name, over="hidden") for name in ("blind", "one_label", "parameters")),
    )

    case: Case = Case()  # noqa: RUF009 - frozen
    attack: StationaryMMD = StationaryMMD()  # noqa: RUF009 - frozen

    @property
    def cases(self) -> Sequence[Case]:
        """The one."""
        return (self.case,)

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """One exchange, attacked."""
        failed: dict[int, str] = {}
        heard = self.hear(grid, part, 0, failed)
        guess = self.attack(heard.leak.to(device), seed=self.seed).on_cpu()
        told = {"width": self.case.width, "attack": self.attack.written(), "regulariser": self.case.regulariser}
        rows = [told | row for row in self.judged(self.case, heard, guess)]
        return Outcome(rows + rows_of_failed(failed, told), heard.leak)

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Recovery against width, where that is swept: each client a dot, and their mean."""
        widths = sorted({row["width"] for row in rows})
        series: list[Series] = []
        for some in grouped(rows, [setting("attack"), setting("regulariser")]):
            label = f"{some[0]['attack']}, {some[0]['regulariser']}"
            got = {width: [row["recovered"] for row in some if row["width"] == width] for width in widths}
            means = {width: statistics.fmean(shares) for width, shares in got.items() if shares}
            series.append(Series(label, [*means], [*means.values()], "smooth"))
            series.append(
                Series("", [row["width"] for row in some], [row["recovered"] for row in some], "pale", like=label)
            )
        if len(widths) < 2:
            return {}
        levels = {"random points": statistics.fmean(row["blind"] for row in rows)}
        panel = Panel("width", "share of examples recovered", series, levels=levels, share=True, ticks=widths)
        return {"Recovery against width": chart([panel], "share recovered against width")}


def scenario(
    *,
    width: Annotated[int, Knob("hidden units of a layer", 1, 4096)] = (8, 16, 32, 64, 128),  # type: ignore[assignment]
    depth: Annotated[int, Knob("hidden layers", 1, 8)] = 1,
    activation: Annotated[str, Knob("of the hidden units", choices=tuple(ACTIVATIONS))] = "tanh",
    examples: Annotated[int, Knob("private examples of a client", 1, 1000)] = 10,
    features: Annotated[int, Knob("numbers in an example", 1, 1000)] = 10,
    regulariser: Annotated[str, Knob("fedprox(μ) or weight_decay(μ), beside the sum of the losses")] = "fedprox(0.05)",
    training: Annotated[str, Knob("how clients train: to the end, or 300 steps", choices=TRAININGS)] = "lbfgs",
    precision: Annotated[str, Knob("in which weights travel back", choices=PRECISIONS)] = "float64",
    attack: Annotated[str, Knob("stationary_mmd, with its settings")] = ("stationary_mmd(rounds=1)", "stationary_mmd"),  # type: ignore[assignment]
    victims: Annotated[int, Knob("clients, each attacked", 1, 1000)] = 4,
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> FedProx:
    """Clients train once, to the end, from the same weights; the server looks at each."""
    regular = Regulariser.parse(regulariser)
    if regular.name == "max_margin":
        raise FedtapError("No client trains to max_margin in finite time: write weight_decay(1e-4), which comes near.")
    (found, *others) = parse(attack)
    if others or not isinstance(found, StationaryMMD):
        raise FedtapError(f"--attack {attack} is none on a trained model's weights: write stationary_mmd.")
    case = Case(width, depth, activation, examples, features, str(regular), training, precision)
    found.check_size(victims, case.protocol, case.entries)  # before anyone trains
    return FedProx(case=case, attack=found, victims=victims, seed=seed)
