"""Model solutions of the course's exercises, and three typical wrong answers to each: from what a student is given
alone. They stand with the tests, so that the package holds none."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq

import fedtap
from fedtap.attackers.baselines.ridge import Ridge
from fedtap.scenarios.course.learned_attackers import recorded_pairs
from fedtap.simulator import scores
from fedtap.simulator.defences.accountant import Gaussian

Given = dict[str, Any]


def pixels(told: Given) -> Any:
    """A unit that learned something: its row of ∂W over its ∂b."""
    unit = int(told["bias_gradient"].abs().argmax())
    return (told["weight_gradient"][unit] / told["bias_gradient"][unit]).tolist()


def dlg(told: Given) -> Any:
    return fedtap.attack(told["leak"], "idlg(steps=200)").images[0, 0].tolist()


def labels(told: Given) -> Any:
    last = told["before"] - told["after"]
    return [*told["bias_gradients"].argmin(1).tolist(), int(last.argmin())]


def predict(told: Given) -> Any:
    loss = torch.nn.functional.cross_entropy(told["model"](told["images"]), told["labels"])
    sent = [part.bfloat16().float() for part in torch.autograd.grad(loss, list(told["model"].parameters()))]
    found = fedtap.attack(fedtap.leak(told["model"], sent, shape=tuple(told["images"].shape[1:])), "linear")
    return {"predicted": 20, "measured": float(scores.psnr(scores.mse(found.images[0], told["images"])))}


def crossing(told: Given) -> Any:
    for batch in told["batches"]:
        back = 0
        for some, classes in zip(told["images"].split(batch), told["labels"].split(batch), strict=True):
            loss = torch.nn.functional.cross_entropy(told["model"](some), classes)
            sent = torch.autograd.grad(loss, list(told["model"].parameters()))
            leak = fedtap.leak(told["model"], sent, shape=tuple(some.shape[1:]), batch=batch)
            found = fedtap.attack(leak, "linear").images[0]
            error = (found[None] - some[:, None]).square().flatten(2).mean(2).min(1).values
            back += int((scores.psnr(error) >= 30).sum())
        if back < len(told["images"]) / 2:
            return batch
    return 2 * told["batches"][-1]


def collusion(told: Given) -> Any:
    first = told["first_mean"] * len(told["first_round"])
    second = told["second_mean"] * len(told["second_round"])
    return (first - (second - told["colluders_update"])).tolist()


ESSAY = """An attack on a gradient works best on one image and one step. With a larger batch the gradient is a mean over
many images, and fewer hidden units are switched on by one image alone, so that less comes back. Several local steps or
epochs change it too: the update is then no gradient at one set of weights, and an attacker has to replay the whole
training. Secure aggregation shows the server the sum of all clients and nothing else. Yet two sums whose clients differ
by one are subtracted, and that client stands alone; a colluder who tells its own update helps with this. Finally, that
an attack fails does not prove anything about privacy. A stronger one may exist, and only a guarantee speaks of all."""


def attacker(told: Given) -> Any:
    def far(release: Any, canary: Any) -> float:
        return float((release - canary).square().sum())

    return ["a" if far(one, told["a"]) < far(one, told["b"]) else "b" for one in told["releases"]]


def sigma(told: Given) -> Any:
    def excess(value: float) -> float:
        made = Gaussian(value, told["clip"], "client", told["adjacency"], told["rounds"])
        return made.guarantee(told["delta"]).epsilon - told["epsilon"]

    return brentq(excess, 0.1, 1000)


def broken(told: Given) -> Any:
    half, unclipped, repeated = told["faults"]
    for letter, outputs in told["outputs"].items():
        spread, length = float(outputs.std(0).mean()), float(outputs.mean(0).norm())
        if spread < 0.01 * told["sigma"]:
            return {"mechanism": letter, "fault": repeated}
        if spread < 0.8 * told["sigma"]:
            return {"mechanism": letter, "fault": half}
        if length > 3 * told["clip"]:
            return {"mechanism": letter, "fault": unclipped}
    raise AssertionError


def accuracy(told: Given) -> Any:
    """By draws, as a student would: the same noise, scaled, at every ε."""
    from fedtap.simulator.defences.accountant import noise_for

    weights = (told["labels"][:, None] * told["features"]).sum(0)
    noise = torch.randn(4000, len(weights), generator=torch.Generator().manual_seed(0)).double()

    def right(spread: float) -> float:
        scored = (weights + spread * noise) @ told["test_features"].T * told["test_labels"]
        return float((scored > 0).double().mean())

    wanted = right(0.0) - told["lost"]
    grid = [math.exp(power / 20) for power in range(-80, 60)]
    return next(value for value in grid if right(noise_for(value, told["delta"], told["clip"])) >= wanted)


def break_sign(told: Given) -> Any:
    return fedtap.attack(told["leak"], "idlg(steps=120,adaptive=True)").images[0, 0].tolist()


def defence(told: Given) -> Any:
    sent = {}
    for name, tensor in told["gradient"].items():
        least = tensor.abs().flatten().sort(descending=True).values[told["k"] - 1]
        kept = tensor.abs() >= least
        sent[name] = (tensor.sign() * kept * tensor.abs()[kept].mean()).tolist()
    return {"sent": sent, "bound": told["norm"], "epsilon": "infinite"}


QUIZ = (
    "the weights that the server sent",
    "the sum of the clients' updates",
    "from a client that it owns, or pictures of its own at the weights that it knows",
    "it gets worse as the weights drift away from those of the pairs",
    "on public pictures that were held out from its training",
    "it knows the weights before and after, and so the update",
)


def quiz(told: Given) -> Any:
    return [next(letter for letter, choice in one.items() if choice in QUIZ) for one in told.values()]


def beat_ridge(told: Given) -> Any:
    """Unit 1's division, averaged over units."""
    rows, bias = told["leak"].observed["1.weight"], told["leak"].observed["1.bias"]
    found = torch.einsum("vu,vup->vp", bias, rows) / bias.square().sum(1, keepdim=True)
    return found.clamp(0, 1).reshape(-1, 1, *told["leak"].protocol.shape[1:]).tolist()


def ridge(told: Given) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        learned = Ridge().fit(recorded_pairs(told["pairs"], Path(folder)))
    return learned(told["leak"]).images[:, 0].tolist()


def tokens(told: Given) -> Any:
    found = fedtap.attack(told["leak"], "dager").ids[0]
    return [" ".join(told["vocabulary"][token] for token in text) for text in found.tolist()]


def statistics(told: Given) -> Any:
    gram = told["sigma"] ** 2 * torch.linalg.inv(told["covariance"])
    many, total, squares = (float(gram[place]) for place in ((0, 0), (0, 1), (1, 1)))
    return {"records": many, "mean": total / many, "variance": squares / many - (total / many) ** 2}


def audit(told: Given) -> Any:
    found = {}
    for app, seen in told["apps"].items():
        before, reply, x, y = (seen[name] for name in ("before", "reply", "inputs", "targets"))
        if len(reply) > len(before):
            found[app] = "raw data"
        elif not reply.is_floating_point():
            found[app] = "masked"
        else:
            weights, apart = before, []
            for _ in range(5):
                weights = weights - told["learning_rate"] * x.T @ (x @ weights - y) / len(y)
                apart.append(float((weights - reply).norm()))
            verdicts = {0: "gradient", 4: "update"}
            found[app] = verdicts.get(apart.index(min(apart)), "noised") if min(apart) < 1e-4 else "noised"
    return found


SOLUTIONS: dict[int, dict[str, Callable[[Given], Any]]] = {
    1: {"pixels": pixels, "dlg": dlg, "labels": labels, "predict": predict},
    2: {"crossing": crossing, "collusion": collusion, "essay": lambda told: ESSAY},
    3: {"attacker": attacker, "sigma": sigma, "broken": broken, "accuracy": accuracy},
    4: {"break_sign": break_sign, "defence": defence},
    5: {"quiz": quiz, "beat_ridge": beat_ridge},
    6: {"tokens": tokens, "statistics": statistics, "audit": audit},
}
"""Unit -> exercise -> from what is given to an answer that scores 1."""


def grey(*shape: int) -> Any:
    return torch.full(shape, 0.5).tolist()


WRONG: tuple[tuple[int, str, str, Callable[[Given], Any], float], ...] = (
    (1, "pixels", "a row of ∂W as it is", lambda told: told["weight_gradient"][0].tolist(), 0.0),
    (1, "pixels", "the dead unit's row over its ∂b", lambda told: dead_unit(told), 0.0),
    (1, "pixels", "one pixel misread", lambda told: [pixels(told)[0] + 0.1, *pixels(told)[1:]], 5 / 6),
    (1, "dlg", "one colour", lambda told: grey(3, 16, 16), 0.0),
    (1, "dlg", "the random start", lambda told: random_picture(), 0.0),
    (1, "dlg", "a pale likeness", lambda told: pale(dlg(told)), 0.5),
    (1, "labels", "weights taken for a gradient", lambda told: naive_labels(told), 0.75),
    (1, "labels", "classes counted from 1", lambda told: [one + 1 for one in labels(told)], 0.0),
    (1, "labels", "the largest entry", lambda told: largest_labels(told), 0.0),
    (1, "predict", "a prediction alone", lambda told: {"predicted": 10}, 0.25),
    (1, "predict", "a measurement alone", lambda told: {"measured": predict(told)["measured"]}, 0.75),
    (1, "predict", "measured in float32", lambda told: {"predicted": 20, "measured": 100.0}, 0.25),
    (2, "crossing", "twice too late", lambda told: 2 * crossing(told), 0.5),
    (2, "crossing", "half as large", lambda told: crossing(told) / 2, 0.5),
    (2, "crossing", "four times too late", lambda told: 4 * crossing(told), 0.0),
    (2, "collusion", "means for sums", lambda told: (told["first_mean"] - told["second_mean"]).tolist(), 0.0),
    (2, "collusion", "the colluder forgotten", lambda told: forgotten(told), 0.0),
    (2, "collusion", "one entry's sign", lambda told: [-collusion(told)[0], *collusion(told)[1:]], 0.75),
    (2, "essay", "a text without the last point", lambda told: ESSAY.partition("Finally")[0], 0.8),
    (2, "essay", "one sentence", lambda told: ESSAY.partition(". ")[0], 0.0),
    (2, "essay", "a sentence again and again", lambda told: "A batch hides what epochs and sums show. " * 20, 0.0),
    (3, "attacker", "always a", lambda told: ["a"] * 12, 0.0),
    (3, "attacker", "one mistaken", lambda told: [*swapped(attacker(told)[:1]), *attacker(told)[1:]], 5 / 6),
    (3, "attacker", "the farther canary", lambda told: swapped(attacker(told)), 0.0),
    (3, "sigma", "one round's noise for all", lambda told: sigma(told | {"rounds": 1}), 0.0),
    (3, "sigma", "a fifth too much", lambda told: 1.2 * sigma(told), 0.5),
    (3, "sigma", "rounds added as they are, not by the root", lambda told: sigma(told) * told["rounds"] ** 0.5, 0.0),
    (3, "broken", "the right one for no reason", lambda told: broken(told) | {"fault": "noise"}, 0.5),
    (3, "broken", "a fault of another one", lambda told: broken(told) | {"mechanism": "E"}, 0.5),
    (3, "broken", "none", lambda told: {"mechanism": "none", "fault": "none"}, 0.0),
    (3, "accuracy", "half as large", lambda told: accuracy(told) / 2, 0.5),
    (3, "accuracy", "ten times too large", lambda told: 10 * accuracy(told), 0.0),
    (3, "accuracy", "no privacy for no loss", lambda told: 0, 0.0),
    (4, "break_sign", "one colour", lambda told: grey(3, 16, 16), 0.25),
    (4, "break_sign", "the plain attack", lambda told: plain_attack(told), 0.0),
    (4, "break_sign", "a column too few", lambda told: torch.zeros(3, 16, 15).tolist(), 0.0),
    (4, "defence", "entries as they are", lambda told: defence(told) | {"sent": plain_top(told)}, 0.4),
    (4, "defence", "an ε of 1", lambda told: defence(told) | {"epsilon": 1.0}, 0.8),
    (4, "defence", "twice the norm", lambda told: defence(told) | {"bound": 2 * told["norm"]}, 0.8),
    (5, "quiz", "two letters that are none", lambda told: ["z", "z", *quiz(told)[2:]], 4 / 6),
    (5, "quiz", "the last one wrong", lambda told: [*quiz(told)[:-1], "z"], 5 / 6),
    (5, "quiz", "one left out", lambda told: quiz(told)[1:], 0.0),
    (5, "beat_ridge", "the baseline itself", ridge, 0.5),
    (5, "beat_ridge", "one colour", lambda told: grey(16, 1, 8, 8), 0.0),
    (5, "beat_ridge", "pictures of the pairs", lambda told: told["pairs"].images[:16, 0].tolist(), 0.0),
    (6, "tokens", "the first text alone", lambda told: tokens(told)[:1], 1 / 8),
    (6, "tokens", "numbers for words", lambda told: fedtap.attack(told["leak"], "dager").ids[0].tolist(), 0.0),
    (6, "tokens", "each text backwards", lambda told: [text.split()[::-1] for text in tokens(told)], 0.0),
    (6, "statistics", "the variance left out", lambda told: statistics(told) | {"variance": None}, 2 / 3),
    (6, "statistics", "σ² forgotten", lambda told: statistics(told | {"sigma": 1.0}), 2 / 3),
    (6, "statistics", "a standard deviation", lambda told: spread(statistics(told)), 2 / 3),
    (6, "audit", "a gradient throughout", lambda told: dict.fromkeys("ABCDE", "gradient"), 0.2),
    (6, "audit", "noise taken for a mask", lambda told: renamed(audit(told), "noised", "masked"), 0.8),
    (6, "audit", "five steps taken for noise", lambda told: renamed(audit(told), "update", "noised"), 0.8),
)
"""Unit, exercise, what is wrong, from what is given to the answer, and its score."""


def naive_labels(told: Given) -> Any:
    """The last client's step taken for its gradient, which has the other sign."""
    return [*labels(told)[:3], int((told["after"] - told["before"]).argmin())]


def largest_labels(told: Given) -> Any:
    return [*told["bias_gradients"].argmax(1).tolist(), int((told["before"] - told["after"]).argmax())]


def dead_unit(told: Given) -> Any:
    unit = int(told["bias_gradient"].abs().argmin())
    return (told["weight_gradient"][unit] / told["bias_gradient"][unit]).tolist()


def random_picture() -> Any:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).tolist()


def pale(picture: Any) -> Any:
    """Half way to one colour."""
    found = torch.tensor(picture)
    return ((found + found.mean((1, 2), keepdim=True)) / 2).tolist()


def forgotten(told: Given) -> Any:
    """The difference of the sums, the colluder's update still in it."""
    return (told["first_mean"] * len(told["first_round"]) - told["second_mean"] * len(told["second_round"])).tolist()


def swapped(letters: list[str]) -> list[str]:
    return ["b" if letter == "a" else "a" for letter in letters]


def plain_attack(told: Given) -> Any:
    return fedtap.attack(told["leak"], told["plain"]).images[0, 0].tolist()


def spread(found: dict[str, float]) -> Any:
    return found | {"variance": math.sqrt(found["variance"])}


def renamed(found: dict[str, str], verdict: str, other: str) -> Any:
    return {app: other if said == verdict else said for app, said in found.items()}


def plain_top(told: Given) -> Any:
    sent = {}
    for name, tensor in told["gradient"].items():
        least = tensor.abs().flatten().sort(descending=True).values[told["k"] - 1]
        sent[name] = torch.where(tensor.abs() >= least, tensor, 0.0).tolist()
    return sent
