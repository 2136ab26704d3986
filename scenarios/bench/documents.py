"""What a sketch of a last layer's gradient saves over laying the gradient out: time and memory for each document.

`python -m fedtap.scenarios.bench.documents`; with `--many 100000`, also how fast a corpus of that size is scored, and
in how much memory.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from fedtap.attackers.checkpoints.per_document import LastLayer, signs
from fedtap.simulator.attack import generator
from fedtap.simulator.models.language import build_language

_VOCABULARY, _WIDTH, _HEADS, _TOKENS, _SIZE = 8192, 576, 9, 24, 1024
"""As wide as SmolLM2-135M, with a sixth of its vocabulary."""

_DOCUMENTS, _TURNS = 8, 3


def main(many: Annotated[int, typer.Option(help="Documents of a corpus to score; 0: none.")] = 0) -> None:
    """Print the ratios, measured in turns."""
    torch.set_num_threads(1)
    ratios()
    if many:
        corpus(many)


def ratios() -> None:
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

    def sketched() -> Tensor:
        return gradients.sketches(ids, None, _SIZE, 0)

    sketched()
    took = [(_seconds(laid_out), _seconds(sketched)) for _ in range(_TURNS)]
    ratio = statistics.median(slow / fast for slow, fast in took)
    errors, features = gradients.factors(ids, None)
    held = (errors[0].numel() + features[0].numel() + _SIZE) * 4
    full = _VOCABULARY * _WIDTH * 4
    exact, rough = gradients.laid_out(ids, None), sketched()
    apart = (torch.cosine_similarity(exact[:1], exact[1:]) - torch.cosine_similarity(rough[:1], rough[1:])).abs()
    print(f"Last layer of {_VOCABULARY} x {_WIDTH}, {_TOKENS} tokens, {_SIZE} numbers a document, 1 thread")
    print(f"  projection of the gradient laid out / sketch: {ratio:.1f} times the time")
    print(
        f"  memory of a document at work: {full / 2**20:.1f} MiB laid out, {held / 2**20:.2f} MiB, "
        f"{full / held:.0f} times less"
    )
    print(f"  memory of a document that is kept: {full / _SIZE / 4:,.0f} times as much laid out")
    print(f"  error of a cosine by the sketch: {float(apart.mean()):.3f} on average, 1 / sqrt(m) = {_SIZE**-0.5:.3f}")


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
