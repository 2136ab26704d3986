"""The image federation: honest clients and a compromised one train a classifier, and their updates are attacked.

Victim v is honest client `v % clients` in the attacked round `v // clients` (and in as many rounds after it as it
repeats itself); its private batch is the v-th of the target data. Behind secure aggregation a victim is a sum of
clients, that of the v-th attacked round.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.options import ImageSize, ImageSource, Option, WeightsFile, WeightsSeed
from fedtap.simulator.scenario import Observations, Observed, Row, Scenario, Scored, Session, Trial

if TYPE_CHECKING:
    from torch import Tensor

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.auxiliary import Auxiliary
    from fedtap.simulator.data.images import Dataset
    from fedtap.simulator.federation.private_data import PrivateData
    from fedtap.simulator.federation.rounds import Heard
    from fedtap.simulator.leaks import Leak, Protocol
    from fedtap.simulator.report.columns import Group
    from fedtap.simulator.report.page import Page

Half = Literal["all", "low", "high"]
"""Which classes: all, or a half of them."""

Threat = Literal["curious_server", "eavesdropper", "secure_aggregation"]
"""Who observes."""

OTHERS = ("honest", "silent", "identical", "colluding")
"""What a round's other clients do beside the victim: as it does; send zero; send what the compromised client sends; or
tell the server what they send."""

THREATS = {
    "curious_server": "A curious server follows the protocol and keeps what it observes. It knows the weights it sent.",
    "eavesdropper": "An eavesdropper sees what each client sends, and knows the architecture but not the weights.",
    "secure_aggregation": "A server behind secure aggregation knows the weights it sent, and observes of each round "
    "the "
    "sum of what its clients send; from that it takes what its compromised client sends, and what it is told by others "
    "that collude.",
}

SECURE = "secure_aggregation"

FEWEST = 2
"""Clients in a sum that secure aggregation gives away, at least: as in Flower's SecAgg+."""

PAIRS = 10_000
"""Auxiliary pairs where no number is named and the data give as many, mirror images included."""


@dataclass(frozen=True)
class ImageObserved(Observed):
    """What was observed of an image federation, and what its scorer needs."""

    private: PrivateData = dataclasses.field(kw_only=True)
    heard: Heard = dataclasses.field(kw_only=True)

    @cached_property
    def truths(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of each victim in the leak, for the scorer alone."""
        return [self.private.behind(*name) for name in self.names]

    @cached_property
    def baseline(self) -> Tensor:
        """The blind guess: one image."""
        import torch

        from fedtap.simulator import scores

        public = self.private.dataset.auxiliary
        return scores.blind(public.batch(torch.arange(len(public)))[0])


@dataclass(frozen=True)
class Federation(Scenario):
    """Settings of an image federation.

    Raises:
        FedtapError: a sum of clients that cannot be attacked, or others beside a victim that is observed by itself.
    """

    dataset: ImageSource = "photos"
    size: ImageSize = 32
    target_dataset: Annotated[
        str, Option("where the victims' images are from, if from another dataset", group="data", file=True)
    ] = ""
    target_classes: Annotated[Half, Option("classes of the victims' images, or a half of them", group="data")] = "all"
    model: Annotated[
        str, Option("mlp, lenet, convnet, resnet20, vit, or module:function of your own", group="model")
    ] = "lenet"
    batchnorm: Annotated[
        Literal["train", "eval"],
        Option("clients' BatchNorm: by the batch's own statistics, or by the running ones", group="model"),
    ] = "train"
    weights: WeightsFile = ""
    weights_seed: WeightsSeed = 1234
    victims: Annotated[int, Option("how many clients' replies are attacked", 1, 10**6, group="federation")] = 8
    clients: Annotated[
        int,
        Option(
            "honest clients beside the compromised one; 0: as many as nodes, or one a victim",
            0,
            10**6,
            "federation",
        ),
    ] = 0
    batch: Annotated[int, Option("private images in each local step", 1, group="federation")] = 1
    local_steps: Annotated[int, Option("local steps of SGD before a client replies", 1, 10**6, group="federation")] = 1
    learning_rate: Annotated[float, Option("learning rate of the clients' SGD", 1e-6, 1e3, "federation")] = 0.1
    rounds: Annotated[int, Option("rounds of training before the attacked ones", 0, 10**6, group="federation")] = 0
    training_batch: Annotated[
        int, Option("private images in each local step of those rounds; 0: --batch", 0, group="federation")
    ] = 0
    alpha: Annotated[
        float, Option("Dirichlet concentration of classes in clients' training data; 0: IID", 0.0, 1e6, "federation")
    ] = 0.0
    repeats: Annotated[
        int,
        Option("rounds in which a victim sends the same batch at the same weights, for a mean", 1, group="federation"),
    ] = 1
    local_samples: Annotated[
        int, Option("images of its own that a victim trains on before it shares a gradient", 0, group="federation")
    ] = 0
    local_epochs: Annotated[int, Option("times that it trains on all of them", 1, 10**6, group="federation")] = 1
    local_trainings: Annotated[
        int,
        Option("such trainings, on other images each, among the victims; 1: all have the same", 1, group="federation"),
    ] = 1
    threat_model: Annotated[Threat, Option("who observes", group="attack")] = "curious_server"
    defence: Annotated[
        str, Option("none, or what `fedtap list` names, joined by +: clip(1.0)+noise(0.01)", group="defence")
    ] = "none"
    pairs: Annotated[
        int,
        Option("auxiliary pairs; 0: the public images and their mirror images, 10,000 at most", 0, group="auxiliary"),
    ] = 0
    auxiliary: Annotated[
        str,
        Option(
            "folder of saved auxiliary pairs, used if there and made if not",
            group="auxiliary",
            file=True,
            made=True,
            single=True,
        ),
    ] = ""
    auxiliary_source: Annotated[
        Literal["compromised_client", "server"], Option("who computes the pairs' gradients", group="auxiliary")
    ] = "compromised_client"
    auxiliary_classes: Annotated[
        Half, Option("classes of the auxiliary images, or a half of them", group="auxiliary")
    ] = "all"
    auxiliary_labels: Annotated[
        Literal["own", "random"],
        Option("labels of the auxiliary images: random ones of all classes, or their own", group="auxiliary"),
    ] = "random"
    auxiliary_trainings: Annotated[
        int, Option("trainings of the compromised client, to take pairs along; 0: none", 0, group="auxiliary")
    ] = 0
    auxiliary_at: Annotated[
        Literal["now", "start"],
        Option("when: at the weights in force, or at those before any training", group="auxiliary"),
    ] = "now"
    others: str = "honest"
    """What the clients beside a victim do in an attacked round; only behind secure aggregation does it matter."""
    delta: float | None = None
    """δ at which the rows tell the defence's ε, and how often an attack succeeded; None: they do not."""
    success_db: float | None = 0.0
    """PSNR from which an image counts as a success, there; 0: a recognisable one; None: they tell ε alone."""
    accuracy_loss: float = 0.0
    """Share of the test images that a defence may cost the trained model. Of the settings that differ in the defence's
    strength alone, the one that comes nearest to it is attacked; 0: each is."""

    def __post_init__(self) -> None:
        from fedtap.simulator.defences.notation import described, written

        object.__setattr__(self, "defence", written(described(self.defence)))  # one spelling, for all who read it
        self.check_sum()

    def check_sum(self) -> None:
        """Refuse a sum of clients that cannot be attacked, and others that are observed by themselves.

        Raises:
            FedtapError: with the option to change.
        """
        if self.others not in OTHERS:
            raise unknown("kind of others", self.others, OTHERS)
        if self.threat_model != SECURE:
            if self.others != "honest":
                raise FedtapError(
                    f"The {self.threat_model} observes each client by itself, so it does not matter to it that the "
                    f"others are {self.others}: add --threat-model {SECURE}."
                )
            return
        if self.clients < FEWEST:
            raise FedtapError(
                f"Secure aggregation gives away no sum of {self.clients or 'an unknown number of'} clients: "
                f"say how many are summed, --clients N, at least {FEWEST}."
            )
        if self.repeats > 1:
            raise FedtapError(
                "Replies that repeat themselves are averaged client by client, and behind secure aggregation no client "
                "is observed by itself: leave out --repeats, or --threat-model."
            )
        if self.local_steps > 1 and self.summed > 1:
            raise FedtapError(
                f"The sum of {self.summed} clients' updates is not what {self.local_steps} local steps on one batch "
                f"give, "
                "which attacks look for: use --local-steps 1."
            )

    @property
    def summed(self) -> int:
        """Clients whose images are behind one answer that is attacked."""
        return self.clients if self.threat_model == SECURE and self.others == "honest" else 1

    def holders(self, clients: int) -> int:
        """Honest clients that hold a victim's images in an attacked round."""
        return self.summed if self.threat_model == SECURE else clients

    @property
    def architecture(self) -> str:
        """The model's name, with what a defence puts into it."""
        from fedtap.simulator.defences.notation import described

        parts = [part for part in described(self.defence) if part.hook == "model"]
        return self.model + "".join(f"+{part}" for part in parts)

    def protocol(self, dataset: Dataset) -> Protocol:
        """The public terms of an attacked exchange."""
        from fedtap.simulator.leaks import Protocol

        return Protocol(
            model=self.architecture,
            shape=dataset.shape,
            classes=len(dataset.classes),
            batch=self.batch * self.summed,
            local_steps=self.local_steps,
            learning_rate=self.learning_rate,
            defence=self.defence,
            threat_model=self.threat_model,
            summed=self.summed,
            batchnorm=self.batchnorm,
        )

    def batch_in(self, rnd: int) -> int:
        """Images in a local step of this round (from 1)."""
        return self.training_batch or self.batch if rnd <= self.rounds else self.batch

    def attacked_rounds(self, clients: int) -> int:
        """Rounds it takes until every victim has answered as often as it does."""
        return -(-self.victims * self.summed // self.holders(clients)) * self.repeats

    @property
    def nodes(self) -> int:
        """The honest clients, and the compromised one."""
        return (self.clients or self.victims) + 1

    @property
    def any_nodes(self) -> bool:
        """Where no number of clients is named, victims are attacked in as many rounds as it takes."""
        return not self.clients

    def opened(self, data_root: Path) -> Dataset:
        """The dataset.

        Raises:
            FedtapError: it cannot be opened.
        """
        return dataset_of(self.dataset, data_root, self.size)

    def check(self, settings: Sequence[Scenario]) -> None:
        """Refuse also a defence whose ε is not known where it is asked for, and auxiliary data of no use."""
        from fedtap.simulator.federation.equal_loss import undefended
        from fedtap.simulator.federation.guarantees import promised

        super().check(settings)
        promised(self)
        for attack in self.attacks:
            attack.check_auxiliary(self.auxiliary_trainings)
        if self.accuracy_loss:
            undefended(settings, self)  # type: ignore[arg-type]

    @property
    def compares(self) -> bool:
        """Where a loss of accuracy is agreed on, by which defences are chosen."""
        return bool(self.accuracy_loss)

    def compared(self, number: int, settings: Sequence[Any], observed: Observations) -> Row | None:
        """What the defence costs; None unless it comes nearest to the loss of accuracy that is agreed on."""
        from fedtap.simulator.federation.equal_loss import equal_loss

        return equal_loss(number, settings, observed) if self.accuracy_loss else {}

    def unattacked(self, number: int, settings: Sequence[Any], observed: Observations) -> list[Row]:
        """What the defence costs at this strength, if the model was trained with it."""
        from fedtap.simulator.federation.equal_loss import tried

        return tried(number, settings, observed)

    def observe(self, session: Session) -> ImageObserved:
        """Rounds of training, then the attacked ones."""
        from fedtap.simulator.federation.private_data import private_data
        from fedtap.simulator.federation.rounds import clients_on, play
        from fedtap.simulator.leaks import stack

        private = private_data(self, session.data_root, clients_on(session.grid, self))
        heard = play(self, session.grid, private, session.number, keep=session.keep)
        fewer = ""
        if private.scenario.victims < self.victims:
            fewer = f"{self.dataset} has images for {private.scenario.victims} victims and not for {self.victims}."
            warnings.warn(fewer, stacklevel=2)
        names = private.names()
        leaks = [heard.leaks[name] for name in names if name in heard.leaks]
        return ImageObserved(
            leak=stack(leaks) if leaks else None,
            missing={name: heard.why_missing(*name) for name in names if name not in heard.leaks},
            notes=[note for note in (private.dataset.note, fewer) if note],
            private=private,
            heard=heard,
        )

    def auxiliary_pairs(self, session: Session, observed: ImageObserved) -> Auxiliary:
        """Those of the folder that is named, or what the compromised client computes now."""
        from fedtap.simulator.federation.auxiliary_pairs import auxiliary_pairs

        return auxiliary_pairs(self, session, observed)

    def settled(self, attack: Attack, label: str, observed: ImageObserved) -> Row:
        """Settings, what the defence guarantees, and every score, empty."""
        from fedtap.simulator.federation.scoring import settled

        return settled(self, attack, label, observed)

    def score(self, trial: Trial) -> Scored:
        """Image by image, beside the blind guess."""
        from fedtap.simulator.federation.scoring import score_images

        return score_images(self, trial)

    def finished(self, rows: list[Row]) -> list[Row]:
        """With the share of images that came back, where success is asked for."""
        from fedtap.simulator.federation.guarantees import success_of

        if self.delta is None or self.success_db is None:
            return rows
        share = success_of(rows)
        return [row | share for row in rows]

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """With answers, alarms, curves, and the price of privacy where it is asked for."""
        from fedtap.simulator.report.images import page_of

        return page_of(page, rows)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """The threat model, and what every client of the federation does."""
        from fedtap.simulator.federation.scoring import threat

        return threat(self, leak)


@lru_cache(maxsize=2)
def dataset_of(name: str, data_root: Path, size: int) -> Dataset:
    """The named dataset, kept open."""
    from fedtap.simulator.data.images import open_dataset

    return open_dataset(name, data_root, size)
