"""SELECT: gradients of documents against autograd, the rules against plain loops, and where it must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.attackers import parse
from fedtap.attackers.checkpoints import select
from fedtap.attackers.checkpoints.per_document import DocumentGradients, LastLayer, WholeModel
from fedtap.attackers.checkpoints.select import Select, greedy
from fedtap.simulator.corpus import Selection
from fedtap.simulator.data.documents import Documents
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak
from fedtap.simulator.models.language import LanguageModel, build_language
from fedtap.simulator.models.text_model import IGNORED, PAD
from tests.support.checkpoint_leaks import (
    CLASSES,
    LONGER,
    LORA,
    architecture,
    corpus,
    leak_of,
    leak_on,
    on_topic,
    precision,
    public,
    unmoved,
)

PIECES, TOKENS = 11, 5
NAMES = {
    "decoder": "decoder(width=8, layers=1, heads=2)",
    "bert": f"bert(vocabulary={PIECES}, width=8, layers=1, heads=2)",
}


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """As `Attack` sets it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def net(kind: str, seed: int = 0) -> LanguageModel:
    """With weights far from 0, so that errors are not all alike."""
    made = build_language(NAMES[kind], TOKENS, PIECES if kind == "decoder" else 3, seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return made.eval()


def texts(kind: str) -> tuple[Tensor, Tensor | None]:
    """Seven documents of two to five tokens, and classes."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, PIECES, (7, TOKENS), generator=draw)
    ids[torch.arange(TOKENS) >= torch.tensor([5, 4, 3, 2, 5, 2, 4])[:, None]] = PAD
    return ids, None if kind == "decoder" else torch.arange(7) % 3


def own_gradients(
    nets: Sequence[LanguageModel], ids: Tensor, labels: Tensor | None, names: Sequence[str], tokens: str = "all"
) -> list[list[Tensor]]:
    """Of each document, the mean over models of autograd's gradients: one document and one model at a time."""
    rows = []
    for number in range(len(ids)):
        one, label = ids[number : number + 1], None if labels is None else labels[number : number + 1]
        each = []
        for model in nets:
            loss, held = model.losses(one, label)[0], dict(model.named_parameters())
            if tokens == "last":
                targets = model.targets(one, label)[0]
                marks = {IGNORED} | ({model.end} if labels is None else set())  # the end is no token of the document
                place = max(at for at, target in enumerate(targets.tolist()) if target not in marks)
                loss = F.cross_entropy(model.logits(model.features(one))[0, place], targets[place])
            each.append(torch.autograd.grad(loss, [held[name] for name in names]))
        rows.append([torch.stack(same).mean(0) for same in zip(*each, strict=True)])
    return rows


def nets_of(kind: str, many: int) -> list[LanguageModel]:
    return [net(kind, seed) for seed in range(many)]


def last_layer(kind: str, many: int = 1, tokens: str = "all") -> tuple[LastLayer, Tensor]:
    """What is tested, and `documents outputs width` by autograd, with a column more for a bias."""
    ids, labels = texts(kind)
    names = ["head.weight"] + ["head.bias"] * (kind == "bert")
    rows = own_gradients(nets_of(kind, many), ids, labels, names, tokens)
    truth = torch.stack([torch.cat([row[0], *(one[:, None] for one in row[1:])], 1) for row in rows])
    return LastLayer(nets_of(kind, many), tokens), truth


def whole_model(kind: str, many: int = 1) -> tuple[WholeModel, Tensor]:
    ids, labels = texts(kind)
    names = [name for name, _ in net(kind).named_parameters()]
    rows = own_gradients(nets_of(kind, many), ids, labels, names)
    return WholeModel(nets_of(kind, many), names), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


CASES = [
    *((last_layer, kind, many, tokens) for kind in NAMES for many in (1, 3) for tokens in ("all", "last")),
    *((whole_model, kind, many) for kind in NAMES for many in (1, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case[0].__name__, *case[1:]))))
def test_gradients_of_documents_are_autograds(case: tuple) -> None:
    make, kind, *more = case
    gradients, truth = make(kind, *more)
    ids, labels = texts(kind)
    directions = [torch.randn(truth.shape[1:], generator=torch.Generator().manual_seed(n)) for n in range(2)]
    with torch.no_grad():
        products = gradients.products(ids, labels, directions)
        laid_out, total = gradients.laid_out(ids, labels), gradients.total(ids, labels)
    wanted = [(truth * direction).flatten(1).sum(1) for direction in directions]
    wanted.append(truth.flatten(1).square().sum(1))
    torch.testing.assert_close(products, torch.stack(wanted, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(laid_out, truth.flatten(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, truth.sum(0), rtol=1e-4, atol=1e-6)
    assert products[:, -1].min() > 1e-4


@pytest.mark.parametrize("kind", NAMES)
def test_padding_changes_no_gradient(kind: str) -> None:
    ids, labels = texts(kind)
    short = ids[3:4, :3], None if labels is None else labels[3:4]
    with torch.no_grad():
        longer = LastLayer([net(kind)]).laid_out(ids, labels)[3:4]
        torch.testing.assert_close(LastLayer([net(kind)]).laid_out(*short), longer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [last_layer, whole_model])
@pytest.mark.parametrize("kind", NAMES)
def test_sketches_are_unbiased_and_sharpen(make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    gradients: DocumentGradients = make(kind)[0]
    ids, labels = texts(kind)
    with torch.no_grad():
        rows = gradients.laid_out(ids, labels)
        monkeypatch.setattr(WholeModel, "laid_out", lambda *_: rows)  # it does not depend on the seed
        truth, spread = rows @ rows.T, []
        for size, many in ((16, 400), (512, 40)):
            each = [gradients.sketches(ids, labels, size, seed) for seed in range(many)]
            drawn = torch.stack([one @ one.T for one in each])
            error = drawn.std(0) / many**0.5
            assert ((drawn.mean(0) - truth).abs() < 5 * error).all()
            spread.append(float(drawn.std(0).mean()))
    assert spread[1] < 0.3 * spread[0]  # as 1 / sqrt(size), which is 0.18
    assert spread[1] > 0


@pytest.mark.parametrize("make", [last_layer, whole_model])
def test_a_directions_sketch_is_that_of_its_parts(make) -> None:  # type: ignore[no-untyped-def]
    gradients: DocumentGradients = make("bert")[0]
    ids, labels = texts("bert")
    with torch.no_grad():
        parts = gradients.sketches(ids, labels, 64, 3)
        torch.testing.assert_close(gradients.sketch(gradients.total(ids, labels), 64, 3), parts.sum(0))
        assert not torch.allclose(parts, gradients.sketches(ids, labels, 64, 4), rtol=0.1)


def test_what_is_laid_out_in_blocks_is_projected_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, _ = whole_model("decoder")
    ids, _ = texts("decoder")
    monkeypatch.setattr("fedtap.attackers.checkpoints.per_document.LAID_OUT", 4 * 16 * 50)
    with torch.no_grad():
        parts = gradients.sketches(ids, None, 16, 0)
        torch.testing.assert_close(gradients.sketch(gradients.total(ids, None), 16, 0), parts.sum(0))
    assert 1 <= gradients.batch < 64


def test_a_last_layer_that_nobody_trained_is_refused() -> None:
    held = dict(net("decoder").named_parameters())
    with pytest.raises(FedtapError, match=r"came back as it was sent.*use layer='all'"):
        LastLayer([net("decoder")]).change(held, held)
    frozen = build_language("gpt(width=8, layers=1, heads=2)", TOKENS, PIECES, 0)
    with pytest.raises(FedtapError, match="last layer of this model is frozen"):
        LastLayer([frozen]).change({}, {})


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()).clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(1, 9),
    size=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["random", "in pairs", "opposite", "with zeros"]),
    data=st.data(),
)
def test_greedy_takes_the_best_of_each_step(
    documents: int, size: int, seed: int, kind: str, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, target = torch.randn(documents, size, generator=draw), torch.randn(size, generator=draw)
    if kind != "random":
        rows = torch.cat([rows, {"in pairs": rows, "opposite": -rows, "with zeros": 0 * rows}[kind]])
    most = data.draw(st.integers(1, len(rows)))
    chosen = greedy(rows, target, most).tolist()
    assert len(set(chosen)) == most
    for number in range(most):
        before = rows[chosen[:number]].double().sum(0)
        rest = [at for at in range(len(rows)) if at not in chosen[:number]]
        best = max(cosine(before + rows[at], target) for at in rest)
        assert cosine(before + rows[chosen[number]], target) > best - 2e-3


def run(leak: CheckpointLeak, candidates: Tensor | None = None, selected: int = 20, **options: object) -> Selection:
    return Select(**options).fit(corpus(selected, candidates))(leak)  # type: ignore[arg-type]


TOPICS = (0, 1)


def true_cosines(leak: CheckpointLeak, ids: Tensor, at: Sequence[float], tokens: str = "all") -> Tensor:
    """Of the first victim, by autograd, at these shares of the way from the broadcast weights to the tuned ones."""
    before, after = leak.broadcast(0), leak.tuned(0)
    nets = []
    for share in at:
        made = architecture("decoder", 0)
        made.load_state_dict({name: (1 - share) * before[name] + share * after[name] for name in before})
        nets.append(made)
    rows = own_gradients(nets, ids, None, ["head.weight"], tokens)
    change = before["head.weight"] - after["head.weight"]
    return torch.tensor([cosine(row[0].flatten(), change.flatten()) for row in rows])


@pytest.mark.parametrize(
    ("options", "at"),
    [({}, (0.0,)), ({"at": "tuned"}, (1.0,)), ({"pseudo_experts": 1}, (0.0, 0.5)), ({"tokens": "last"}, (0.0,))],
    ids=str,
)
def test_the_top_is_that_of_the_true_cosines(options: dict[str, object], at: Sequence[float]) -> None:
    leak, ids = leak_on(TOPICS), public()[0][::4]
    few = dataclasses.replace(corpus(5, on_topic(0, 6, 9).ids), ids=ids)
    found = Select(**options).fit(few)(leak[0])  # type: ignore[arg-type]
    tokens = str(options.get("tokens", "all"))
    wanted = true_cosines(leak, ids, at, tokens)
    assert found.chosen[0].tolist() == wanted.argsort(descending=True)[:5].tolist()
    torch.testing.assert_close(
        found.membership[0], true_cosines(leak, few.candidates, at, tokens), rtol=1e-3, atol=1e-5
    )
    assert 1e-3 < float(wanted.max() - wanted.min()) < 2


def test_the_objective_is_that_of_the_chosen_sum() -> None:
    leak = leak_on(TOPICS)
    found = run(leak[0], selected=7)
    before = leak.broadcast(0)
    made = architecture("decoder", 0)
    made.load_state_dict(before)
    rows = own_gradients([made], public()[0][found.chosen[0]], None, ["head.weight"])
    total = torch.stack([row[0] for row in rows]).sum(0)
    change = before["head.weight"] - leak.tuned(0)["head.weight"]
    assert float(found.objective[0]) == pytest.approx(1 - cosine(total.flatten(), change.flatten()), abs=1e-4)


def test_a_batch_for_each_document_is_the_greedy_rule() -> None:
    leak = leak_on(TOPICS)
    one = run(leak, selected=9, rule="greedy")
    other = run(leak, selected=9, rule="greedy_batches", batches=9)
    assert torch.equal(one.chosen, other.chosen)
    torch.testing.assert_close(one.objective, other.objective)
    assert torch.equal(run(leak, selected=9, rule="greedy_batches", batches=1).chosen, run(leak, selected=9).chosen)


@pytest.mark.parametrize("rule", ["greedy", "greedy_batches"])
def test_greedy_points_at_least_as_well_as_the_top(rule: str) -> None:
    leak = leak_on(TOPICS)
    assert (run(leak, rule=rule, batches=20).objective <= run(leak).objective + 1e-4).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "greedy"},
        {"rule": "greedy_batches"},
        {"at": "tuned"},
        {"layer": "all"},
        {"pseudo_experts": 2},
        {"layer": "all", "rule": "greedy_batches", "batches": 2},
    ],
    ids=str,
)
def test_the_topic_is_found(options: dict[str, object]) -> None:
    found = run(leak_on(TOPICS), **options)
    assert precision(found.chosen, TOPICS) > 0.7
    assert precision(found.chosen, TOPICS[::-1]) < 0.1
    assert all(len(set(one.tolist())) == 20 for one in found.chosen)
    assert not found.labels.any()


@pytest.mark.parametrize("options", [{"layer": "last"}, {"layer": "all"}, {"rule": "greedy"}], ids=str)
def test_a_projection_finds_more_than_chance(options: dict[str, object]) -> None:
    found = run(leak_on(TOPICS), projection=1024, **options)
    assert precision(found.chosen, TOPICS) > 0.4


def test_clients_that_train_on_nothing_are_refused() -> None:
    leak = unmoved(leak_on(TOPICS))
    with pytest.raises(FedtapError, match="came back as it was sent"):
        run(leak)
    with pytest.raises(FedtapError, match="is the one that it was sent, so nothing was learned"):
        run(leak, layer="all")


@pytest.mark.parametrize("options", [{}, {"layer": "all"}, {"rule": "greedy"}], ids=str)
def test_a_random_change_finds_no_topic(options: dict[str, object]) -> None:
    leak, draw = leak_on(TOPICS), torch.Generator().manual_seed(0)
    noise = {name: tensor + torch.randn(tensor.shape, generator=draw) for name, tensor in leak.observed.items()}
    assert precision(run(dataclasses.replace(leak, observed=noise), **options).chosen, TOPICS) < 0.3


def test_a_lora_shows_the_topic_through_all_layers() -> None:
    leak = leak_on(TOPICS, adapter=LORA)
    found = run(leak, layer="all")
    assert precision(found.chosen, TOPICS) > 0.3 > precision(found.chosen, TOPICS[::-1])
    before, after = (dict(made) for made in (leak.broadcast(0), leak.tuned(0)))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"blocks.0.{part}.weight" for part in ("query", "value")}
    with pytest.raises(FedtapError, match=r"clients train others alone: use select\(layer='all'\)"):
        Select().accepts(leak)


def classifier() -> CheckpointLeak:
    both = [on_topic(topic, 8, 2, topic) for topic in range(CLASSES)]
    labels = torch.cat([one.labels for one in both if one.labels is not None])
    return leak_of([Documents(torch.cat([one.ids for one in both]), labels)], "bert", LONGER)


def test_balanced_takes_as_many_of_each_label() -> None:
    leak = classifier()
    found = run(leak, selected=22, rule="balanced")
    counts = torch.bincount(found.labels[0], minlength=CLASSES)
    assert counts.min() == 5
    assert len(set(found.chosen[0].tolist())) == 22
    assert torch.bincount(run(leak, selected=22).labels[0], minlength=CLASSES).max() > counts.max()
    with pytest.raises(FedtapError, match="a language model has none"):
        run(leak_on(TOPICS), rule="balanced")


@pytest.mark.parametrize("options", [{"rule": "greedy"}, {"layer": "all"}, {"projection": 64}], ids=str)
def test_a_classifier_is_selected_for_by_every_way(options: dict[str, object]) -> None:
    found = run(classifier(), selected=12, **options)
    assert set(found.labels[0].tolist()) <= set(range(CLASSES))
    assert 0 <= float(found.objective[0]) < 0.95


def test_gradients_that_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "MOST", 1000)
    with pytest.raises(FedtapError, match=r"give a projection, such as 1024, or use greedy_batches"):
        run(leak_on(TOPICS), rule="greedy")


def test_documents_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    leak = leak_on(TOPICS)
    whole = run(leak, on_topic(0, 5, 9).ids)
    monkeypatch.setattr("fedtap.attackers.checkpoints.per_document.LAID_OUT", 1)
    single = run(leak, on_topic(0, 5, 9).ids)
    assert torch.equal(whole.chosen, single.chosen)
    torch.testing.assert_close(whole.membership, single.membership)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("select(rule='tops')", "did you mean top"),
        ("select(rule=3)", "no rule of select named '3'"),
        ("select(at='sent')", "no at of select named 'sent'"),
        ("select(layer='first')", "no layer of select named 'first'"),
        ("select(tokens='first')", "no tokens of select named 'first'"),
        ("select(layer='all', tokens='last')", "leave tokens, or layer"),
        ("select(projection=-1)", "whole number from 0"),
        ("select(projection=1.5)", "whole number from 0"),
        ("select(projection='many')", "whole number from 0"),
        ("select(projection=65537)", "projection from 0 to 65,536"),
        ("select(batches=0)", "whole number from 1"),
        ("select(pseudo_experts=65)", "pseudo_experts from 0 to 64"),
        ("select(many=0)", "a whole number from 1"),
        ("select(documents=3)", "documents='corpus.txt'"),
        ("select(corpus=3)", "no field of select named 'corpus'"),
        ("select('top', 'tuned', 'last', 'all', 0, 8, 0, 1)", "8 values for 7 fields"),
        ("restarts(select, 3)", "brings back no images"),
    ],
)
def test_what_select_is_not_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as caught:
        parse(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_what_is_written_is_parsed_with_a_corpus_or_without() -> None:
    (attack,) = parse("select('greedy', projection=8)")
    assert attack == Select(rule="greedy", projection=8)
    fitted = attack.fit(corpus())  # type: ignore[arg-type]
    assert fitted.written() == attack.written() == "select(rule='greedy', projection=8)"
    assert not fitted.needs_auxiliary
    assert attack.needs_auxiliary
