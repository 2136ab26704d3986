"""What scenarios about fine-tuned diffusion models share: clients that tune one on few images, and attacks that draw
those from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import ImageSource, Option
from fedtap.simulator.report.columns import Column, Group
from fedtap.simulator.scenario import KEPT, Observed, Row, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from fedtap.scenarios.checkpoints.subjects import Subjects
    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak, Protocol
    from fedtap.simulator.models.adapters import Lora
    from fedtap.simulator.models.diffusion import Denoiser
    from fedtap.simulator.models.diffusion_training import DiffusionTraining
    from fedtap.simulator.report.page import Page


_SIMILARITIES = ("training_samples", "held_out_samples", "others_samples")
"""Of a private, a held-out and another image to the nearest of all samples: tables have the gap of the first two."""


@dataclass(frozen=True)
class Extracting(Attacked):
    """Clients tune the diffusion model that the server broadcasts, and it draws their images from what comes back.

    Raises:
        FedtapError: an attack that extracts nothing, a defence that does not fit, or no caption.
    """

    reconstructs: ClassVar[str] = "Extraction"
    refusal_is_result: ClassVar[bool] = True
    doubted: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("round", over="rows"),
        Column("private_set", "what the private images are of", over="same"),
        Column("private", "private images", over="same"),
        Column("method", "full: all weights are tuned; lora: an adapter", over="same"),
        Column("caption", "under which samples are drawn", over="same", page=True),
        Column("w", "guidance", over="same", form="g"),
        Column("k", "correction of the guidance", over="same", form="g", page=True),
        Column("identified", "samples nearer to a private image than to any other image", form=".0%"),
        Column("extracted", "private images with an extracted one at least as similar as τ", form=".0%"),
        Column("similarity_training", "of a private image to the nearest extracted one, mean", form=".2f"),
        Column("similarity_held_out", "of a held-out image of the same kind", form=".2f"),
        Column("gap", "the difference of these two", form=".2f"),
        Column("similarity_others", "of images of other kinds", form=".2f", page=True),
        Column("similarity_blind", "of a private image to the nearest of as many public ones", form=".2f"),
        Column("gap_samples", "as gap, of the nearest of all samples", form=".2f", page=True),
        Column("caption_found", "whether the caption is the private one", over="same", page=True),
        Column(
            "contrast", "of the extracted images: standard deviation of pixels; 0.2 to 0.3 in photographs", form=".2f"
        ),
        Column("encoder", "by which images are compared", over="same", page=True),
        Column("epsilon", "for a client", form=".3g", page=True),
        Column("error", over="same"),
        *(Column(name, over="hidden") for name in ("objective", *_SIMILARITIES)),
    )

    weights: Annotated[
        str,
        Option(
            "folder of a diffusion model in diffusers' format; that of `fedtap pretrain diffusion` unless said",
            group="model",
            file=True,
            single=True,
        ),
    ] = ""
    method: Annotated[Literal["full", "lora"], Option("what clients tune and send", group="model")] = "full"
    rank: Annotated[int, Option("of the LoRA; its alpha is the same", 1, 1024, "model")] = 16
    dataset: ImageSource = "photos"
    subject: Annotated[
        str,
        Option("class of the first client's images, after which they take turns; or mixed", group="data"),
    ] = ""
    private: Annotated[int, Option("private images of a client", 1, 1000, "data")] = 4
    pretraining: Annotated[
        str,
        Option(
            "datasets that the model was trained on before, for the scores alone", group="data", file=True, single=True
        ),
    ] = ""
    caption: Annotated[str, Option("of the private images", group="federation")] = "a photo of sks"
    announced: Annotated[
        Literal["all", "partly", "nothing"],
        Option("of the caption, by the protocol: partly leaves out the last word", group="federation"),
    ] = "all"
    victims: Annotated[int, Option("clients, or sums of clients, that are attacked", 1, 1000, "federation")] = 1
    averaged: Annotated[
        int, Option("clients whose checkpoints are averaged before the server sees them", 1, 1000, "federation")
    ] = 1
    rounds: Annotated[
        int, Option("rounds of the federation, each observed; give several --victims", 1, 1000, "federation")
    ] = 1
    local_steps: Annotated[int, Option("local steps; 0: 500 of full tuning, 700 of a LoRA", 0, 10**6, "federation")] = 0
    batch: Annotated[int, Option("images in a local step", 1, 1024, "federation")] = 4
    learning_rate: Annotated[float, Option("of AdamW", 1e-8, 1.0, "federation")] = 1e-3
    augmentation: Annotated[
        Literal["none", "cutout", "randaugment"], Option("of images, before each step on them", group="defence")
    ] = "none"
    defence: Annotated[
        str,
        Option(
            "none, or what clients do to the change of their weights or in each step: clip(1.0)+noise(0.01)",
            group="defence",
        ),
    ] = "none"
    encoder: Annotated[
        str,
        Option(
            "pixels, efficientnet_lite0, a copy encoder's .safetensors, or SSCD's TorchScript .pt",
            group="scenario",
            file=True,
            single=True,
        ),
    ] = ""
    tau: Annotated[
        float, Option("similarity from which on a private image counts as extracted; 0: the encoder's", 0.0, 1.0)
    ] = 0.0
    attack: str = (
        "finextract(samples=4,steps=20),guided_sampling(samples=4,steps=20),direct_sampling(samples=4,steps=20)"
    )

    def __post_init__(self) -> None:
        from fedtap.simulator.defences.notation import described, written

        for attack in self.attacks:
            if attack.reconstructs.__name__ != self.reconstructs:
                raise FedtapError(
                    f"{attack.name} extracts no images from a diffusion model, and this scenario asks for attacks that "
                    "do: write finextract."
                )
        for part in described(self.defence):
            if part.hook != "update" and part.name != "dp_sgd":
                raise FedtapError(
                    f"{part.name} acts on the {part.hook} of an image classifier, and these clients tune a diffusion "
                    "model: use a defence of what is sent, such as clip(1.0)+noise(0.001), or dp_sgd."
                )
        if not self.caption.strip():
            raise FedtapError(
                "A text-conditional model is tuned under a caption, and --caption is empty: say what the images show, "
                "such as --caption 'a photo of sks'."
            )
        object.__setattr__(self, "defence", written(described(self.defence)))  # one spelling, for all who read it

    @cached_property
    def attacks(self) -> tuple[Attack[Any], ...]:
        """The attacks to run, each with the scenario's encoder unless it names another."""
        from fedtap.simulator.extraction import Extractor

        return tuple(
            replace(attack, encoder=self.encoder) if isinstance(attack, Extractor) and not attack.encoder else attack
            for attack in super().attacks
        )

    @cached_property
    def model(self) -> str:
        """The folder of the diffusion model that is broadcast.

        Raises:
            FedtapError: none is named, and none was trained here.
        """
        from fedtap.simulator.models.diffusion import frozen
        from fedtap.simulator.models.diffusion_pretraining import cached_model

        folder = self.weights or str(cached_model())
        frozen(folder)  # so that what is missing is told at once
        return str(Path(folder).expanduser().resolve())

    @cached_property
    def lora(self) -> Lora | None:
        """The adapter that clients train; None where they train all weights."""
        from fedtap.simulator.models.adapters import Lora

        return Lora(self.rank, self.rank) if self.method == "lora" else None

    def check(self, settings: Sequence[Any]) -> None:
        """Refuse an encoder that cannot be read, too, before clients tune for minutes."""
        from fedtap.simulator.models.copy_detection import encoder

        super().check(settings)
        for name in dict.fromkeys([self.encoder, *(getattr(attack, "encoder", "") for attack in self.attacks)]):
            encoder(name)

    @property
    def nodes(self) -> int:
        """The clients of all sums."""
        return self.victims * self.averaged

    @property
    def training(self) -> DiffusionTraining:
        """How clients tune."""
        from fedtap.simulator.models.diffusion_training import DiffusionTraining

        return DiffusionTraining(
            steps=self.local_steps or (500 if self.method == "full" else 700),
            batch=min(self.batch, self.private),
            learning_rate=self.learning_rate,
            augmentation=self.augmentation,
        )

    @property
    def protocol(self) -> Protocol:
        """The public terms."""
        from fedtap.simulator.leaks import Protocol
        from fedtap.simulator.models.diffusion import frozen

        training = self.training
        words = self.caption.split()
        prompts = {"all": self.caption, "partly": " ".join([*words[:-1], "*"]), "nothing": ""}
        return Protocol(
            model=self.model,
            shape=frozen(self.model).image_shape,
            classes=1,
            batch=training.batch * self.averaged,
            local_steps=training.steps,
            learning_rate=training.learning_rate,
            optimiser="adamw",
            defence=self.defence,
            threat_model="secure_aggregation" if self.averaged > 1 else "curious_server",
            summed=self.averaged,
            adapter=self.lora.written() if self.lora else "",
            prompt=prompts[self.announced],
        )

    def behind(self, victim: int) -> range:
        """The clients of a sum."""
        return range(victim * self.averaged, (victim + 1) * self.averaged)

    def subjects(self, data_root: Path) -> Subjects:
        """Everybody's images.

        Raises:
            FedtapError: there are not as many.
        """
        from fedtap.scenarios.checkpoints.subjects import subjects
        from fedtap.simulator.models.diffusion import frozen

        channels, size, _ = frozen(self.model).image_shape
        return subjects(data_root, self.dataset, size, channels, self.subject, self.private, self.nodes)

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """The checkpoint after tuning on this client's images."""
        from fedtap.clients.finetuning import adapter_reply, checkpoint_reply
        from fedtap.simulator.attack import generator
        from fedtap.simulator.defences.chained import parse
        from fedtap.simulator.defences.dp_sgd import DPSGD
        from fedtap.simulator.models.diffusion import denoiser, frozen

        client = int(context.node_config["partition-id"])
        images, around = self.subjects(data_root).private[client], frozen(self.model)
        number = int(message.content.config_records["round"]["number"])  # type: ignore[arg-type]
        draw = generator(self.seed, "diffusion", client, number)
        net = denoiser(self.model, 0)

        step = parse(self.defence).step
        assert step is None or isinstance(step, DPSGD)

        def tune(net: Denoiser) -> None:
            self.training(net, around, images, around.condition([self.caption]), draw, step)

        if self.lora is not None:
            return adapter_reply(message, net, self.lora, tune, len(images), client, self.defence, draw, self.seed)
        return checkpoint_reply(message, net, tune, len(images), client, self.defence, draw)

    def observe(self, session: Session) -> Observed:
        """Rounds of tuning; the federation goes on without a client that fails."""
        from fedtap.scenarios.checkpoints.fine_tuned import TunedTerms, checkpoints
        from fedtap.scenarios.checkpoints.subjects import pretraining_images
        from fedtap.simulator.leaks import float_buffers
        from fedtap.simulator.models.diffusion import denoiser

        found = self.subjects(session.data_root)  # so that what is missing is told here, and not by every client
        pretraining_images(session.data_root, self.pretraining, self.protocol.shape[-1])
        net = denoiser(self.model, 0)
        held = dict(net.named_parameters()) | float_buffers(net)
        weights = {name: tensor.detach() for name, tensor in held.items()}
        terms = TunedTerms(weights, denoiser(self.model, None), self.protocol, self.private, "images")
        leak, missing = checkpoints(session, self, terms)
        keep = sum(tensor.numel() for tensor in leak.observed.values()) * 4 <= KEPT
        return Observed(leak, missing, notes=[found.note] * bool(found.note), keep=keep)

    def settled(self, attack: Attack[Any], label: str, observed: Any) -> Row:
        """What is compared."""
        return {
            "attack": label,
            "method": self.method,
            "rank": self.rank if self.lora else None,
            "private": self.private * self.averaged,
            "averaged": self.averaged,
            "local_steps": self.training.steps,
            "augmentation": self.augmentation,
            "defence": self.defence,
            "w": getattr(attack, "w", None),
            "k": getattr(attack, "k", None),
        }

    def score(self, trial: Trial) -> Scored:
        """The images that were extracted, beside the private ones."""
        from fedtap.scenarios.checkpoints.extraction_scoring import extraction_scored

        return extraction_scored(self, trial)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """A curious server, or one behind secure aggregation."""
        seen = "the checkpoint that each client sends"
        if self.averaged > 1:
            seen = f"the mean of the checkpoints of {self.averaged} clients, which are masked one by one"
        known = {
            "all": "It knows the caption under which clients tune.",
            "partly": "It knows the caption under which clients tune but for one word, and a list of words.",
            "nothing": "It is not told the caption under which clients tune, and has a list of captions.",
        }
        return (
            f"A curious server: it knows the diffusion model that it sent, and {seen}. {known[self.announced]} It "
            "knows how many images each client has, and none of them.",
        )

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """With an answer: how much came back, by which attack."""
        from fedtap.scenarios.checkpoints.extraction_report import extraction_sentences

        page, shown = super().shown_on(page, rows)
        return replace(page, answers=extraction_sentences(shown, self.varied)), shown

    @property
    def varied(self) -> list[str]:
        """The options that are swept, but for those by which a run repeats itself."""
        return [name for name, _ in self.swept if name not in ("attack", "seed", "subject")]

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """What becomes of the scores with what is swept, or with w."""
        from fedtap.scenarios.checkpoints.extraction_report import extraction_charts

        return extraction_charts(rows, self.varied)
