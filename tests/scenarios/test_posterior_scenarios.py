"""Scenarios about posteriors, and what is refused: draws, covariances, files, words."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers.posteriors.posterior_mmd import PosteriorMMD
from fedtap.clients.bayesian import exact, laplace_approximation
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.posteriors.posterior import Posterior
from fedtap.scenarios.posteriors.posterior_features import PosteriorFeatures
from fedtap.scenarios.posteriors.regression import RegressionPosterior
from fedtap.simulator.data.posteriordb import read_columns, read_draws
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import PosteriorLeak, load
from fedtap.simulator.models.likelihoods import LinearRegression, Prior, likelihood, prior
from fedtap.simulator.models.registry import build
from tests.attackers.test_posterior import MODELS, leak_of, leaked, records
from tests.support.played import check_resumed, check_truth, command, play, untimed

FEW_STEPS = "posterior_mmd(6, iterations=3)"


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def files(folder: Path, many: int = 100, draws: int = 500) -> tuple[str, ...]:
    """Draws and data as posteriordb has them, the draws zipped and in two chains."""
    data = records(many, 2)
    theta = exact(LinearRegression(2, 1, Prior(2.5)), data, draws)
    names = ("beta[1]", "beta[2]", "beta[3]", "sigma")
    halves = (theta[: draws // 2], theta[draws // 2 :])
    chains = [dict(zip(names, half.T.tolist(), strict=True)) for half in halves]
    columns = dict(zip(("a", "b", "out"), data.T.tolist(), strict=True)) | {"N": many}
    (folder / "data.json").write_text(json.dumps(columns))
    with zipfile.ZipFile(folder / "draws.json.zip", "w") as zipped:
        zipped.writestr("draws.json", json.dumps(chains))
    return ("--draws", str(folder / "draws.json.zip"), "--data", str(folder / "data.json"), "--y", "out")


def test_posteriordb_s_draws_are_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = files(tmp_path, many=300, draws=4000)
    more = ("--x", "a,b", "--pseudo", "20,60", "--prior", "halfcauchy(2.5)", "--out", str(tmp_path / "out"))
    assert command(monkeypatch, "run", "posterior", *words, *more) == 0
    rows = rows_of(tmp_path / "out")
    assert {row["pseudo"] for row in rows} == {20, 60}
    named = {row["statistic"]: row for row in rows if row["pseudo"] == 60}
    assert list(named) == [
        "sum_w", "mean_x1", "mean_x2", "mean_y", "var_x1", "var_x2", "var_y", "cov_x1_x2", "cov_x1_y", "cov_x2_y"
    ]  # fmt: skip
    assert named["var_x2"]["column"] == "b, out"[0]
    assert named["sum_w"]["truth"] == 300
    for row in named.values():
        assert row["value"] == pytest.approx(row["oracle"], rel=1e-5, abs=1e-5)
        if not str(row["statistic"]).startswith("cov_x1_x2"):
            assert row["value"] == pytest.approx(row["truth"], rel=0.12)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("aria-label='How they converge") == 2
    leak = load(tmp_path / "out/leaks/part_0.safetensors", build)
    assert isinstance(leak, PosteriorLeak)
    assert PosteriorMMD(20)(leak).weights.sum().item() == pytest.approx(named["sum_w"]["value"])


def test_shards_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, "run", "posterior_shards", "--shards", "4", "--samples", "4000", "--out", str(out)) == 0
    rows = rows_of(out)
    totals = [row for row in rows if row["statistic"] == "sum_w"]
    assert [row["client"] for row in totals] == [0, 1, 2, 3, "all"]
    assert [row["truth"] for row in totals] == [109, 109, 108, 108, 434]
    assert sum(row["value"] for row in totals[:4]) == pytest.approx(totals[4]["value"])
    whole = {row["statistic"]: row for row in rows if row["client"] == "all"}
    for name, off in {"sum_w": 0.03, "mean_x": 0.003, "mean_y": 0.003, "var_x": 0.05, "var_y": 0.05}.items():
        assert whole[name]["value"] == pytest.approx(whole[name]["truth"], rel=off), name


def test_moments_to_2p_are_told_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--degree", "1,3", "--samples", "6000", "--pseudo", "50", "--out", str(tmp_path / "out"))
    assert command(monkeypatch, "run", "posterior_features", *words) == 0
    for row in rows_of(tmp_path / "out"):
        kind, order = str(row["statistic"]).split("_")[0], str(row["statistic"]).split("_")[1:]
        told = kind == "sum" or int(order[0]) <= row["degree"] * (1 if len(order) > 1 else 2)
        assert row["told"] == told
        assert (row["seconds_differ"] < 1e-6) == told, row
        if told:
            assert row["error"] < 0.08


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda draws: draws[:, :3], "more draws than parameters"),
        (lambda draws: draws * torch.tensor([1.0, 1, 1, -1]), r"sigma is -.* a standard deviation is over 0"),
        (lambda draws: draws * torch.tensor([1.0, 0, 1, 1]), r"singular, as beta\[2\] does not vary"),
        (
            lambda draws: torch.cat([draws[..., :2], 3 - 2 * draws[..., 1:2], draws[..., 3:]], -1),
            r"\+1 beta\[2\] \+0.5",
        ),
        (lambda draws: draws.clone().index_fill_(1, torch.tensor(3), 1e-120), "gradient .* is not finite at draw 4"),
        (lambda draws: draws.index_fill(1, torch.tensor(5), math.nan), "holds NaN or infinity"),
        (lambda draws: draws[..., :3], "has shape"),
    ],
)
def test_draws_of_which_no_posterior_is_known_are_refused(change: object, said: str) -> None:
    leak = leaked(model=LinearRegression(2, 1, Prior(2.5)), draws=200)
    bad = dataclasses.replace(leak, observed={"draws": change(leak.observed["draws"]).double()})  # type: ignore[operator]
    with pytest.raises(FedtapError, match=said):
        PosteriorMMD(10)(bad)


def test_a_covariance_that_is_none_is_refused() -> None:
    mean, covariance = laplace_approximation(MODELS[0], records())
    flat = covariance.clone()
    flat[:, 0], flat[0, :] = flat[:, 1], flat[1, :]
    flat[0, 0] = flat[1, 1]
    leak = leak_of(MODELS[0], {"mean": mean[None], "covariance": flat[None]})
    with pytest.raises(FedtapError, match=r"singular, as [+-]1 beta\[1\] [+-]1 beta\[2\] does not vary"):
        PosteriorMMD(10)(leak)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--x", "a"], "has 3 (beta[1], beta[2], sigma): name the inputs"),
        (["--x", "a,bb"], "There is no column of data.json named 'bb'"),
        (["--x", "a,a"], "names a column twice"),
        ([], "which are meant is not said"),
        (["--x", "a,N"], "no column of data.json named 'N'"),
        (["--x", "a,b", "--prior", "cauchy(1)"], "is no prior of σ"),
        (["--x", "a,b", "--prior", "halfcauchy(0)"], "is no prior of σ"),
        (["--x", "a,b", "--prior", "halfcauchy(1e999)"], "is no prior of σ"),
        (["--x", "a,b", "--model", "lenet"], "is no likelihood"),
        (["--x", "a,b", "--model", "bayesian_network(0, 1)"], "give it at least one input"),
        (["--x", "a,b", "--model", "bayesian_network(3)"], "cannot be read as a likelihood"),
        (["--x", "a,b", "--pseudo", "0"], "out of range"),
        (["--x", "a,b", "--pseudo", "100000"], "at most 4000"),
        (["--x", ",", "--pseudo", "10"], "without a name"),
        (["--x", "a,b", "--samples", "7"], "nothing is sampled"),
        (["--x", "a,b", "--attack", "posterior_mmd(20)", "--pseudo", "30"], "leave --attack out"),
        (["--x", "a,b", "--attack", "posterior_mmd(20)", "--pseudo", "200"], "leave --attack out"),
        (["--x", "a,b", "--attack", "idlg"], "idlg brings back Reconstruction, and posterior is about PseudoData"),
        (["--x", "a,b", "--attack", "stationary_mmd"], "works on a TrainedWeightsLeak"),
        (["--x", "a,b", "--estimator", "slice"], "did you mean sliced?"),
    ],
)
def test_what_cannot_be_played_is_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, "run", "posterior", *files(tmp_path), *words, "--out", str(out)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "Traceback" not in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (records(3), "3 records give no posterior"),
        (
            torch.cat([records(30)[:, :1], records(30)[:, :1], records(30)[:, 1:]], 1),
            "inputs of the regression are depend",
        ),
        (records(30)[:, [0, 0]], "without an error"),
    ],
)
def test_records_without_a_posterior_are_refused(data: Tensor, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        exact(LinearRegression(data.shape[1] - 1), data, 10)


def test_there_is_no_exact_sampler_of_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "run", "posterior", "--model", "bayesian_network(2, 1)") == 2
    assert "use --sampler hmc" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "bayesian_network(2,0.3)"}, "no exact sampler"),
        ({"model": "bayesian_network(100000,0.3)", "sampler": "laplace"}, "1 to 500 hidden units"),
        ({"model": "polynomial(200)"}, "to 20"),
        ({"draws": "d.json", "samples": "7"}, "nothing is sampled"),
        ({"data": "d.json", "x": ",", "y": "y"}, "without a name"),
        ({"x": "a"}, "there is none: add --data"),
    ],
)
def test_a_posterior_is_refused_before_any_work(options: dict[str, str], said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        plan("posterior", options)


@pytest.mark.parametrize("value", ["1e301", "1" + 400 * "0"])
def test_numbers_that_cannot_be_squared_are_no_draws(tmp_path: Path, value: str) -> None:
    (tmp_path / "draws.json").write_text(f'[{{"beta[1]": [1, 2], "beta[2]": [1, {value}], "sigma": [1, 2]}}]')
    with pytest.raises(FedtapError, match=r"a size that can be squared|a whole number that 64 bits cannot hold"):
        play([Posterior(draws="draws.json", name="posterior")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sigma_comes_last_in_a_file_of_draws(tmp_path: Path) -> None:
    (tmp_path / "draws.json").write_text(json.dumps([{"sigma": [1, 2], "beta[1]": [1, 2], "beta[2]": [1, 3]}]))
    with pytest.raises(FedtapError, match="put sigma last"):
        play([Posterior(draws="draws.json", name="posterior")], tmp_path / "out")


def test_a_federation_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="has 2 nodes, and posterior_shards needs 3"):
        play(plan("posterior_shards", {"shards": "3", "samples": "20"}), tmp_path / "out", nodes=2)


def test_a_named_attack_takes_the_place_of_the_options(tmp_path: Path) -> None:
    few = {"samples": "50"}
    by_options = play(plan("posterior", few | {"pseudo": "5", "iterations": "4"}), tmp_path / "options")
    both = "posterior_mmd(5, iterations=4),posterior_mmd(7, False, iterations=2)"
    rows = play(plan("posterior", few | {"attack": both}), tmp_path / "named")
    named = {"attack": "posterior_mmd(pseudo=5, iterations=4)"}
    assert untimed(rows[:6]) == untimed([row | named for row in by_options])
    assert {(row["pseudo"], row["whiten"]) for row in rows[6:]} == {(7, "no")}
    page = (tmp_path / "named/report.html").read_text()
    assert page.count("aria-label='How they converge") == 2  # a section for each attack


def test_a_run_is_resumed_after_its_first_setting(tmp_path: Path) -> None:
    check_resumed(plan("posterior_shards", {"shards": "2,3", "samples": "50", "attack": FEW_STEPS}), tmp_path)


def test_other_private_records_move_the_truth_and_no_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = plan("posterior_shards", {"shards": "2", "samples": "50", "attack": FEW_STEPS})
    true = RegressionPosterior.records

    def others(setting: RegressionPosterior, client: int, data_root: Path) -> Tensor:
        found = true(setting, client, data_root)
        assert found is not None
        return 2 * found[1:] + 1

    honest, deceived = check_truth(settings, tmp_path, monkeypatch, RegressionPosterior, "records", others)
    for one, other in zip(honest, deceived, strict=True):
        assert one["truth"] != other["truth"]
        assert one["error"] != other["error"]
        for name in ("value", "second", "start", "oracle", "objective", "apart"):
            assert one[name] == other[name]


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=30))
def test_any_words_are_a_model_or_an_error(text: str) -> None:
    for parse in (prior, lambda words: likelihood(words, 1)):
        try:
            assert parse(text) is not None  # type: ignore[operator]
        except FedtapError:
            continue


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no draws in posteriordb's form"),
        ("[1]", "no draws in posteriordb's form"),
        ('{"a": [1, NaN]}', "Entry 2 of a .* is NaN, and no finite number"),
        ('{"a": [1, null]}', "is null, and no finite number"),
        ('{"a": [1, true]}', "is true, and no finite number"),
        ('{"a": 1}', "is no list of numbers"),
        ('{"a": [1], "b": [1, 2]}', "have 1 and 2 entries"),
        ('[{"a": [1]}, {"b": [1]}]', "of different parameters"),
    ],
)
def test_files_of_another_form_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(FedtapError, match=said):
        read_draws(tmp_path / "x.json")


def test_zips_that_are_none_or_hold_several_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(FedtapError, match="damaged or of another format"):
        read_columns(tmp_path / "x.json.zip", ["a"])
    with zipfile.ZipFile(tmp_path / "x.json.zip", "w") as folder:
        for name in ("a.json", "b.json"):
            folder.writestr(name, "{}")
    with pytest.raises(FedtapError, match=r"holds 2 \.json files"):
        read_draws(tmp_path / "x.json.zip")
    with pytest.raises(FedtapError, match="is no file: name a"):
        read_draws(tmp_path / "y.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(json_values, st.binary(max_size=12), st.integers(0, 60))
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: object, noise: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    text = json.dumps(value).encode()
    with zipfile.ZipFile(folder / "z.json.zip", "w") as zipped:
        zipped.writestr("a.json", text)
    whole = (folder / "z.json.zip").read_bytes()
    (folder / "z.json.zip").write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    (folder / "a.json").write_bytes(text[:at] + noise + text[at:])
    for name in ("a.json", "z.json.zip"):
        for read in (read_draws, lambda path: read_columns(path, ["a", "b"])):
            try:
                found = read(folder / name)
            except FedtapError:
                continue
            draws = found[1] if isinstance(found, tuple) else found
            assert bool(draws.isfinite().all())


def test_the_plan_takes_commas_in_x_as_one_value() -> None:
    (part,) = plan("posterior", {"data": "d.json", "x": "a,b", "y": "c"})
    assert isinstance(part, Posterior)
    assert part.names == ("a", "b", "c")
    settings = plan("posterior_features", {})
    assert all(isinstance(part, PosteriorFeatures) for part in settings)
    assert [part.model for part in settings] == ["linear_regression", *(f"polynomial({p})" for p in (2, 3, 4, 5))]
