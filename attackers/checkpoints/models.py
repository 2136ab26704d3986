"""Both ends of a fine-tuning: the model that was broadcast and the one that came back, and what they say of
documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import Corpus, Selector
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, Leak, Tensors
from fedtap.simulator.models.text_model import IGNORED, PAD, TextModel, filled

LOGITS = 2**25
"""Numbers of a batch's logits at once: 128 MiB of float32."""


def model(leak: CheckpointLeak, tensors: Tensors, device: str) -> TextModel:
    """The leak's architecture with these parameters and buffers."""
    made = filled(leak.network, tensors).to(device).eval().requires_grad_(False)
    assert isinstance(made, TextModel)
    return made


def ends(leak: CheckpointLeak, device: str) -> tuple[TextModel, TextModel]:
    """The models that were sent to, and came back from, the one victim of this leak."""
    return model(leak, leak.broadcast(0), device), model(leak, leak.tuned(0), device)


def labelled(tuned: TextModel, ids: Int[Tensor, "documents tokens"]) -> Int[Tensor, "documents"] | None:
    """What a tuned classifier says that documents are; None of a model of the next token, which needs no labels."""
    return None if tuned.generative else tuned.logits(tuned.features(ids))[:, 0].argmax(1)


def at_once(net: TextModel, tokens: int) -> int:
    """Documents whose logits fit into memory."""
    outputs = len(dict(net.named_parameters())[net.output]) if net.output else 2**15
    return max(1, min(512, LOGITS // (outputs * (tokens + 1 if net.generative else 1))))


def losses(net: TextModel, tuned: TextModel) -> Callable[[Int[Tensor, "documents tokens"]], Float[Tensor, "documents"]]:
    """A model's loss as a function of documents, whose labels are those that the tuned one gives."""
    return lambda ids: net.losses(ids, labelled(tuned, ids))


def loss_drops(
    attack: Selector, leak: CheckpointLeak, corpus: Corpus, before: TextModel, after: TextModel
) -> tuple[Float[Tensor, "documents"], Float[Tensor, "candidates"], Float[Tensor, "candidates"]]:
    """``loss at θ_0 - loss at θ_f`` of the corpus, and both losses of its candidates."""
    batch = at_once(after, corpus.ids.shape[1])
    first, last = (
        corpus.passed(attack.pass_named(leak, name), losses(net, after), batch)
        for name, net in (("before", before), ("after", after))
    )
    return first - last, corpus.asked(losses(before, after), batch), corpus.asked(losses(after, after), batch)


def embedded(net: TextModel, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents width"]:
    """The mean over a document's places of the features from which a model predicts."""
    with torch.no_grad():
        parts = [_pooled(net, some) for some in torch.split(ids, at_once(net, ids.shape[1]))]
    return torch.cat(parts)


def _pooled(net: TextModel, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents width"]:
    features = net.features(ids)
    if not net.generative:
        return features[:, 0]
    real = (net.targets(ids, None) != IGNORED)[:, :, None]
    return (features * real).sum(1) / real.sum(1).clamp_min(1)


def labels_for(tuned: TextModel, ids: Int[Tensor, "documents tokens"]) -> Int[Tensor, "documents"] | None:
    """As `labelled`, of any number of documents, on the CPU."""
    if tuned.generative:
        return None
    device = next(tuned.parameters()).device
    with torch.no_grad():
        parts = [labelled(tuned, some.to(device)) for some in torch.split(ids, at_once(tuned, ids.shape[1]))]
    return torch.cat(parts).cpu()  # type: ignore[arg-type]


def labels_of(corpus: Corpus, tuned: TextModel, chosen: Int[Tensor, "selected"]) -> Int[Tensor, "selected"]:
    """What the tuned model says that chosen documents are; 0 where there are no labels."""
    labels = labels_for(tuned, corpus.ids[chosen])
    return torch.zeros_like(chosen) if labels is None else labels


SAMPLED = 200
"""Documents that are drawn from a tuned model, by which attacks learn what it was tuned on."""


def written_by(tuned: TextModel, corpus: Corpus, seed: int, many: int = SAMPLED) -> Int[Tensor, "many tokens"]:
    """Documents drawn from a model of the next token, each begun with the first token of a random public document."""
    draw = generator(seed, "written")
    begun = torch.randint(len(corpus), (many,), generator=draw)
    ids = corpus.ids[begun, :1].to(corpus.device)
    with torch.no_grad():
        for _ in range(corpus.ids.shape[1] - 1):
            # what follows an end is padding, of which the draw is thrown away
            parts = [tuned.logits(tuned.features(some)[:, -1]).softmax(1).cpu() for some in torch.split(ids, 64)]
            drawn = torch.multinomial(torch.cat(parts), 1, generator=draw).to(ids.device)
            over = (ids[:, -1:] == PAD) | (drawn == tuned.end)
            ids = torch.cat([ids, torch.where(over, PAD, drawn)], 1)
    return ids


def check_generative(attack: Selector, leak: Leak) -> None:
    """Refuse a classifier, which writes no documents.

    Raises:
        FedtapError: with the attacks that do without.
    """
    if isinstance(leak.network, TextModel) and not leak.network.generative:
        raise FedtapError(
            f"{attack.name} compares documents with those that the tuned model writes, and a classifier writes none: "
            "use select, lowest_loss or loss_drop."
        )
