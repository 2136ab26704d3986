"""What a sketch of a last layer's gradient saves over laying the gradient out: time and memory for each document.

`python -m fedtap.scenarios.bench.documents --many 100000` tells how fast a corpus of that size is scored, and in how
much memory.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor

from fedtap.attackers.checkpoints.per_document import LastLayer, signs
from fedtap.scenarios.bench.ratios import Ratio, in_turns
from fedtap.simulator.attack import generator
from fedtap.simulator.models.language import build_language

_VOCABULARY, _WIDTH, _HEADS, _TOKENS, _SIZE = 8192, 576, 9, 24, 1024
"""As wide as SmolLM2-135M, with a sixth of its vocabulary."""

_DOCUMENTS = 8


def main(many: Annotated[int, typer.Option(help="Documents of a corpus to score.")] = 100_000) -> None:
    """Print how fast a corpus is scored, and in how much memory."""
    torch.set_num_threads(1)
    corpus(many)


def document_ratios() -> Iterator[Ratio]:
    """A sketch of the outer products against a projection of the gradient that is laid out, to as many numbers."""
    net = build_language(f"decoder(width={_WIDTH}, layers=1, heads={_HEADS})", _TOKENS, _VOCABULARY, 0).requires_grad_(
        False
    )
    ids = torch.randint(3, _VOCABULARY, (_DOCUMENTS, _TOKENS), generator=generator("bench"))
    gradients = LastLayer([net])
    block = signs(_SIZE, 2**16, generator("projection"))

    def laid_out() -> Tensor:
        rows = gradients.laid_out(ids, None)  # documents times V d numbers
        return sum(part @ block[:, : part.shape[1]].T for part in torch.split(rows, 2**16, 1))  # type: ignore[return-value]

    errors, features = gradients.factors(ids, None)
    held = errors[0].numel() + features[0].numel() + _SIZE
    less = _VOCABULARY * _WIDTH / held
    exact, rough = gradients.laid_out(ids, None), gradients.sketches(ids, None, _SIZE, 0)
    apart = (torch.cosine_similarity(exact[:1], exact[1:]) - torch.cosine_similarity(rough[:1], rough[1:])).abs()
    yield in_turns(
        f"last layer of {_VOCABULARY} x {_WIDTH}, {_TOKENS} tokens, to {_SIZE} numbers: laid out and projected / "
        f"sketched (memory at work {less:.0f} times less, error of a cosine {float(apart.mean()):.3f})",
        laid_out,
        lambda: gradients.sketches(ids, None, _SIZE, 0),
        group="documents",
        turns=5,
    )


def corpus(many: int) -> None:
    """Score a corpus as `select` does, unprojected and by sketches."""
    net = build_language("decoder(width=64, layers=2, heads=4)", _TOKENS, 1024, 0).requires_grad_(False)
    ids = torch.randint(3, 1024, (many, _TOKENS), generator=generator("corpus"), dtype=torch.int64)
    gradients = LastLayer([net])
    direction = torch.randn(1024, 64, generator=generator("direction"))
    for name, score in (
        ("unprojected", lambda some: gradients.products(some, None, [direction])),
        ("sketched to 1,024", lambda some: gradients.sketches(some, None, 1024, 0)),
    ):
        took = _seconds(lambda score=score: [score(some) for some in torch.split(ids, gradients.batch)])  # type: ignore[misc]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{many:,} documents, {name}: {many / took:.0f} documents a second, peak {peak:.1f} GiB so far")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
