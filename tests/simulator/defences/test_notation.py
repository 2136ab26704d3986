"""How defences are written: what is read back, and what is refused in a sentence."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtap.simulator.defences.chained import Chain, Defences, parse
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import StepDefence, UpdateDefence
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.defences.laplace import Laplace
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.notation import described, names, written
from fedtap.simulator.defences.prune import Prune
from fedtap.simulator.defences.quantise import Quantise
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.defences.soteria import Soteria
from fedtap.simulator.errors import FedtapError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write none, or defences joined by"),
        ("clip(1)+", "cannot be read"),
        ("+clip(1)", "something else than defences"),
        ("clip(1)-noise(1)", "something else than defences"),
        ("clip(1)+none", "no defence named 'none'"),
        ("clip(1)++noise(1)", "something else"),
        ("noise", "takes 1: write noise.sigma."),
        ("noise()", "is given 0 values and takes 1"),
        ("noise(1, 2)", "is given 2 values and takes 1"),
        ("noise(1, sigma=2)", "given twice"),
        ("noise(scale=1)", "no argument of noise named 'scale'"),
        ("noise(*[1])", "cannot be read"),
        ("noise(**{'sigma': 1})", "no argument of noise"),
        ("noise(x)", "cannot be read"),
        ("noise(-1)", "sigma of noise is -1, and it is a number from 0"),
        ("noise(1e999)", "sigma of noise is inf"),
        ("noise(True)", "sigma of noise is True"),
        ("noise('1')", "sigma of noise is '1'"),
        ("clip(0)", "norm of clip is 0, and it is a number above 0"),
        ("laplace(0)", "scale of laplace is 0"),
        ("prune(1)", "share of prune is 1, and it is a number from 0 and below 1"),
        ("prune(-0.1)", "share of prune"),
        ("quantise(0)", "whole number from 1 to 16"),
        ("quantise(2.0)", "whole number"),
        ("quantise(17)", "whole number"),
        ("sign(1)", "takes 0"),
        ("local_dp(1, 1, 0, 1e-5)", "epsilon of local_dp is 0, and it is a number above 0"),
        ("local_dp(1, 1, 1, 1)", "delta of local_dp is 1, and it is a number above 0 and below 1"),
        ("local_dp(1, 1, 1, 0)", "delta of local_dp is 0"),
        ("soteria(1)", "share of soteria is 1"),
        ("dp_sgd(0, 1)", "clip of dp_sgd is 0"),
        ("dp_sgd(1, -1)", "noise_multiplier of dp_sgd is -1"),
        ("clip(1)+dp_sgd(1, 1)", r"acts on the step, before clip.*write it first, dp_sgd.1.0, 1.0.\+clip"),
        ("soteria(0.1)+dp_sgd(1, 1)", "both act on the step: keep one"),
        ("central_dp(1, 1)+noise(1)", r"acts on the update, before central_dp.*write it first, noise"),
        ("central_dp(1, -1)", "noise_multiplier of central_dp"),
        ("precode(0)", "features of precode is 0"),
        ("clip(1)+precode(2)", r"acts on the model, before clip"),
        ("dp(1)", "no defence named 'dp'"),
        ("clop(1)", "did you mean clip"),
        ("clip(clip(1))", "cannot be read"),
        ("clip(1)(2)", "something else"),
        ("[clip(1)]", "something else"),
        ("__import__('os').system('true')", "something else"),
        ("+".join(["sign()"] * 9999), "cannot be read"),
        (f"noise(1{'0' * 400})", "sigma of noise"),
    ],
)
def test_what_is_no_defence_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as caught:
        parse(text)
    assert str(caught.value).endswith((".", "?"))


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(FedtapError, match=", ".join(sorted(names()))):
        parse("dp(1)")


POSITIVE = st.floats(1e-6, 1e6)


ONES: st.SearchStrategy[UpdateDefence] = st.one_of(
    st.builds(Clip, POSITIVE),
    st.builds(Noise, POSITIVE),
    st.builds(Laplace, POSITIVE),
    st.builds(Prune, st.floats(0, 0.99)),
    st.builds(Sign),
    st.builds(Quantise, st.integers(1, 16)),
    st.builds(LocalDP, POSITIVE, POSITIVE, POSITIVE, st.floats(1e-9, 0.99)),
)


STEPS: st.SearchStrategy[StepDefence | None] = st.one_of(
    st.none(), st.builds(Soteria, st.floats(0, 0.99)), st.builds(DPSGD, POSITIVE, st.floats(0, 1e6))
)


@given(st.text(max_size=30) | st.text("clipnoise(1.),+ ", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(FedtapError):
        assert written(described(text)) == "none" or parse(text) != Defences()


@given(STEPS, st.lists(ONES, max_size=4))
def test_what_is_written_is_read_back(step: StepDefence | None, chain: list[UpdateDefence]) -> None:
    text = "+".join(map(repr, [*filter(None, [step]), *chain])) or "none"
    assert parse(text) == Defences(step, Chain(tuple(chain)))
    assert written(described(text)) == text


def test_one_meaning_has_one_spelling() -> None:
    for text in ("clip(1)+noise(.01)", " clip( norm=1 ) + ( noise(sigma=1e-2) )"):
        assert written(described(text)) == "clip(1.0)+noise(0.01)"
    assert written(described("sign")) == "sign()"
    assert not parse("none").update
