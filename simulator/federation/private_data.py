"""Who holds which private data in an image federation: a pure function of (client, round)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.data.images import Dataset, Side, partition
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import SECURE, Federation, dataset_of


@dataclass(frozen=True)
class PrivateData:
    """Who holds what: a pure function of (client, round), the same for the client that trains and for the scorer.

    Clients 0 … `clients` - 1 are honest, client `clients` is the compromised one.
    """

    scenario: Federation
    dataset: Dataset
    clients: int

    def __post_init__(self) -> None:
        scenario, held = self.scenario, len(self.dataset.target)
        images = scenario.summed * scenario.batch
        if scenario.victims * images > held:
            what = "victims" if scenario.summed == 1 else f"sums of {scenario.summed} clients"
            cure = "" if scenario.summed == 1 else "--clients, "
            raise FedtapError(
                f"{scenario.victims} {what} with {images} images each need {scenario.victims * images}, and the "
                f"target data of {scenario.dataset} holds {held}: lower {cure}--victims or --batch."
            )
        if self.clients + 1 > len(self.dataset.train):
            raise FedtapError(
                f"{self.clients} clients and the compromised one cannot share {len(self.dataset.train)} training "
                f"images "
                f"of {scenario.dataset} so that each has one: lower --clients."
            )
        smallest = min(len(share) for share in self.shares)
        trained = scenario.batch_in(1) if scenario.rounds else 0
        beside = scenario.victims * scenario.summed % scenario.holders(self.clients)
        largest = max(trained, scenario.batch if beside or scenario.others in ("identical", "colluding") else 0)
        if largest > smallest:
            knob = "--training-batch" if trained == largest and scenario.training_batch else "--batch"
            raise FedtapError(
                f"A batch of {largest} is larger than the smallest client's data ({smallest} images): "
                f"lower {knob} or --clients{', or raise --alpha' if scenario.alpha else ''}."
            )
        if scenario.training_batch and not scenario.rounds:
            raise FedtapError("--training-batch is that of the training rounds, and there are none: add --rounds.")
        if scenario.auxiliary_source == "server" and scenario.threat_model not in ("curious_server", SECURE):
            raise FedtapError(
                f"A server that makes auxiliary pairs of its own knows the weights, and the {scenario.threat_model} "
                f"does "
                "not: use --threat-model curious_server, or leave out --auxiliary-source."
            )
        if scenario.pairs > self.most_pairs:
            raise FedtapError(
                f"{scenario.pairs:,} auxiliary pairs of {scenario.batch} images are more than the "
                f"{len(self.dataset.auxiliary):,} images on the auxiliary side of {scenario.dataset} and their mirror "
                f"images "
                f"give ({self.most_pairs:,}): lower --pairs."
            )
        if scenario.auxiliary_trainings > (scenario.pairs or self.most_pairs):
            raise FedtapError(
                f"{scenario.auxiliary_trainings} trainings are more than the auxiliary pairs, and each needs one at "
                f"least: "
                "lower --auxiliary-trainings, or raise --pairs."
            )
        if scenario.auxiliary_source == "server" and scenario.auxiliary_trainings:
            raise FedtapError(
                "The server's own auxiliary pairs are at the weights that it sends, and --auxiliary-trainings asks "
                "for others: leave "
                "out --auxiliary-source, and the compromised client drifts."
            )
        if scenario.auxiliary_source == "server" and scenario.defence != "none":
            raise FedtapError(
                f"The server's own auxiliary pairs are without the clients' defence, {scenario.defence}, so they teach "
                "another kind of gradient: leave out --auxiliary-source, and the compromised client defends them."
            )
        if scenario.local_samples > len(self.dataset.train):
            raise FedtapError(
                f"A victim cannot train on {scenario.local_samples} images of its own, since the training side of "
                f"{scenario.dataset} has {len(self.dataset.train)}: lower --local-samples."
            )
        if scenario.local_trainings > scenario.victims:
            raise FedtapError(
                f"{scenario.local_trainings} local trainings are more than there are victims, {scenario.victims}, "
                "each of which has one: lower --local-trainings, or raise --victims."
            )
        if (
            scenario.summed > 1
            and scenario.defence != "none"
            and any(attack.needs_auxiliary for attack in scenario.attacks)
        ):
            raise FedtapError(
                f"An auxiliary pair is defended once, and a sum of {scenario.summed} clients as many times, so the "
                f"pairs "
                "would teach another kind of gradient: leave out --defence, or the attacks that are trained."
            )
        if scenario.alpha and not scenario.rounds:
            raise FedtapError("--alpha shapes what the clients train on, and they do not train: add --rounds.")

    @property
    def most_pairs(self) -> int:
        """Auxiliary pairs that the public images and their mirror images make."""
        return 2 * len(self.dataset.auxiliary) // (self.scenario.batch * self.scenario.summed)

    @cached_property
    def shares(self) -> list[Int[Tensor, "images"]]:
        """Each client's part of the training side, the compromised one's last."""
        alpha = self.scenario.alpha or None
        return partition(self.dataset.train.labels, self.clients + 1, alpha, self.scenario.seed)

    def victim(self, client: int, rnd: int) -> int | None:
        """Which of the victims' batches this client holds in this round (from 1), if any."""
        attacked, holders = rnd - self.scenario.rounds - 1, self.scenario.holders(self.clients)
        number = attacked // self.scenario.repeats * holders + client
        batches = self.scenario.victims * self.scenario.summed
        return number if attacked >= 0 and client < holders and number < batches else None

    def conduct(self, client: int, rnd: int) -> str:
        """What this client does in this round: as an honest one, or as the scenario says of the others."""
        beside = rnd > self.scenario.rounds and 0 < client < self.clients
        return self.scenario.others if beside else "honest"

    def drift(self, victim: int) -> int:
        """Which of the `local_trainings` this victim has behind it, from 0."""
        return victim * self.scenario.local_trainings // self.scenario.victims

    def unshared(self, drift: int = 0) -> tuple[Float[Tensor, "images channel height width"], Int[Tensor, "images"]]:
        """What the victims of this drift train on before they share a gradient, as if they were one client."""
        if not drift:
            return self.dataset.train.batch(slice(self.scenario.local_samples))
        order = torch.randperm(len(self.dataset.train), generator=generator(self.scenario.seed, "drift", drift))
        return self.dataset.train.batch(order[: self.scenario.local_samples])

    def names(self) -> list[tuple[int, int]]:
        """(client, its first round) of each victim, in order; of a sum, its first client."""
        first, holders = self.scenario.rounds + 1, self.scenario.holders(self.clients)
        batches = range(0, self.scenario.victims * self.scenario.summed, self.scenario.summed)
        return [(batch % holders, first + batch // holders * self.scenario.repeats) for batch in batches]

    def behind(
        self, client: int, rnd: int
    ) -> tuple[Float[Tensor, "images channel height width"], Int[Tensor, "images"]]:
        """The images in [0, 1] and labels behind the answer of this name, those of all clients of a sum."""
        held = [self(client + other, rnd) for other in range(self.scenario.summed)]
        images, labels = (torch.cat(side) for side in zip(*held, strict=True))
        return images, labels

    def __call__(
        self, client: int, rnd: int
    ) -> tuple[Float[Tensor, "images channel height width"], Int[Tensor, "images"]]:
        """The images in [0, 1] and labels that `client` trains on in round `rnd`."""
        batch, victim = self.scenario.batch_in(rnd), self.victim(client, rnd)
        if victim is not None:
            return self.dataset.target.batch(torch.arange(victim * batch, (victim + 1) * batch))
        if self.conduct(client, rnd) == "identical":
            client = self.clients
        share = self.shares[client]
        size = min(batch, len(share))
        wanted = min(self.scenario.local_steps, len(share) // size) * size
        order = torch.randperm(len(share), generator=generator(self.scenario.seed, "private", client, rnd))
        return self.dataset.train.batch(share[order[:wanted]])


@lru_cache(maxsize=8)
def private_data(scenario: Federation, data_root: Path, clients: int) -> PrivateData:
    """The private data of a federation, kept for all messages of this process.

    Raises:
        FedtapError: the dataset cannot be opened or holds too little.
    """
    dataset = scenario.opened(data_root)
    victims = dataset.target
    if scenario.target_dataset:
        other = dataset_of(scenario.target_dataset, data_root, scenario.size)
        if other.shape != dataset.shape:
            cure = "one is grey and one in colour, so name another"
            if other.shape[0] == dataset.shape[0]:
                cure = "arrays keep their size, so bring the photographs to it, --size, or name another"
            raise FedtapError(
                f"The images of {scenario.target_dataset} are {'x'.join(map(str, other.shape))} and those of "
                f"{scenario.dataset} {'x'.join(map(str, dataset.shape))}, so one model cannot take both: {cure}."
            )
        victims = Side(other.target.images, other.target.labels % len(dataset.classes))
        dataset = dataclasses.replace(dataset, note=" ".join(filter(None, (dataset.note, other.note))))
    half = len(dataset.classes) // 2
    public = _of_classes(dataset.auxiliary, scenario.auxiliary_classes, half)
    victims = _of_classes(victims, scenario.target_classes, half)
    there = max(1, len(victims) // (scenario.batch * scenario.summed))
    if not scenario.chose("victims") and there < scenario.victims:
        scenario = dataclasses.replace(scenario, victims=there)
    return PrivateData(scenario, dataclasses.replace(dataset, auxiliary=public, target=victims), clients)


def _of_classes(side: Side, which: str, half: int) -> Side:
    """The images of all classes, of those below `half`, or of the others."""
    if which == "all":
        return side
    rows = ((side.labels < half) if which == "low" else (side.labels >= half)).nonzero().flatten()
    if not len(rows):
        raise FedtapError(
            f"There are no images of the {which} half of the classes, since the dataset has too few: give it two "
            f"classes."
        )
    return Side(side.images[rows], side.labels[rows])
