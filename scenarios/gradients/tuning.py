"""Which settings serve an attack best, judged on public images alone?

Expect: the order of the settings, by mean squared error on public images that were held out, is about their order on
victims; the least error itself is a little too low, since it was chosen as the least. No victim's image is there to be
seen: the public images are shared out among the adversary, the clients and the victims of a federation of their own.
On windows of the same few photographs, which overlap, errors are too low.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.scenario import Row

if TYPE_CHECKING:
    from rich.table import Table

    from fedtap.simulator.data.images import Dataset
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.report.columns import Group
    from fedtap.simulator.report.page import Page


@dataclass(frozen=True)
class Tuning(ImageScenario):
    """A federation on public images alone; `fedtap tune` writes the attacks from a grid of their fields.

    Raises:
        FedtapError: the victims' images are to be of another dataset.
    """

    victims: int = 32
    attack: str = "coarse_git(rate=1e-3),coarse_git"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_dataset:
            raise FedtapError(
                "Attacks are tuned on public images alone, and --target-dataset names the victims': leave it out, or "
                "name a dataset whose public images are like them, --dataset."
            )

    def opened(self, data_root: Path) -> Dataset:
        """The dataset's public images, shared out as if they were a dataset; its other sides are not in it."""
        return public_alone(super().opened(data_root))

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """As of any image federation, of which all images are public."""
        return [*super().threat(leak), "All of this is a rehearsal: every image, also the victims', is a public one."]

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """With the attacks in order of their errors."""
        from fedtap.simulator.run import label_of

        page, shown = super().shown_on(page, rows)
        written = {label_of(attack, self.attacks): attack.written() for attack in self.attacks}
        if not (ranked := [one | {"attack": written[one["attack"]]} for one in ranking(rows)]):
            return page, shown
        best = f'Least error on public images that were held out: --attack "{ranked[0]["attack"]}"'
        return dataclasses.replace(
            page, answers=[best, *page.answers], beside=[_table(ranked, rows), *page.beside]
        ), shown


def public_alone(dataset: Dataset) -> Dataset:
    """The public images alone, each on one side: of each class three fifths auxiliary, then one train and one target.

    Raises:
        FedtapError: no class has five public images.
    """
    import torch

    from fedtap.simulator.data.images import Side

    public, parts = dataset.auxiliary, []
    for label in range(len(dataset.classes)):
        of_class = (public.labels == label).nonzero().flatten()
        fifth = len(of_class) // 5
        sizes = [len(of_class) - 2 * fifth, fifth, fifth]
        parts.append(of_class.split(sizes))  # type: ignore[no-untyped-call]
    # sorted, so that each side is in the dataset's own order
    sides = [torch.cat(some).sort().values for some in zip(*parts, strict=True)]
    if not len(sides[-1]):
        raise FedtapError(
            f"No class of {dataset.name} has five public images, so none can be held out to tune an attack on: use "
            "--dataset with more images."
        )
    auxiliary, train, target = (Side(public.images[some], public.labels[some]) for some in sides)
    return dataclasses.replace(dataset, auxiliary=auxiliary, train=train, target=target)


def ranking(rows: Sequence[Row]) -> list[Row]:
    """Each attack's mean MSE and median PSNR over victims and seeds, the least error first; attacks that failed on a
    victim come last, since a mean over the others would flatter them."""
    ranked = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        some = [row for row in own if row.get("mse") is not None]
        if some:
            ranked.append(
                {
                    "attack": attack,
                    "mse": statistics.fmean(row["mse"] for row in some),
                    "psnr": statistics.median(row["psnr"] for row in some),
                    "victims": len(some),
                    "failed": len(own) - len(some),
                }
            )
    return sorted(ranked, key=lambda one: (one["failed"] > 0, one["mse"]))


def _table(ranked: Sequence[Row], rows: Sequence[Row]) -> Table:
    """The ranking, and below it the blind guess, which is the mean of the public images that the adversary has."""
    from rich.table import Table

    table = Table("attack, the least error first", "MSE", "PSNR dB", "victims", box=None)
    blind = [decibels for row in rows for decibels in row.get("psnr_blind_images") or ()]
    guess = {"attack": "blind guess", "mse": statistics.fmean(10 ** (-one / 10) for one in blind)}
    guess |= {"psnr": statistics.median(blind), "victims": "", "failed": 0}
    for one in (*ranked, guess):
        failed = f" ({one['failed']} failed)" if one["failed"] else ""
        table.add_row(one["attack"], f"{one['mse']:.4g}", f"{one['psnr']:.1f}", f"{one['victims']}{failed}")
    return table
