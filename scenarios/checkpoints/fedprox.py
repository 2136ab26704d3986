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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.checkpoints.stationary import Case, TrainedModels, TrainedObserved
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Row, Scored, Session, Trial

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack


@dataclass(frozen=True)
class FedProx(TrainedModels):
    """Clients train once, to the end, from the same weights; the server looks at each.

    Raises:
        FedtapError: a regulariser that no client can train to the end with.
    """

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

    width: Annotated[int, Option("hidden units of a layer", 1, 4096, "model")] = sweep(8, 16, 32, 64, 128)
    depth: Annotated[int, Option("hidden layers", 1, 8, "model")] = 1
    activation: Annotated[
        Literal["relu", "tanh", "sigmoid", "softplus", "gelu"], Option("of the hidden units", group="model")
    ] = "tanh"
    examples: Annotated[int, Option("private examples of a client", 1, 1000, "data")] = 10
    features: Annotated[int, Option("numbers in an example", 1, 1000, "data")] = 10
    regulariser: Annotated[
        str, Option("fedprox(μ) or weight_decay(μ), beside the sum of the losses", group="federation")
    ] = "fedprox(0.05)"
    training: Annotated[
        Literal["lbfgs", "adam"], Option("how clients train: to the end, or 300 steps", group="federation")
    ] = "lbfgs"
    precision: Annotated[
        Literal["float64", "float32", "float16"], Option("in which weights travel back", group="federation")
    ] = "float64"
    attack: str = "stationary_mmd(rounds=1),stationary_mmd"

    def __post_init__(self) -> None:
        from fedtap.attackers.checkpoints.stationary_mmd import StationaryMMD
        from fedtap.simulator.models.regulariser import Regulariser

        regular = Regulariser.parse(self.regulariser)
        if regular.name == "max_margin":
            raise FedtapError(
                "No client trains to max_margin in finite time: write weight_decay(1e-4), which comes near."
            )
        object.__setattr__(self, "regulariser", str(regular))  # one spelling, for all who read it
        super().__post_init__()
        for attack in self.attacks:
            if isinstance(attack, StationaryMMD):  # before anyone trains
                attack.check_size(self.victims, self.trained.protocol, self.trained.entries)

    @property
    def trained(self) -> Case:
        """The options, as a case."""
        return Case(
            width=self.width,
            depth=self.depth,
            activation=self.activation,
            examples=self.examples,
            features=self.features,
            regulariser=self.regulariser,
            training=self.training,
            precision=self.precision,
        )

    def observe(self, session: Session) -> TrainedObserved:
        """One exchange; it goes on without a client that fails."""
        from fedtap.scenarios.checkpoints.exchange import trained_weights

        return trained_weights(session, self.trained, self.seed, failed={})

    def settled(self, attack: Attack[Any], label: str, observed: TrainedObserved) -> Row:
        """What is compared."""
        return {"width": self.width, "attack": attack.written(), "regulariser": self.regulariser}

    def score(self, trial: Trial) -> Scored:
        """A row for each client."""
        from fedtap.scenarios.checkpoints.scoring import rows_of_points

        assert isinstance(trial.observed, TrainedObserved)
        return Scored(rows_of_points(self.trained, self.seed, trial.observed, trial.reconstruction))

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Recovery against width, where that is swept: each client a dot, and their mean."""
        from fedtap.simulator.report.charts import Panel, Series, chart
        from fedtap.simulator.report.columns import grouped, setting

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
