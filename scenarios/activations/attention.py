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
from typing import Annotated, ClassVar

import torch
from flwr.serverapp import Grid
from jaxtyping import Int
from torch import Tensor

from fedtap.attackers.activations.block import block_of, nearest
from fedtap.scenarios.activations import attention_report
from fedtap.scenarios.activations.split import Split, attacks_on_blocks
from fedtap.scenarios.command.options import Knob
from fedtap.simulator.attack import Attack, Inputs, generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.attention import AROUND, Attention, Words, block_name
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.folder import Row
from fedtap.simulator.scores import relative_error
from fedtap.simulator.study import Outcome, rows_of_failed

STOPS = (*range(26), 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Steps after which an attack is looked at, for its chart."""

MOST = 2**26
"""Numbers of the embeddings, or of all attention's scores and values, at most."""

LARGE = 1024
"""Unknowns from which the Jacobian's condition is not computed."""


@dataclass(frozen=True)
class AttentionStudy(Split):
    """Standard normal tokens, or words of a vocabulary, through one block of random weights."""

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

    n: int = 8
    """Tokens."""
    d: int = 8
    """Numbers of a token."""
    heads: int = 4
    around: str = "nothing"
    """What is around the heads, as AROUND says."""
    start_off: float = 0.0
    """Distance of the attack's start from the input, as a share of its length, in a random direction; 0: unknown."""
    gamma: float = 0.0
    """Weight of the attacks' regulariser, where it is not in their own settings."""
    vocabulary: int = 0
    """Words, each with a standard normal embedding that the server knows; 0: tokens are no words."""

    def __post_init__(self) -> None:
        if self.vocabulary == 1:
            raise FedtapError("A vocabulary of one word leaves nothing to find: give --vocabulary 2 or more, or 0.")
        if max(self.vocabulary * self.d, self.victims * self.heads * self.n * (self.n + self.d)) > MOST:
            raise FedtapError(
                f"{self.victims} inputs of {self.n} tokens of width {self.d} through {self.heads} heads, of "
                f"{self.vocabulary} words, fill gigabytes: lower --n, --d, --heads, --victims or --vocabulary."
            )
        if self.gamma and any(attack.gamma for attack in self.attacks):  # type: ignore[attr-defined]
            raise FedtapError("--gamma and an attack's own gamma say the same twice: leave one of them out.")
        if self.start_off and any(attack.starts > 1 for attack in self.attacks):
            raise FedtapError("Restarts from one start are the same again and again: add --start-off 0.")

    def shape(self, data_root: Path) -> tuple[int, int]:
        """Tokens and width."""
        return self.n, self.d

    @property
    def block(self) -> str:
        """The block, as a saved leak names it."""
        return block_name(self.heads, self.around, self.vocabulary)

    @cached_property
    def _half(self) -> Attention | Words:
        draw = generator(self.seed, "block")
        attention = Attention(self.d, self.heads, **AROUND[self.around]).double()
        attention.reset_parameters(draw)
        return Words(self.vocabulary, attention, draw) if self.vocabulary else attention

    def half(self, data_root: Path) -> Attention | Words:
        """Weights are drawn from the seed, as any initial weights are."""
        return self._half

    def words(self, client: int) -> Int[Tensor, "n"]:
        """The numbers of a client's words."""
        return torch.randint(self.vocabulary, (self.n,), generator=generator(self.seed, "words", client))

    def private(self, client: int, data_root: Path) -> Tensor:
        """A client's tokens, in double precision."""
        if isinstance(self._half, Words):
            return self._half.embedded(self.words(client))
        return torch.randn(self.n, self.d, generator=generator(self.seed, "input", client), dtype=torch.float64)

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """Every attack on every client."""
        failed: dict[int, str] = {}
        leak = self.listen(grid, part, data_root, failed).to(device)
        truth = self.truth(leak, data_root).to(device)
        rows = [row for attack in self.attacks for row in self._rows(attack, leak, truth)]
        lost = [row for attack in self.attacks for row in rows_of_failed(failed, {"attack": attack.written()})]
        return Outcome(rows + lost, leak.to("cpu"))

    def _rows(self, named: Attack[Inputs], leak: Leak, truth: Tensor) -> list[Row]:
        attack = dataclasses.replace(named, gamma=self.gamma) if self.gamma else named  # type: ignore[type-var]
        start = self._start(truth, leak.clients.tolist()) if self.start_off else None
        guess = attack(leak, seed=self.seed, start=start)
        block, heard = block_of(leak), leak.observed["output"]
        errors = relative_error(guess.values, truth)
        standard = relative_error(*map(_standard, (guess.values, truth)))
        residual = relative_error(block(guess.values), heard)
        path = self._path(attack, leak, start, truth, guess)
        settings: Row = {
            "attack": named.written(),
            "n": self.n,
            "d": self.d,
            "heads": self.heads,
            "around": self.around,
            "noise": self.noise,
            "gamma": attack.gamma,  # type: ignore[attr-defined]
            "blind": 1 / self.vocabulary if self.vocabulary else 1.0,
        }
        return [
            settings
            | {
                "client": int(leak.clients[victim]),
                "start_error": self.start_off or None,
                "relative_error": float(errors[victim]),
                "standardised_error": float(standard[victim]),
                "iterations": int(guess.iterations[victim]),
                "converged": bool(guess.converged[victim]),
                "objective": float(guess.objective[victim]),
                "residual": float(residual[victim]),
                "condition": condition,
                "tokens_right": right,
                "path": [[stop, float(error[victim])] for stop, error in path.items()],
            }
            for victim, (condition, right) in enumerate(
                zip(self._conditions(leak, truth), self._right(leak, guess), strict=True)
            )
        ]

    def _start(self, truth: Tensor, clients: Sequence[int]) -> Tensor:
        """So far off the input, which the paper's theorem takes for granted and no server has."""
        draws = [generator(self.seed, "start", client) for client in clients]
        way = torch.stack([torch.randn(self.n, self.d, generator=draw, dtype=truth.dtype) for draw in draws])
        unit = way / way.flatten(1).norm(dim=1)[:, None, None]
        return truth + self.start_off * truth.flatten(1).norm(dim=1)[:, None, None] * unit.to(truth.device)  # type: ignore[no-any-return]

    def _path(
        self, attack: Attack[Inputs], leak: Leak, start: Tensor | None, truth: Tensor, guess: Inputs
    ) -> Mapping[int, Tensor]:
        """The error after so many steps, by playing the attack anew with so few; none from starts of its own."""
        if start is None:
            return {}
        path = {0: relative_error(start, truth)}
        for stop in STOPS[1:]:
            if stop >= int(guess.iterations.max()):
                break
            fewer = dataclasses.replace(attack, steps=stop)  # type: ignore[type-var]
            path[stop] = relative_error(fewer(leak, seed=self.seed, start=start).values, truth)
        return path | {int(guess.iterations.max()): relative_error(guess.values, truth)}

    def _conditions(self, leak: Leak, truth: Tensor) -> list[float | None]:
        if self.n * self.d > LARGE:
            return [None] * len(leak)
        block = block_of(leak)
        return [float(torch.linalg.cond(block.linearised(x[None])[1][0])) for x in truth]

    def _right(self, leak: Leak, guess: Inputs) -> list[float | None]:
        """Share of the words that the nearest embeddings are."""
        if not self.vocabulary:
            return [None] * len(leak)
        assert leak.weights is not None
        found = nearest(block_of(leak), guess.values, leak.weights["table"]).cpu()
        words = torch.stack([self.words(client) for client in leak.clients.tolist()])
        return (found == words).double().mean(1).tolist()

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Error against step, and what is swept."""
        return attention_report.charts(rows, dict(self.swept))


def _standard(x: Tensor) -> Tensor:
    """Tokens of mean 0 and length 1: LayerNorm lets nothing else through."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)  # type: ignore[no-any-return]


def scenario(
    *,
    n: Annotated[int, Knob("tokens of an input", 1, 256)] = 8,
    d: Annotated[int, Knob("numbers of a token", 2, 256)] = 8,
    heads: Annotated[int, Knob("attention heads, each as wide as a token", 1, 64)] = 4,
    around: Annotated[str, Knob("what is around them", choices=tuple(AROUND))] = "nothing",
    start_off: Annotated[
        float,
        Knob(
            "distance of the attack's start from the input, as a share of its length; 0: a start of its own", 0.0, 10.0
        ),
    ] = 0.1,
    noise: Annotated[
        float, Knob("what clients add to the output, as a share of its root mean square", 0.0, 100.0)
    ] = 0.0,
    gamma: Annotated[float, Knob("weight of the paper's regulariser, gamma |X|^2", 0.0, 1e6)] = 0.0,
    vocabulary: Annotated[int, Knob("words that the tokens are drawn from; 0: they are standard normal", 0, 10**6)] = 0,
    attack: Annotated[str, Knob("NAME[,NAME…], each with settings if need be", swept=False)] = "attention_newton",
    victims: Annotated[int, Knob("clients, all of which are attacked", 1, 1000)] = 20,
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> AttentionStudy:
    """One exchange: the block goes out, and the clients' outputs come back."""
    return AttentionStudy(
        attacks=attacks_on_blocks(attack),
        n=n,
        d=d,
        heads=heads,
        around=around,
        start_off=start_off,
        noise=noise,
        gamma=gamma,
        vocabulary=vocabulary,
        victims=victims,
        seed=seed,
    )
