"""What comes of a leak that was misread, and how far `unexplained` tells it: the figures of soundness.py.

    python -m tests.support.misread conventions [steps]     a client of each convention: misread, said, fedtap's own
    python -m tests.support.misread threshold [steps]       the best threshold for 64 honest and 64 misread leaks
    python -m tests.support.misread count [steps]           how many of 128 others that threshold gets wrong

Needs CIFAR-10 (FEDTAP_DATA_ROOT). Images are of the training side throughout.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedtap.attackers.gradients.idlg import IDLG
from fedtap.simulator import scores
from fedtap.simulator.data.images import cifar10_dataset
from fedtap.simulator.leaks import Leak, Protocol
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.soundness import EXPLAINED, doubts, unexplained
from tests.support.clients import heard, protocol

PAIR, TWICE = {"batch": 2}, {"local_steps": 2, "learning_rate": 0.01}
NORMED = {"model": "tests.support.misread:normed", **PAIR}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "range [-1, 1]": ({"low": -1.0, "high": 1.0}, {}),
    "range [-0.5, 0.5]": ({"low": -0.5, "high": 0.5}, {}),
    "bce": ({"loss": "bce"}, {}),
    "mse": ({"loss": "mse"}, {}),
    "nesterov 0.9": ({"momentum": 0.9, "nesterov": True}, {}),
    "batch 2, said 1": (PAIR, {}),
    "2 steps, said 1": (TWICE, {"learning_rate": 0.01}),
    "momentum and decay, 2 steps": ({**TWICE, "momentum": 0.9, "weight_decay": 0.01}, TWICE),
    "weight decay 0.01": ({"weight_decay": 0.01}, {}),
    "sum over 2": ({**PAIR, "reduction": "sum"}, PAIR),
    "adam": ({"optimiser": "adam"}, {}),
    "BatchNorm eval, batch 2": ({**NORMED, "batchnorm": "eval"}, NORMED),
}
"""Name -> what the client does, and what it is taken for; both beside one image and one step of plain SGD."""

OWN = ("model", "batch", "local_steps", "learning_rate")
"""What a client of fedtap's own convention may do as well."""


def normed(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A LeNet with BatchNorm after its first convolution."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(shape[0], 12, 5, padding=2, stride=2),
        torch.nn.BatchNorm2d(12),
        torch.nn.Sigmoid(),
        torch.nn.Conv2d(12, 12, 5, padding=2, stride=2),
        torch.nn.Sigmoid(),
        torch.nn.Flatten(),
        torch.nn.Linear(12 * 64, classes),
    )


def network_of(told: Protocol) -> torch.nn.Module:
    """The victims' model with its weights: U(-0.5, 0.5), BatchNorm's statistics as after some training."""
    made = build(told.model, told.shape, told.classes, seed=1234)
    draw = torch.Generator().manual_seed(1234)
    if told.model == "tests.support.misread:normed":
        for parameter in made.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=draw)
        norm = made.get_submodule("1")
        norm.running_mean.uniform_(-0.5, 0.5, generator=draw)  # type: ignore[union-attr,operator]
        norm.running_var.uniform_(0.5, 2, generator=draw)  # type: ignore[union-attr,operator]
    return made


def images_from(first: int, victims: int, batch: int) -> tuple[Tensor, Tensor]:
    """Training images and labels of CIFAR-10, `victims batch ...`."""
    side = cifar10_dataset(Path(os.environ["FEDTAP_DATA_ROOT"])).auxiliary
    images, labels = side.batch(torch.arange(first, first + victims * batch))
    return images.unflatten(0, (victims, batch)), labels.unflatten(0, (victims, batch))


def attacked(leak: Leak, truth: Tensor, steps: int) -> tuple[list[float], list[float | None]]:
    """PSNR of each victim (its first image's place where fewer came back than there are), and `unexplained`."""
    guess = IDLG(steps=steps)(leak, seed=0)
    shares = unexplained(leak, guess.images, guess.labels)
    psnrs = []
    for found, true in zip(guess.images, truth, strict=True):
        if len(found) < len(true):  # of several candidates the nearest: more than an attacker could choose
            found = found.expand_as(true)
            psnrs.append(float(scores.psnr(scores.mse(found, true)).max()))
        else:
            psnrs.append(float(scores.psnr(scores.mse(found[scores.match(found, true)], true)).mean()))
    return psnrs, [None] * len(leak) if shares is None else shares.tolist()


def conventions(victims: int = 8, steps: int = 300) -> None:
    """The table: PSNR as misread, once said, and of fedtap's own convention, medians over victims."""
    print(f"idlg(steps={steps}), {victims} training images (or batches): median dB; unexplained: median")
    heads = ("misread", "said", "own")
    print(f"{'client':30}{''.join(f'{head:>9}' for head in heads * 2)}   doubts when misread")
    plainly: dict[Protocol, Any] = {}
    for name, (does, taken) in CASES.items():
        began = time.perf_counter()
        true = protocol(**does)
        misread = protocol(**({"model": true.model} | taken))
        own = protocol(**{key: value for key, value in does.items() if key in OWN})
        images, labels = images_from(0, victims, true.batch)
        network = network_of(true)
        wrong, right, plain = (
            heard(network, images, labels, true, misread),
            heard(network, images, labels, true),
            heard(network, images, labels, own),
        )
        said = [" ".join(sentences) for sentences in doubts(wrong)]
        assert not any(map(len, doubts(plain))), doubts(plain)
        if any(map(len, doubts(right))):
            print("  doubts once said:", doubts(right)[0])
        if own not in plainly:
            plainly[own] = attacked(plain, images, steps)
        figures = [attacked(leak, images, steps) for leak in (wrong, right)] + [plainly[own]]
        decibels = "".join(f"{median(psnrs):9.1f}" for psnrs, _ in figures)
        left = "".join(f"{_middle(shares):>9}" for _, shares in figures)
        spread = "; ".join(_range(shares) for _, shares in figures)
        doubted, seconds = sum(map(bool, said)), time.perf_counter() - began
        print(f"{name:30}{decibels}{left}   {doubted} of {victims}  ({seconds:.0f} s)", flush=True)
        print(f"    unexplained: {spread}")
        if doubted:
            print(f"    {next(filter(None, said))}", flush=True)


def _middle(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{median(known):.1e}" if known else "-"


KINDS = tuple(CASES)[:8]
"""What the threshold is chosen for: a small weight decay hardly misleads, and Adam's signs are told before."""


Verdicts = list[tuple[float, bool]]
"""Of leaks: `unexplained`, and whether they are doubted."""


def verdicts(first: int, apart: int, steps: int) -> tuple[Verdicts, Verdicts]:
    """Of 64 honest leaks, and of 64 misread ones of the same images.

    Args:
        first: training image of the first kind's first victim; the next kind's is `apart` further on.
    """
    honest, misread = Verdicts(), Verdicts()
    for number, name in enumerate(KINDS):
        does, taken = CASES[name]
        true = protocol(**does)
        images, labels = images_from(first + number * apart, 8, true.batch)
        for found, told in ((honest, true), (misread, protocol(**taken))):
            leak = heard(network_of(true), images, labels, true, told)
            _, shares = attacked(leak, images, steps)
            found += [(float("inf" if a is None else a), bool(b)) for a, b in zip(shares, doubts(leak), strict=True)]
            print(f"  {name:30}{'honest' if told is true else 'misread':>9}  {_range(shares)}", flush=True)
    return honest, misread


def threshold(steps: int = 300) -> None:
    """Choose on the images of the table, whose honest and misread leaks these are."""
    honest, misread = verdicts(0, 0, steps)
    cuts = [10 ** (exponent / 20) for exponent in range(-120, 20)]
    wrong = {cut: _wrong(honest, misread, cut) for cut in cuts}
    best = [cut for cut in cuts if wrong[cut] == min(wrong.values())]
    print(f"fewest wrong of {len(honest + misread)}: {min(wrong.values())}, from {best[0]:.1e} to {best[-1]:.1e}")


def count(steps: int = 300) -> None:
    """How many of other images the chosen threshold gets wrong, alone and where a doubt counts as well."""
    honest, misread = verdicts(2000, 16, steps)
    alone, both = _wrong(honest, misread, EXPLAINED), _wrong(honest, misread, EXPLAINED, doubted=True)
    print(f"at {EXPLAINED:g}: {alone} wrong of {len(honest + misread)}; with doubts {both}")


def _wrong(honest: Verdicts, misread: Verdicts, cut: float, doubted: bool = False) -> int:
    """Honest leaks that are told from the rest as misread, and misread ones that are not."""
    told = [[share > cut or (doubted and doubt) for share, doubt in side] for side in (honest, misread)]
    return sum(told[0]) + len(told[1]) - sum(told[1])


def _range(shares: list[float | None]) -> str:
    known = sorted(share for share in shares if share is not None)
    return f"{known[0]:.1e} to {known[-1]:.1e}, median {median(known):.1e}" if known else "-"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"conventions": conventions, "threshold": threshold, "count": count}[sys.argv[1]](
        steps=int((sys.argv[2:] or ["300"])[0])
    )
