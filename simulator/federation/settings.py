"""A scenario: one question, played with these settings; and who holds which private data in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.simulator.attack import Attack, Reconstruction, generator
from fedtap.simulator.data.images import Dataset, Side, open_dataset, partition
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.leaks import Protocol
from fedtap.simulator.wire.threat_models import FEWEST, OTHERS, SECURE

SOURCES = ("compromised_client", "server")
"""Who may compute auxiliary pairs: the client that the adversary feeds, or the server, which knows the weights."""

CLASSES = ("all", "low", "high")
"""Which classes: all, or a half of them."""

LABELS = ("own", "random")
"""What practice examples may be called."""

AUXILIARY_AT = ("now", "start")
"""When the adversary may practise."""


@dataclass(frozen=True)
class Scenario:
    """Honest clients and a compromised one, some rounds of training, then exchanges that are attacked.

    Victim v is honest client `v % clients` in the attacked round `v // clients` (and in so many after it, if it repeats
    itself); its private batch is the v-th of the dataset's victims' side. Behind secure aggregation a victim is a sum,
    that of the v-th attacked round.

    Raises:
        FedtapError: an attack that brings back no images, a sum of clients that cannot be attacked, or others beside a
            victim that is heard by itself.
    """

    attacks: tuple[Attack, ...]
    name: str = ""
    """Name and question are those of the scenario's file: whoever plans a run fills them in."""
    question: str = ""
    dataset: str = "photos"
    size: int = 32
    """Height and width, in pixels, that a folder's images are brought to."""
    model: str = "lenet"
    victims: int = 8
    fewer: bool = False
    """Whether a dataset that holds too few images is attacked as far as they go, which nobody has asked a number
    for."""
    batch: int = 1
    clients: int = 0
    """Honest clients; 0 means as many as the grid has besides the compromised one, in process one a victim."""
    repeats: int = 1
    """Rounds in which a victim answers with the same batch, at the same weights; the listener averages."""
    local_steps: int = 1
    """Local SGD steps. A victim takes each on its whole batch."""
    learning_rate: float = 0.1
    rounds: int = 0
    """Rounds of training on the clients' own data before the attacked ones."""
    training_batch: int = 0
    """Images in each local step of those rounds; 0 means `batch`."""
    alpha: float = 0.0
    """Dirichlet concentration of the classes over clients; 0 means IID."""
    defence: str = "none"
    """What clients do to what they send, as written on the command line; all know it."""
    threat_model: str = "curious_server"
    others: str = "honest"
    """What the clients beside a victim do in an attacked round; only behind secure aggregation does it matter."""
    seed: int = 0
    weights_seed: int = 1234
    """Seed of the model's initial weights."""
    weights: str = ""
    """A .safetensors file of initial weights, such as those of a trained model, in the place of the seed's."""
    pairs: int = 0
    """Auxiliary pairs for attacks that learn; 0 means as many as the dataset's public side gives, 10,000 at most."""
    auxiliary_source: str = "compromised_client"
    """Who computes the auxiliary pairs' gradients."""
    auxiliary_classes: str = "all"
    """Classes of the examples that the adversary feeds: `all`, or the `low` or `high` half of them."""
    auxiliary_labels: str = "own"
    """What the adversary calls its examples: by their `own` labels, or by `random` ones of all classes."""
    target_dataset: str = ""
    """Where the victims' images are from; none means from the dataset itself."""
    target_classes: str = "all"
    """Classes of the victims' images, likewise."""
    auxiliary_trainings: int = 0
    """Trainings of the compromised client by itself, from the broadcast weights, along which it practises; 0: none."""
    auxiliary_at: str = "now"
    """When: `now`, at the weights of the last attacked round, or at the `start`, before any training."""
    local_samples: int = 0
    """Images of its own, unshared, that a victim first trains on; 0 means none, and no training."""
    local_epochs: int = 1
    """Times that it trains on all of them."""
    auxiliary: str = ""
    """Folder of a saved practice, to use or to make; none means one within the run's own."""
    delta: float | None = None
    """δ at which the rows tell the defence's ε, and how often an attack succeeded; None means that they do not."""
    success_db: float | None = 0.0
    """PSNR from which an image counts as a success, there; 0: a recognisable one; None means that they tell ε alone."""
    accuracy_loss: float = 0.0
    """Share of the test images that a defence may cost the trained model. Of the parts that differ in the defence's
    strength alone the one that comes nearest to it is attacked; 0 means that each is."""
    swept: tuple[tuple[str, str], ...] = ()
    """The knobs that have several values in this run, with the value they have here."""

    def __post_init__(self) -> None:
        for attack in self.attacks:
            if attack.reconstructs is not Reconstruction:
                raise FedtapError(
                    f"{attack.name} brings back no images, and {self.name or 'this scenario'} is about images: "
                    "`fedtap list` names the attacks on each kind of leak."
                )
        if self.others not in OTHERS:
            raise unknown("kind of others", self.others, OTHERS)
        if self.threat_model != SECURE:
            if self.others != "honest":
                raise FedtapError(
                    f"The {self.threat_model} hears each client by itself, so it does not matter to it that the "
                    f"others are "
                    f"{self.others}: add --threat-model {SECURE}."
                )
            return
        if self.clients < FEWEST:
            raise FedtapError(
                f"Secure aggregation gives away no sum of {self.clients or 'an unknown number of'} clients: "
                f"say how many are summed, --clients N, at least {FEWEST}."
            )
        if self.repeats > 1:
            raise FedtapError(
                "Answers that repeat themselves are averaged client by client, and behind secure aggregation no client "
                "is heard by itself: leave out --repeats, or the listener."
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
        parts = [part for part in described(self.defence) if part.kind.hook == "model"]
        return self.model + "".join(f"+{part}" for part in parts)

    def protocol(self, dataset: Dataset) -> Protocol:
        """The public terms of an attacked exchange."""
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
        )

    def batch_in(self, rnd: int) -> int:
        """Images in a local step of this round (from 1)."""
        return self.training_batch or self.batch if rnd <= self.rounds else self.batch

    def alone(self, parts: Sequence[Scenario]) -> list[dict[str, Any]] | None:
        """The rows of a part that plays itself, without a federation around it; None for all others.

        Args:
            parts: all that are played with it.
        """
        return None

    def attacked_rounds(self, clients: int) -> int:
        """Rounds it takes until every victim has answered as often as it does."""
        return -(-self.victims * self.summed // self.holders(clients)) * self.repeats


@dataclass(frozen=True)
class PrivateData:
    """Who holds what: a pure function of (client, round), the same for the client that trains and for the scorer.

    Clients 0 … `clients` - 1 are honest, client `clients` is the compromised one.
    """

    scenario: Scenario
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
                f"victims' side of {scenario.dataset} holds {held}: lower {cure}--victims or --batch."
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
                f"{len(self.dataset.auxiliary):,} auxiliary images of {scenario.dataset} and their mirror images "
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
        if (
            scenario.summed > 1
            and scenario.defence != "none"
            and any(attack.needs_auxiliary for attack in scenario.attacks)
        ):
            raise FedtapError(
                f"A practice pair is defended once, and a sum of {scenario.summed} clients as many times, so practice "
                "would teach another kind of gradient: leave out --defence, or the attacks that practise."
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

    def unshared(self) -> tuple[Float[Tensor, "images channel height width"], Int[Tensor, "images"]]:
        """What a victim trains on before it shares a gradient: the same for all, as if they were one client."""
        return self.dataset.train.batch(slice(self.scenario.local_samples))

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
def private_data(scenario: Scenario, data_root: Path, clients: int) -> PrivateData:
    """The private data of a federation, kept for all messages of this process.

    Raises:
        FedtapError: the dataset cannot be opened or holds too little.
    """
    dataset = dataset_of(scenario.dataset, data_root, scenario.size)
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
    if scenario.fewer and there < scenario.victims:
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


@lru_cache(maxsize=2)
def dataset_of(name: str, data_root: Path, size: int) -> Dataset:
    """The named dataset, kept open."""
    return open_dataset(name, data_root, size)
