"""What comes of a leak that was misread, and how far `unexplained` tells it: the figures of README and soundness.py.

    python -m tests.misread conventions [steps]     a client of each convention: misread, once said, beside fedtap's own
    python -m tests.misread threshold [steps]       `unexplained` of honest and misread leaks, on training images

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

from attackers.idlg import IDLG
from simulator import scores
from simulator.leaks import Leak, Protocol
from simulator.models import build
from simulator.soundness import EXPLAINED, doubts, unexplained
from simulator.worlds import cifar10
from tests.clients import heard, protocol

FOUR, STEPS = {"batch": 4}, {"steps": 4, "learning_rate": 0.01}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "range [-1, 1]": ({"low": -1.0, "high": 1.0}, {}),
    "ImageNet's mean and std": ({"low": (-2.12, -2.04, -1.80), "high": (2.25, 2.43, 2.64)}, {}),
    "bce": ({"loss": "bce"}, {}),
    "mse": ({"loss": "mse"}, {}),
    "sum over 4": ({**FOUR, "reduction": "sum"}, FOUR),
    "batch 4, said 1": (FOUR, {}),
    "weight decay 5e-4": ({"weight_decay": 5e-4}, {}),
    "weight decay 0.01": ({"weight_decay": 0.01}, {}),
    "nesterov 0.9": ({"momentum": 0.9, "nesterov": True}, {}),
    "momentum 0.9, 4 steps": ({**STEPS, "momentum": 0.9}, STEPS),
    "weight decay 0.01, 4 steps": ({**STEPS, "weight_decay": 0.01}, STEPS),
    "momentum and decay, 4 steps": ({**STEPS, "momentum": 0.9, "weight_decay": 5e-4}, STEPS),
    "4 steps, said 1": (STEPS, {"learning_rate": 0.01}),
    "4 steps of 0.1, said 1": ({"steps": 4}, {}),
    "adam": ({"optimiser": "adam"}, {}),
    "BatchNorm eval, batch 4": ({**FOUR, "model": "tests.misread:normed", "batchnorm": "eval"}, FOUR),
    "BatchNorm eval": ({"model": "tests.misread:normed", "batchnorm": "eval"}, {}),
}
"""Name -> what the client does, and what it is taken for; both beside one image and one step of plain SGD."""

OWN = ("model", "batch", "steps", "learning_rate")
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
    if told.model == "tests.misread:normed":
        for parameter in made.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=draw)
        norm = made.get_submodule("1")
        norm.running_mean.uniform_(-0.5, 0.5, generator=draw)  # type: ignore[union-attr,operator]
        norm.running_var.uniform_(0.5, 2, generator=draw)  # type: ignore[union-attr,operator]
    return made


def images_from(first: int, victims: int, batch: int) -> tuple[Tensor, Tensor]:
    """Training images and labels of CIFAR-10, `victims batch ...`."""
    side = cifar10(Path(os.environ["FEDTAP_DATA_ROOT"])).public
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
        doubted, seconds = sum(map(bool, said)), time.perf_counter() - began
        print(f"{name:30}{decibels}{left}   {doubted} of {victims}  ({seconds:.0f} s)", flush=True)
        if doubted:
            print(f"    {next(filter(None, said))}")


def _middle(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{median(known):.1e}" if known else "-"


KINDS = (
    "range [-1, 1]",
    "ImageNet's mean and std",
    "bce",
    "mse",
    "weight decay 0.01",
    "nesterov 0.9",
    "momentum 0.9, 4 steps",
    "4 steps of 0.1, said 1",
)
"""What the threshold is chosen on: every eighth leak is one of these, told of truly or not."""


def shares_of(first: int, steps: int) -> tuple[list[float], list[float]]:
    """`unexplained` of 64 honest leaks and of 64 misread ones of the same images, from this one on."""
    honest, misread = list[float](), list[float]()
    for number, name in enumerate(KINDS):
        does, taken = CASES[name]
        true = protocol(**does)
        images, labels = images_from(first + 8 * number, 8, 1)
        network = network_of(true)
        for found, told in ((honest, true), (misread, protocol(**taken))):
            _, shares = attacked(heard(network, images, labels, true, told), images, steps)
            found += [share for share in shares if share is not None]
            print(f"  {name:30}{'honest' if told is true else 'misread':>9}  {_range(shares)}", flush=True)
    return honest, misread


def threshold(steps: int = 300) -> None:
    """Choose on training images 1,000 to 1,063, count what is wrong on 2,000 to 2,063."""
    honest, misread = shares_of(1000, steps)
    cuts = [10 ** (exponent / 20) for exponent in range(-120, 20)]
    wrong = {cut: _wrong(honest, misread, cut) for cut in cuts}
    best = [cut for cut in cuts if wrong[cut] == min(wrong.values())]
    print(f"fewest wrong of {len(honest + misread)}: {min(wrong.values())}, from {best[0]:.1e} to {best[-1]:.1e}")
    honest, misread = shares_of(2000, steps)
    for cut in (EXPLAINED, math.sqrt(best[0] * best[-1])):
        print(f"on other images, at {cut:.1e}: {_wrong(honest, misread, cut)} wrong of {len(honest + misread)}")


def _wrong(honest: list[float], misread: list[float], cut: float) -> int:
    return sum(share > cut for share in honest) + sum(share <= cut for share in misread)


def _range(shares: list[float | None]) -> str:
    known = sorted(share for share in shares if share is not None)
    return f"{known[0]:.1e} to {known[-1]:.1e}, median {median(known):.1e}" if known else "-"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"conventions": conventions, "threshold": threshold}[sys.argv[1]](steps=int((sys.argv[2:] or ["300"])[0]))
