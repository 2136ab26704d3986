"""Where the thresholds of identical, recognisable and nothing come from.

Run `python -m fedtap.scenarios.bench.levels --dataset cifar10`.

Images of the training side are attacked, never the victims' side: by attacks that are stopped early, that learned from
few pairs or that see a batch; others have noise added. An identification test says which reconstructions show their
original: those that are nearer to it than to any of 999 public images, by LPIPS (Zhang et al. 2018,
https://arxiv.org/abs/1801.03924). One half of the originals chooses the threshold, the other half judges the levels.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from fedtap.attackers import parse
from fedtap.simulator import scores
from fedtap.simulator.auxiliary import Auxiliary, Pairs, Provenance, gradients
from fedtap.simulator.data.images import Dataset, open_dataset
from fedtap.simulator.data.vision import lpips_alex
from fedtap.simulator.leaks import GradientLeak, Protocol
from fedtap.simulator.models.registry import build

_Batch = Float[Tensor, "images channel height width"]

GALLERY = 1000
"""Images among which a reconstruction's original has to be found, itself included."""

MATCHING = [f"idlg(steps={steps})" for steps in (20, 60, 120, 200, 300, 600)]
MATCHING += [f"inverting_gradients(steps={steps})" for steps in (100, 400)]
LEARNED = (("ridge", 300), ("ridge", 1000), ("coarse_git(epochs=0)", 300))
BATCHED = (("lenet", "idlg(steps=300)", 2), ("mlp", "linear", 10), ("mlp", "linear", 20))
NOISES = (0.05, 0.1, 0.2, 0.4)
QUALITIES = (95, 90, 75, 50)
"""Of JPEG copies, that say how close `identical` is."""


def leak_of(
    model: str, images: Float[Tensor, "victims batch channel height width"], labels: Tensor, classes: int
) -> GradientLeak:
    """What honest clients with these batches send after one step."""
    shape = tuple(images.shape[2:])
    network = build(model, shape, classes, seed=1234)
    names = torch.arange(len(images))
    return GradientLeak(
        observed=gradients(network, images, labels),
        protocol=Protocol(model, shape, classes, images.shape[1]),
        network=build(model, shape, classes),
        weights={name: weight.detach() for name, weight in network.named_parameters()},
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )


def auxiliary_of(dataset: Dataset, pairs: int, folder: Path) -> Auxiliary:
    """Pairs of the public side, under LeNet."""
    images, labels = dataset.auxiliary.batch(slice(pairs))
    leak = leak_of("lenet", images[:, None], labels[:, None], len(dataset.classes))
    about = Provenance(leak.protocol, dataset.name, pairs)
    return Auxiliary.record(folder, about, leak.network, [Pairs(leak, images[:, None], labels[:, None])])


@dataclass(frozen=True)
class _Made:
    """Reconstructions of one kind, in the order of their originals."""

    kind: str
    guess: _Batch
    truth: _Batch


def made(dataset: Dataset, each: int, first: int) -> Iterator[_Made]:
    """Reconstructions of every kind, `each` of them, of other originals for each kind, from the `first` image on."""
    place, classes = first, len(dataset.classes)

    def originals(count: int) -> tuple[_Batch, Tensor]:
        nonlocal place
        index = torch.arange(place, place + count) % len(dataset.train)
        place += count
        return dataset.train.batch(index)

    for name in MATCHING:
        truth, labels = originals(each)
        guess = parse(name)[0](leak_of("lenet", truth[:, None], labels[:, None], classes))
        yield _Made(name, guess.images[:, 0], truth)
    for name, pairs in LEARNED:
        with tempfile.TemporaryDirectory() as folder:
            attack = parse(name)[0].fit(auxiliary_of(dataset, pairs, Path(folder)))
        truth, labels = originals(each)
        guess = attack(leak_of("lenet", truth[:, None], labels[:, None], classes))
        yield _Made(f"{name}, {pairs} pairs", guess.images[:, 0], truth)
    for model, name, batch in BATCHED:
        truth, labels = originals(-(-each // batch) * batch)
        batches = truth.reshape(-1, batch, *truth.shape[1:])
        images = parse(name)[0](leak_of(model, batches, labels.view(-1, batch), classes)).images
        found = torch.cat([some[scores.match(some, real)] for some, real in zip(images, batches, strict=True)])
        yield _Made(f"{name}, batch {batch}", found[:each], truth[:each])
    draw = torch.Generator().manual_seed(0)
    for sigma in NOISES:
        truth, _ = originals(each)
        noisy = truth + sigma * torch.randn(truth.shape, generator=draw)
        yield _Made(f"noise {sigma}", noisy.clamp(0, 1), truth)


def floors(dataset: Dataset, truth: _Batch) -> Iterator[tuple[str, _Batch]]:
    """Guesses that know nothing of their original: all of them have to be nothing."""
    public = dataset.auxiliary.batch(slice(None))[0]
    yield "a blind guess", scores.blind(public).expand_as(truth)
    yield "the public mean", scores.training_mean(public).expand_as(truth)
    yield "grey", torch.full_like(truth, 0.5)
    yield "the original's own mean colour", truth.mean((2, 3), keepdim=True).expand_as(truth)
    yield "another member of the batch", truth.roll(1, dims=0)


def jpeg(images: _Batch, quality: int) -> _Batch:
    """Copies as a JPEG file of this quality holds them."""
    copies = []
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        copies.append(torch.from_numpy(np.array(Image.open(file))).reshape(image.shape).permute(2, 0, 1))
    return torch.stack(copies).float() / 255


def features(images: _Batch) -> Float[Tensor, "images features"]:
    """Vectors whose squared distance is LPIPS: unit-length features, times the root of their weight."""
    network = lpips_alex()
    layers = network.net.forward(network.scaling_layer(2 * images.clamp(0, 1).expand(-1, 3, -1, -1) - 1))  # type: ignore[operator, union-attr]
    found = []
    for place, layer in enumerate(layers):
        unit = layer / (layer.norm(dim=1, keepdim=True) + 1e-10)
        weight = network.lins[place].model[-1].weight.clamp_min(0)  # type: ignore[index, union-attr]
        found.append((unit * (weight / layer[0, 0].numel()).sqrt()).flatten(1))
    return torch.cat(found, 1)


def identified(guess: _Batch, truth: _Batch, others: Float[Tensor, "others features"]) -> Bool[Tensor, " images"]:
    """Whether each guess is nearer to its original than to any of the others."""
    seen = features(guess)
    own = (seen - features(truth)).square().sum(1)
    nearest: Tensor = torch.cdist(seen, others).square().amin(1)
    return own < nearest


def strangers(dataset: Dataset, first: int, count: int = 600) -> tuple[int, int, int]:
    """Of so many different images, how many pairs one of which would count as the other recognised."""
    images = dataset.train.batch(slice(first, first + count))[0]
    seen = features(images)
    near = torch.cdist(seen, seen).square() <= scores.RECOGNISABLE_LPIPS
    one, other = (places for places in near.fill_diagonal_(False).nonzero().unbind(1))
    found = _judged(images[one], images[other], seen[:1]).levels if len(one) else one
    return len(images), int((found >= 1).sum()), len(images) * (len(images) - 1)


@dataclass(frozen=True)
class Judged:
    """Some reconstructions: their scores, levels, and whether they were identified."""

    levels: Tensor
    identified: Tensor
    lpips: Tensor
    otherwise: Tensor
    """Whether all that LPIPS does not say would do for recognisable."""
    without_lpips: Tensor
    """Levels as they would be of images too small for LPIPS."""

    def __getitem__(self, which: Tensor) -> Judged:
        return Judged(**{name: value[which] for name, value in vars(self).items()})


def _judged(guess: _Batch, truth: _Batch, others: Tensor) -> Judged:
    """Score guesses and try to identify them."""
    errors, ssim, lpips = scores.mse(guess, truth), scores.ssim(guess, truth), scores.lpips(guess, truth)
    return Judged(
        scores.levels(guess, truth, errors, ssim, lpips),
        identified(guess, truth, others),
        lpips,
        scores.levels(guess, truth, errors, ssim, torch.zeros_like(lpips)) >= 1,
        scores.levels(guess, truth, errors, ssim, None),
    )


def main(
    dataset: Annotated[str, typer.Option(help="As of `fedtap run`; 32 pixels a side or more.")] = "cifar10",
    each: Annotated[int, typer.Option(min=2, help="Reconstructions of each kind; half of them judge.")] = 24,
    first: Annotated[int, typer.Option(min=0, help="The first training image that is used.")] = 0,
    data_root: Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT")] = Path("data"),
) -> None:
    """Choose the threshold on one half, and print how often levels and identification agree on the other."""
    torch.set_num_threads(1)
    played = open_dataset(dataset, data_root)
    draw = torch.Generator().manual_seed(0)
    others = features(played.auxiliary.batch(torch.randperm(len(played.auxiliary), generator=draw)[: GALLERY - 1])[0])
    kinds: dict[str, Judged] = {}
    print(f"{'reconstruction':<36} {'LPIPS, median':>14} {'identified':>11} {'recognisable':>13} {'identical':>10}")
    for some in made(played, each, first):
        kinds[some.kind] = found = _judged(some.guess, some.truth, others)
        shares = (found.identified, found.levels >= 1, found.levels == 2)
        one, two, three = (f"{float(share.double().mean()):.0%}" for share in shares)
        print(f"{some.kind:<36} {float(found.lpips.median()):>14.3f} {one:>11} {two:>13} {three:>10}", flush=True)
    whole = Judged(**{name: torch.cat([vars(one)[name] for one in kinds.values()]) for name in vars(found)})
    place = torch.arange(each).repeat(len(kinds))
    choosing, judging = whole[place % 2 == 0], whole[place % 2 == 1]
    tried = [step / 200 for step in range(4, 41)]
    rights = [
        float((((choosing.lpips <= value) & choosing.otherwise) == choosing.identified).double().mean())
        for value in tried
    ]
    best = max(rights)
    values = [value for value, right in zip(tried, rights, strict=True) if right == best]
    print(f"\nbest threshold of LPIPS on the choosing half ({len(choosing.lpips)}): {values} with {best:.1%}")
    print(f"judging half ({len(judging.lpips)}), thresholds in force: {scores.LEVELLED}")
    print(f"{'':<16}{'identified':>12}{'not':>8}")
    for level, name in reversed(list(enumerate(scores.LEVELS))):
        yes = int(((judging.levels == level) & judging.identified).sum())
        print(f"{name:<16}{yes:>12}{int((judging.levels == level).sum()) - yes:>8}")
    for name, levels in (("levels", judging.levels), ("levels without LPIPS", judging.without_lpips)):
        right = int(((levels >= 1) == judging.identified).sum())
        low, high = scores.limits(right, len(levels), 0.025)
        print(f"{name}: right in {right} of {len(levels)}, {right / len(levels):.1%} [{low:.1%}–{high:.1%}]")
    truth = played.train.batch(slice(first, first + 200))[0]
    for name, guess in floors(played, truth):
        found = _judged(guess, truth, others)
        print(f"{name}: {int((found.levels >= 1).sum())} of {len(truth)} recognisable")
    print("two different images of the same {}: {} of {} pairs recognisable".format(*strangers(played, first)))
    for quality in QUALITIES:
        found = _judged(jpeg(truth, quality), truth, others)
        print(f"a JPEG copy of quality {quality}: {int((found.levels == 2).sum())} of {len(truth)} identical")


if __name__ == "__main__":
    typer.run(main)
