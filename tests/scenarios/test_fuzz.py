"""Whatever strangers write: each mutated expression or file works, or is refused in one sentence under 300 letters."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from fedtap.attackers import ATTACKS, parse, suited
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.wrappers.saved import Saved
from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.options import options_text
from fedtap.scenarios.command.plan import plan, plan_of
from fedtap.simulator.auxiliary import Auxiliary
from fedtap.simulator.data.images import open_dataset
from fedtap.simulator.data.posteriordb import read_columns, read_draws
from fedtap.simulator.data.texts import WordPieces, read_texts
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import AttentionLeak, Leak, PosteriorLeak, Protocol, TrainedWeightsLeak, float_buffers, load
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.likelihoods import likelihood, prior
from fedtap.simulator.models.registry import build, with_weights
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.options import options_of
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures

SECONDS, BYTES, CASES = 20, 2 << 30, 20_000
"""Of one case, and of all the process beyond what it begins with; cases of the slow test."""

NUMBERS = (
    "0",
    "-1",
    "1e999",
    "nan",
    "9" * 30,
    "9" * 400,
    "9" * 5000,
    "2**40",
    "1+1",
    "1e-320",
    "1099511627776",
    "0x7f",
)
PIECES = (
    "(",
    ")",
    ",",
    "=",
    "'",
    ":",
    "+",
    ".",
    "*",
    "[",
    "\0",
    "\ud800",
    "é",
    "\n",
    "#",
    "evil:net",
    "os:system",
    "/",
)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**40, 2**63, 10**400, 1e308, -0.5, float("nan"), "", "x" * 5000, "os:system", "evil:net",
    "mlp(depth=1000000000)", "mlp(width=40000)", "lenet(width=65536,depth=256)", "gpt(width=16384,layers=256)",
    "attention(heads=9999, around='gpt', vocabulary=9999999)", "bayesian_network(500, 1e-300)", "polynomial(20)",
    "saved('/etc/passwd')", "identified(assuming('evil:net',exact_git))", "lti(width=100000)", "\u0000", "\u001b[2J",
    [], {}, [[]], [3, 14000, 14000], [0], [2**40] * 3, ["3", 8, 8], {"a": {"b": []}}, [1] * 1000, "noise(1e400)",
    "+".join(["noise(1)"] * 3000), "halfcauchy(1e400)", "fedprox(-1)", "secure_aggregation",
)  # fmt: skip
CONTENTS = (
    b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 400, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe\x00",
    b'{"format": "\\ud800"}', b"[]", b"null", b'"' + b"x" * 100_000 + b'"', b"%!PS\n(x) print",
    b"PK\x05\x06" + bytes(18), (2**60).to_bytes(8, "little") + b"{}", (50).to_bytes(8, "little") + b"{" * 50,
)  # fmt: skip

FIELDS = tuple(
    f"{name}({field.name}={field.default!r})"
    for name, kind in sorted(ATTACKS.items())
    for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    if isinstance(field.default, int | float | str)
)
"""Every setting of every attack."""

TEXTS: dict[str, tuple[Callable[[str], object], tuple[str, ...]]] = {
    "attack": (parse, (*ATTACKS, *FIELDS,
                       "idlg(steps=300),dlg", "restarts(attack=idlg, times=2)", "assuming('mlp', idlg)",
                       "refine(start=lti, finish=idlg(steps=3))", "identified(exact_git)", "saved('a.safetensors')",
                       "idlg(" + "1+" * 2000 + "1)", "best_of(idlg,dlg)", "-" * 3000 + "1", "idlg" + ".a" * 3000)),
    "defence": (described, ("none", "clip(1.0)+noise(0.01)", "prune(0.9)", "local_dp(1,1,1,0.1)", "precode(8)")),
    "model": (lambda text: build(text, (3, 8, 8), 4), ("mlp", "lenet(width=16, depth=4)", "mlp(activation='tanh')",
                                                       "convnet", "vit", "resnet20", "lenet+precode(8)")),
    "attention": (lambda text: architecture(text, (4, 8), 1),
                  ("attention(heads=4, around='gpt', vocabulary=0)", "vit(cut='sum')")),
    "language": (lambda text: build(text, (6,), 50), ("gpt(width=24, heads=2)", "bert(vocabulary=40)", "minilm")),
    "likelihood": (lambda text: likelihood(text, 1).network(),
                   ("linear_regression", "polynomial(3)", "bayesian_network(4, 0.1)")),
    "prior": (prior, ("flat", "halfcauchy(2.5)")),
    "regulariser": (Regulariser.parse, ("fedprox(0.05)", "weight_decay(0.01)")),
}  # fmt: skip


def text_mutated(text: str, draw: Random) -> str:
    """A few changes to a text; sometimes none."""
    for _ in range(draw.randrange(4)):
        at, to = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
        change = draw.randrange(6)
        if change == 0:
            text = text[:at] + text[to:]
        elif change == 1:
            text = text[:at] + text[at:to] * draw.choice((2, 3, 200)) + text[to:]
        elif change == 2:
            text = text[:at] + draw.choice(PIECES) + text[at:]
        elif change == 3:
            digits = [place for place, letter in enumerate(text) if letter.isdigit()] or [at]
            place = draw.choice(digits)
            text = text[:place] + draw.choice(NUMBERS) + text[place + 1 :]
        elif change == 4:
            text = draw.choice(("(", "-", "[", "restarts(", "not ", "x.")) * draw.choice((1, 50, 5000)) + text
        else:
            text = text[:at] + draw.choice(NUMBERS) + text[to:]
    return text[:50_000]


def bytes_mutated(content: bytes, draw: Random) -> bytes:
    """The file cut short, with some bytes changed, with JSON values changed, or another one altogether."""
    change = draw.randrange(6)
    at = draw.randrange(len(content) + 1)
    if change == 0:
        return content[:at]
    if change == 1:
        return draw.choice(CONTENTS)
    if change == 2:
        return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + draw.randrange(9) :]
    if change == 3 and content[8:9] == b"{":  # a safetensors file: its header
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(value_mutated(json.loads(content[8 : 8 + size]), draw)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    try:
        return json.dumps(value_mutated(json.loads(content), draw)).encode()
    except ValueError:
        flipped = bytearray(content)
        for _ in range(draw.randrange(1, 5)):
            if flipped:
                flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        return bytes(flipped)


def value_mutated(value: Any, draw: Random) -> Any:
    """A JSON value with one value in it exchanged, left out, or written as a text is mutated."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        if draw.random() < 0.1:
            return {key: one for key, one in value.items() if key != name}
        return value | {name: value_mutated(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        at = draw.randrange(len(value))
        return [*value[:at], value_mutated(value[at], draw), *value[at + 1 :]]
    if isinstance(value, str) and draw.random() < 0.5:
        return text_mutated(value, draw)
    return draw.choice(VALUES)


# Files: what lies in a folder, and how it is read.

Reader = Callable[[Path], object]


def stack_of(kind: type[Leak], model: str, shape: tuple[int, ...], network: Any, observed: Any, **more: Any) -> Leak:
    one = torch.ones(1, dtype=torch.long)
    tensors = {name: torch.randn(1, *size) for name, size in observed.items()}
    protocol = Protocol(model, shape, more.pop("classes", 1), batch=1, **more)
    return kind(tensors, protocol, network, None, {}, one, one.clone(), one.clone())


def accepted(path: Path) -> None:
    """A leak, and what is asked of it before it is attacked."""
    leak = load(path, architecture)
    for name in ("idlg", "linear", "exact_git", suited(leak)):
        try:
            parse(name)[0].accepts(leak)
        except FedtapError as error:
            one_sentence(error)


def samples(folder: Path) -> dict[str, Reader]:
    """A sound folder of each kind, and its reader."""
    net = build("lenet", (3, 8, 8), 10, seed=0)
    leak = leak_of(*pictures(2, 1, 8), net, "lenet")
    leak.save(folder / "gradient/leak.safetensors")
    stack_of(PosteriorLeak, "linear_regression", (1,), likelihood("linear_regression", 1).network(),
             {"draws": (5, 3)}, prior="halfcauchy(2.5)").save(folder / "posterior/leak.safetensors")  # fmt: skip
    block = architecture("attention(heads=2, around='nothing', vocabulary=0)", (3, 4), 1)
    stack_of(AttentionLeak, "attention(heads=2, around='nothing', vocabulary=0)", (3, 4), block,
             {"output": (3, 8)}).save(folder / "attention/leak.safetensors")  # fmt: skip
    small = build("mlp(width=3, depth=1)", (2,), 2)
    trained = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    stack_of(TrainedWeightsLeak, "mlp(width=3, depth=1)", (2,), small, trained,
             classes=2, prior="fedprox(0.05)").save(folder / "stationary/leak.safetensors")  # fmt: skip
    made = auxiliary_for(leak, folder / "made", pairs=4)
    shutil.copytree(made.folder, folder / "auxiliary")
    LTI(width=3, epochs=1, features=20).fit(made).save(folder / "trained_attack/lti.safetensors")

    tensors = dict(net.named_parameters()) | float_buffers(net)
    (folder / "weights").mkdir()
    (folder / "weights/w.safetensors").write_bytes(save({name: t.detach() for name, t in tensors.items()}))
    for name in ("npz", "zip", "folder", "draws", "zipped", "texts", "vocabulary"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"{axis}_{part}": rng.integers(0, 5, (4, 4, 4) if axis == "x" else 4).astype(np.uint8)
              for axis in "xy" for part in ("train", "test")}  # fmt: skip
    np.savez_compressed(folder / "npz/w.npz", **arrays)
    with zipfile.ZipFile(folder / "zip/w.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, kind in enumerate(("png", "bmp", "gif", "jpeg", "tiff", "webp")):
            content = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(content, kind)
            archive.writestr(f"a/{number}.{kind}", content.getvalue())
            (folder / f"folder/{number}.{kind}").write_bytes(content.getvalue())
    draws = json.dumps([{"a": [1.0, 2.0], "sigma": [0.5, 0.25]}, {"a": [3, 4], "sigma": [1, 2]}])
    (folder / "draws/d.json").write_text(draws)
    with zipfile.ZipFile(folder / "zipped/d.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d.json", '{"N": 2, "a": [1, 2], "b": [0.5, 3]}')
    (folder / "texts/t.csv").write_text('1,"a text, quoted"\n2,another\n')
    (folder / "vocabulary/v.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n##b\n")

    def attacker(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Saved(str(path / "lti.safetensors"))(leak)

    def auxiliary(path: Path) -> None:
        for wanted in (None, made.about):
            found = Auxiliary.saved(path, build, wanted)
            assert found is None or sum(map(len, found.first(6))) <= 6

    return {
        **{kind: (lambda path: accepted(path / "leak.safetensors"))
           for kind in ("gradient", "posterior", "attention", "stationary")},
        "trained_attack": attacker,
        "auxiliary": auxiliary,
        "weights": lambda path: with_weights(build("lenet", (3, 8, 8), 10, seed=0), path / "w.safetensors"),
        "npz": lambda path: open_dataset(str(path / "w.npz"), path),
        "zip": lambda path: open_dataset(str(path / "w.zip"), path, 8),
        "folder": lambda path: open_dataset(str(path), path, 8),
        "draws": lambda path: read_draws(path / "d.json"),
        "zipped": lambda path: read_columns(path / "d.json.zip", ("a", "b")),
        "texts": lambda path: read_texts(path / "t.csv"),
        "vocabulary": lambda path: WordPieces.read(path / "v.txt"),
    }  # fmt: skip


PATHS = ("a\0b", "x" * 300, "/" + "y/" * 3000, "loop", "loop/a", "", ".", "/dev/zero", "\ud800", "no/such", "-")


class Fuzz:
    """Cases by number: each a function to call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readers = samples(folder / "sound")
        (folder / "loop").symlink_to(folder / "loop")
        self.kinds = (*TEXTS, *self.readers, "knobs", "config", "paths")

    def __call__(self, number: int) -> tuple[str, Callable[[], object]]:
        kind, draw = self.kinds[number % len(self.kinds)], Random(number)
        if kind in TEXTS:
            reader, texts = TEXTS[kind]
            text = text_mutated(draw.choice(texts), draw)
            return kind, lambda: reader(text)
        if kind in self.readers:
            return kind, lambda: self.readers[kind](self.changed(kind, draw))
        if kind == "paths":
            path, which = self.folder / draw.choice(PATHS), draw.choice(list(self.readers))
            return kind, lambda: self.readers[which](path)
        name = draw.choice(sorted(SCENARIOS))
        known = options_of(SCENARIOS[name])
        knobs = {}
        for knob in draw.sample(list(known), draw.randrange(1, 4)):
            knobs[knob] = text_mutated(draw.choice((*map(str, known[knob].values), "1", "0.5,2", "mlp", "idlg")), draw)
        if kind == "knobs":
            return kind, lambda: plan(name, knobs)
        options = text_mutated(options_text(knobs), draw) if draw.random() < 0.5 else options_text(knobs)
        return kind, lambda: plan_of({"scenario": name, "options": options, "overwrite": draw.choice((1, 1.5, True))})

    def changed(self, kind: str, draw: Random) -> Path:
        """A copy of the sound folder with one file in it mutated."""
        copy = self.folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "sound" / kind, copy)
        file = draw.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        file.write_bytes(bytes_mutated(file.read_bytes(), draw))
        return copy


def one_sentence(error: Exception) -> None:
    """What is told of a mistake can be read."""
    said = str(error)
    assert 0 < len(said) < 300, f"{len(said)} letters: {said}"
    assert said.isprintable(), said


def judged(case: Callable[[], object]) -> str:
    """`works` or `refused`; anything else is an error of the program's own."""
    try:
        case()
    except FedtapError as error:
        one_sentence(error)
        return "refused"
    return "works"


def campaign(cases: int) -> dict[str, Any]:
    """What became of so many cases: how many work, are refused, or fail, and how much memory all of them took."""
    told: Counter[str] = Counter()
    failures = []

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    with tempfile.TemporaryDirectory() as home:
        fuzz = Fuzz(Path(home))
        for number in range(len(fuzz.kinds)):  # what is loaded once
            judged(fuzz(number)[1])
        with Path("/proc/self/statm").open() as file:
            resource.setrlimit(resource.RLIMIT_AS, (int(file.read().split()[0]) * resource.getpagesize() + BYTES,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, ring)
        for number in range(cases):
            kind, case = fuzz(number)
            signal.alarm(SECONDS)
            try:
                told[judged(case)] += 1
            except BaseException:
                told["failed"] += 1
                failures.append(f"{number} {kind}: {traceback.format_exc(limit=-3)}")
            finally:
                signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {**told, "bytes": grown, "failures": failures}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


def test_each_kind_of_file_is_read_as_it_is(fuzz: Fuzz) -> None:
    for kind, reader in fuzz.readers.items():
        reader(fuzz.folder / "sound" / kind)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of broken TIFFs
def test_what_is_mutated_works_or_is_refused_in_a_sentence(fuzz: Fuzz) -> None:
    told = Counter(judged(fuzz(number)[1]) for number in range(8 * len(fuzz.kinds)))
    assert min(told["works"], told["refused"]) > 20, told


@pytest.mark.slow
def test_twenty_thousand_mutants() -> None:
    program = f"import json; from tests.scenarios.test_fuzz import campaign; print(json.dumps(campaign({CASES})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["failures"], "\n".join(told["failures"][:5])
    assert told["works"] + told["refused"] == CASES
    assert told["bytes"] < BYTES
