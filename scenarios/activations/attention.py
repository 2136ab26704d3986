"""What does an attention block's output tell a server of the tokens that went in?

Expect: with several heads side by side there are more equations than unknowns, and from a start near the input Newton's
method finds it in about five steps, the last of them quadratic; from nowhere near it mostly does too, given restarts.
One head has as many equations as unknowns and an ill-conditioned Jacobian: from afar the steps end in flat valleys, or
at another input with the same output, so that a residual of zero is no proof. A regulariser biases what is found, one
head's most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.activations.split import SplitLearning
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Observed, Row, Scored, Trial

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.models import attention as blocks

_MOST = 2**26
"""Numbers of the embeddings, or of all attention's scores and values, at most."""


@dataclass(frozen=True)
class Attention(SplitLearning):
    """Standard normal tokens, or words of a vocabulary, through one block of random weights.

    Raises:
        FedtapError: sizes that fill gigabytes, or options that contradict each other.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("relative_error", "|reconstruction - input| / |input|"),
        Column("standardised_error", "that with tokens brought to mean 0 and one length"),
        Column("iterations"),
        Column("converged", over="share"),
        Column("residual", "|output of the reconstruction - output| / |output|"),
        Column("condition", "of the Jacobian at the input"),
        Column("tokens_right", "share of words found by the nearest embedding"),
        Column("blind", "relative error of zero, or tokens right at random"),
        Column("error", over="same"),
        *(Column(name, over="hidden") for name in ("objective", "path")),
    )

    n: Annotated[int, Option("tokens of an input", 1, 256, "data")] = 8
    d: Annotated[int, Option("numbers of a token", 2, 256, "data")] = 8
    vocabulary: Annotated[
        int, Option("words that the tokens are drawn from; 0: they are standard normal", 0, 10**6, "data")
    ] = 0
    heads: Annotated[int, Option("attention heads, each as wide as a token", 1, 64, "model")] = 4
    around: Annotated[
        Literal["nothing", "scale", "residual", "norm", "gpt", "bert"], Option("what is around them", group="model")
    ] = "nothing"
    start_near_truth: Annotated[
        float,
        Option(
            "distance of the attack's start from the input, as a share of its length, which no server has; 0: a start "
            "of its own",
            0.0,
            10.0,
            "attack",
        ),
    ] = 0.1
    gamma: Annotated[float, Option("weight of the paper's regulariser, gamma |X|^2", 0.0, 1e6, "attack")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary == 1:
            raise FedtapError("A vocabulary of one word leaves nothing to find: give --vocabulary 2 or more, or 0.")
        if max(self.vocabulary * self.d, self.victims * self.heads * self.n * (self.n + self.d)) > _MOST:
            raise FedtapError(
                f"{self.victims} inputs of {self.n} tokens of width {self.d} through {self.heads} heads, of "
                f"{self.vocabulary} words, fill gigabytes: lower --n, --d, --heads, --victims or --vocabulary."
            )
        if self.start_near_truth and any(attack.starts > 1 for attack in self.attacks):
            raise FedtapError("Restarts from one start are the same again and again: add --start-near-truth 0.")

    @cached_property
    def attacks(self) -> tuple[Attack[Any], ...]:
        """The attacks to run, with --gamma.

        Raises:
            FedtapError: there is no such attack, or one has no gamma or another.
        """
        named = super().attacks
        if not self.gamma:
            return named
        for attack in named:
            if not hasattr(attack, "gamma"):
                raise FedtapError(f"{attack.name} has no regulariser that --gamma could weigh: leave one of them out.")
            if attack.gamma:
                raise FedtapError("--gamma and an attack's own gamma say the same twice: leave one of them out.")
        return tuple(dataclasses.replace(attack, gamma=self.gamma) for attack in named)  # type: ignore[type-var]

    def shape(self, data_root: Path) -> tuple[int, int]:
        """Tokens and width."""
        return self.n, self.d

    @property
    def block(self) -> str:
        """The block, as a saved leak names it."""
        from fedtap.simulator.models.attention import block_name

        return block_name(self.heads, self.around, self.vocabulary)

    @cached_property
    def _half(self) -> blocks.Attention | blocks.Words:
        from fedtap.simulator.attack import generator
        from fedtap.simulator.models import attention as blocks

        draw = generator(self.seed, "block")
        attention = blocks.Attention(self.d, self.heads, **blocks.AROUND[self.around]).double()
        attention.reset_parameters(draw)
        return blocks.Words(self.vocabulary, attention, draw) if self.vocabulary else attention

    def half(self, data_root: Path) -> blocks.Attention | blocks.Words:
        """Weights are drawn from the seed, as any initial weights are."""
        return self._half

    def words(self, client: int) -> Int[Tensor, "n"]:
        """The numbers of a client's words."""
        import torch

        from fedtap.simulator.attack import generator

        return torch.randint(self.vocabulary, (self.n,), generator=generator(self.seed, "words", client))

    def private(self, client: int, data_root: Path) -> Tensor:
        """A client's tokens, in double precision."""
        import torch

        from fedtap.simulator.attack import generator
        from fedtap.simulator.models import attention as blocks

        if isinstance(self._half, blocks.Words):
            return self._half.embedded(self.words(client))
        return torch.randn(self.n, self.d, generator=generator(self.seed, "input", client), dtype=torch.float64)

    def start(self, leak: Leak) -> Tensor | None:
        """At --start-near-truth from the input in a random direction: the paper's theorem takes such a start for
        granted, and no server has it."""
        import torch

        from fedtap.simulator.attack import generator

        if not self.start_near_truth:
            return None
        truth = self.truth(leak, Path()).to(leak.device)
        draws = [generator(self.seed, "start", client) for client in leak.clients.tolist()]
        way = torch.stack([torch.randn(self.n, self.d, generator=draw, dtype=truth.dtype) for draw in draws])
        unit = way / way.flatten(1).norm(dim=1)[:, None, None]
        length = truth.flatten(1).norm(dim=1)[:, None, None]
        return truth + self.start_near_truth * length * unit.to(truth.device)  # type: ignore[no-any-return]

    def settled(self, attack: Attack[Any], label: str, observed: Observed) -> Row:
        """The block, the input's size, the start and the regulariser."""
        named = dataclasses.replace(attack, gamma=0.0) if self.gamma else attack  # type: ignore[type-var]
        return super().settled(named, label, observed) | {
            "n": self.n,
            "d": self.d,
            "heads": self.heads,
            "around": self.around,
            "gamma": getattr(attack, "gamma", None),
            "start_error": self.start_near_truth or None,
            "blind": 1 / self.vocabulary if self.vocabulary else 1.0,
        }

    def score(self, trial: Trial) -> Scored:
        """Errors of inputs and outputs, by victim."""
        from fedtap.scenarios.activations import attention_scoring

        return Scored(attention_scoring.attention_rows(self, trial))

    def shown(self, trial: Trial) -> Scored:
        """Nothing: there are no pictures."""
        return Scored(())

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Error against step, and what is swept."""
        from fedtap.scenarios.activations import attention_report

        return attention_report.attention_charts(rows, dict(self.swept))
