"""Nothing runs from a file: a marker is planted through every file that fedtap reads, and is never touched."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import UserConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fedtap.simulator.models.registry
from fedtap.attackers import parse, parse_saved
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.wrappers.saved import Saved
from fedtap.scenarios.command.options import options_text
from fedtap.scenarios.command.plan import plan_of
from fedtap.simulator import files
from fedtap.simulator.auxiliary import Auxiliary
from fedtap.simulator.data import images as datasets
from fedtap.simulator.data.images import open_dataset
from fedtap.simulator.data.posteriordb import read_draws
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.files import read_json, write_atomically
from fedtap.simulator.leaks import load
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.registry import BUILDERS, OWN_MODELS, build, on_meta, with_weights
from fedtap.simulator.report.folder import Folder
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures

CODE = ("evil:net", "evil:net+precode(3)", "os:system", "subprocess:call", "posix:system", "evil.deeper:net")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that importing, or calling, `evil:net` makes; it is not there when the test ends."""
    marker, home = tmp_path / "touched", tmp_path / "path"
    home.mkdir()
    touch = f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef net(*_): Path({str(marker)!r}).touch()\n"
    (home / "evil.py").write_text(touch)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delenv(OWN_MODELS, raising=False)
    monkeypatch.chdir(tmp_path)
    yield marker
    assert not marker.exists()
    assert "evil" not in sys.modules


def heard() -> Any:
    return leak_of(*pictures(2, 1, 8), build("lenet", (3, 8, 8), 10, seed=0), "lenet")


def rewritten(file: Path, **changes: Any) -> None:
    """The JSON file with these values, `protocol__model` within `protocol`."""
    document = json.loads(file.read_text())
    for name, value in changes.items():
        inside, *path = reversed(name.split("__"))
        into = document
        for key in reversed(path):
            into = into[key]
        into[inside] = value
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("code", CODE)
def test_a_leak_names_no_code(tmp_path: Path, marker: Path, code: str) -> None:
    heard().save(tmp_path / "leak.safetensors")
    rewritten(tmp_path / "leak.json", protocol__model=code)
    with pytest.raises(FedtapError, match="may not name code"):
        load(tmp_path / "leak.safetensors", architecture)


def test_a_leak_is_checked_before_its_tensors_are_read(tmp_path: Path, marker: Path) -> None:
    heard().save(tmp_path / "leak.safetensors")
    (tmp_path / "leak.safetensors").write_bytes(b"nothing")
    rewritten(tmp_path / "leak.json", protocol__model="os:system")
    with pytest.raises(FedtapError, match="may not name code"):
        load(tmp_path / "leak.safetensors", architecture)


ATTACKS = (
    "identified(assuming('evil:net',exact_git))",
    "identified(restarts(attack=assuming('os:system', idlg)))",
    "identified(saved('other.safetensors'))",
    "fused_git(prior=identified(refine(saved('x'),idlg)))",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_trained_attack_names_no_code_and_no_file(tmp_path: Path, marker: Path, attack: str) -> None:
    parse(attack)  # a command line may
    with pytest.raises(FedtapError, match="may name no code to import and no other file"):
        parse_saved(attack)
    leak = heard()
    made = LTI(width=3, epochs=1, features=20).fit(auxiliary_for(leak, tmp_path / "pairs", pairs=4))
    path = tmp_path / "lti.safetensors"
    made.save(path)
    assert Saved(str(path))(leak).images.shape == (2, 1, 3, 8, 8)
    rewritten(path.with_suffix(".json"), attack=attack)
    for ask in (lambda: Saved(str(path)).name, lambda: Saved(str(path))(leak)):
        with pytest.raises(FedtapError, match="describes no trained attack"):
            ask()


def test_a_trained_attacks_sizes_are_those_of_its_tensors(tmp_path: Path) -> None:
    leak = heard()
    made = LTI(width=3, epochs=1, features=20).fit(auxiliary_for(leak, tmp_path / "pairs", pairs=4))
    path = tmp_path / "lti.safetensors"
    made.save(path)
    rewritten(path.with_suffix(".json"), attack="lti(width=3000000, features=20)")  # 36 TB
    with pytest.raises(FedtapError, match="does not hold what lti learns"):
        Saved(str(path))(leak)
    rewritten(path.with_suffix(".json"), attack="lti(width=3, features=20)", about__protocol__model="evil:net")
    with pytest.raises(FedtapError, match="trained on"):
        Saved(str(path))(leak)


@pytest.mark.parametrize(
    "attack", ["lti", "ridge", "nearest", "training_mean", "coarse_git(width=2, hidden=2, hints=2, epochs=0)"]
)
def test_every_learner_comes_back_from_its_tensors(tmp_path: Path, attack: str) -> None:
    leak = heard()
    (learner,) = parse(attack if attack != "lti" else "lti(width=3, epochs=1, features=20)")
    made = learner.fit(auxiliary_for(leak, tmp_path / "pairs", pairs=40))
    made.learned()[0].save(tmp_path / "a.safetensors")
    assert torch.equal(Saved(str(tmp_path / "a.safetensors"))(leak).images, made(leak).images)


def test_auxiliary_data_name_no_code(tmp_path: Path, marker: Path) -> None:
    made = auxiliary_for(heard(), tmp_path, pairs=4)
    for code in CODE:
        rewritten(made.folder / "auxiliary.json", protocol__model=code)
        for wanted in (None, made.about):
            with pytest.raises(FedtapError, match=r"auxiliary\.json does not describe"):
                Auxiliary.saved(made.folder, build, wanted)


@pytest.mark.parametrize(
    "change",
    [{"protocol__model": "lenet(width=13)"}, {"protocol__classes": 11}, {"dataset": "elsewhere"},
     {"auxiliary_source": "server"},
     {"digest": "0"}, {"labels": "random"}, {"protocol__shape": ["touch", "x"]}, {"protocol__classes": -1},
     {"pairs": "4"}],
)  # fmt: skip
def test_auxiliary_data_are_compared_with_what_is_wanted_before_anything_is_built(tmp_path: Path, change: Any) -> None:
    made = auxiliary_for(heard(), tmp_path, pairs=4)
    rewritten(made.folder / "auxiliary.json", **change)

    def built(*_: object) -> nn.Module:
        raise AssertionError("it was built")

    with pytest.raises(FedtapError, match="does not describe auxiliary pairs"):
        Auxiliary.saved(made.folder, built, made.about)


def test_another_number_of_pairs_will_do(tmp_path: Path) -> None:
    made = auxiliary_for(heard(), tmp_path, pairs=4)
    wanted = dataclasses.replace(made.about, pairs=3)
    found = Auxiliary.saved(made.folder, build, wanted)
    assert found is not None
    assert sum(map(len, found.first(3))) == 3


CHUNKS = {
    "images": lambda t: t.double(),
    "labels": lambda t: t + 10,
    "clients": lambda t: t[:1].clone(),
    "gradient/fc.weight": lambda t: t.half(),
    "weights/fc.weight": lambda t: t.transpose(0, 1).contiguous(),
    "gradient/fc.bias": lambda t: t * float("nan"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_the_tensors_of_auxiliary_data_are_checked_before_they_are_used(tmp_path: Path, name: str) -> None:
    made = auxiliary_for(heard(), tmp_path, pairs=4)
    (chunk,) = made.folder.glob("pairs_*")
    tensors = load_file(chunk)
    save_file(tensors | {name: CHUNKS[name](tensors[name])}, chunk)
    with pytest.raises(FedtapError, match="the auxiliary pairs are not whole"):
        list(made)


CONFIGS = (
    {"model": "evil:net"},
    {"model": "mlp,evil:net"},
    {"model": "evil:net+precode(3)"},
    {"attack": "assuming('evil:net', idlg)"},
    {"attack": "linear,refine(restarts(assuming('evil' ':net', idlg)), idlg)"},
    {"attack": "assuming('evil\\x3anet', idlg)"},
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_config_names_code_only_where_its_host_allows_it(
    marker: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str]
) -> None:
    asked: UserConfig = {"scenario": "first_leak", "options": options_text(config)}
    for allowed in ("", "evil:other,evil", "evil:net2"):
        monkeypatch.setenv(OWN_MODELS, allowed)
        with pytest.raises(FedtapError, match="only who runs this host may: start it with FEDTAP_OWN_MODELS=evil:net"):
            plan_of(asked)
    monkeypatch.setenv(OWN_MODELS, "mine:net,evil:net")
    assert plan_of(asked)  # planned, and not imported until it is played


def test_what_the_command_line_names_is_allowed_to_its_own_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_MODELS, "other:net")
    fedtap.simulator.models.registry.allow(["mine:net+precode(3)"])
    assert plan_of({"scenario": "first_leak", "options": "--model mine:net"})
    assert plan_of({"scenario": "first_leak", "options": "--model other:net"})
    assert plan_of({"scenario": "dp"}), "a game's model is fedtap's own"


def test_datasets_draws_weights_and_run_folders_run_nothing(tmp_path: Path, marker: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, (f"open({str(marker)!r}, 'w')",)

    np.savez(tmp_path / "w.npz", x_train=np.array([Evil()], dtype=object), y_train=[0], x_test=[0], y_test=[0])
    torch.save({"w": Evil()}, tmp_path / "w.safetensors")
    (tmp_path / "d.json").write_text('{"py/object": "evil.net", "a": "evil:net"}')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("../../evil.png", b"%!PS")
        archive.writestr("evil.py", "raise SystemExit")
    network = build("lenet", (3, 8, 8), 10, seed=0)
    for ask in (
        lambda: open_dataset("w.npz", tmp_path),
        lambda: open_dataset("z.zip", tmp_path),
        lambda: open_dataset("pictures", tmp_path, 8),
        lambda: read_draws(tmp_path / "d.json"),
        lambda: with_weights(network, tmp_path / "w.safetensors"),
    ):
        with pytest.raises(FedtapError):
            ask()
    about = {"name": "first_leak", "scenario": ["evil:net"], "device": "evil:net", "versions": {"fedtap": "evil:net"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    (tmp_path / "run/rows.jsonl").write_text('{"unit": "evil:net", "settings": "Assuming(\'evil:net\')"}\n')
    assert Folder(tmp_path / "run", dict(about), resume=True).before["evil:net"][0]["unit"] == "evil:net"


# Small files that take everything.


def image_of(width: int, height: int) -> bytes:
    """A PNG that says in its header that it is so large."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "png")
    begun, rest = content.getvalue()[:8], content.getvalue()[33:]
    header = b"IHDR" + struct.pack(">II", width, height) + content.getvalue()[24:29]
    return begun + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + rest


def test_a_postscript_file_named_png_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(FedtapError, match="is broken"):
        open_dataset(str(tmp_path), tmp_path, 8)


def test_images_have_a_limit_that_the_error_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (8200, 20_000):  # beyond Pillow's own limit too
        (tmp_path / "x.png").write_bytes(image_of(width, 10_000))
        with pytest.raises(FedtapError, match="more than 67,108,864 pixels"):
            open_dataset(str(tmp_path), tmp_path, 8)
    monkeypatch.setattr(datasets, "LARGEST_ARRAY", 8 * 8 * 3 - 1)
    with pytest.raises(FedtapError, match="holds 1 images, which at 8 pixels a side fill more than"):
        open_dataset(str(tmp_path), tmp_path, 8)


def npz(tmp_path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {f"x_{part}": np.zeros((4, 8, 8, 3), np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(4) for part in ("train", "test")}
    np.savez_compressed(tmp_path / "w.npz", **(arrays | changes))
    return tmp_path / "w.npz"


def test_small_npz_files_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_dataset(str(npz(tmp_path)), tmp_path).shape == (3, 8, 8)
    for label in (2**40, 2**16, 2**63):
        with pytest.raises(FedtapError, match="where 65,535 is the highest possible"):
            open_dataset(str(npz(tmp_path, y_test=np.array([0, 1, 2, label], np.uint64))), tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 3)})
    with zipfile.ZipFile(npz(tmp_path)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, header.getvalue() if name == "x_test.npy" else content)
    with pytest.raises(FedtapError, match=r"x_test promises \(1099511627776, 8, 8, 3\) entries"):
        open_dataset(str(tmp_path / "w.npz"), tmp_path)
    monkeypatch.setattr(datasets, "LARGEST_ARRAY", 1000)
    with pytest.raises(FedtapError, match="unfolds to 2,"):
        open_dataset(str(npz(tmp_path)), tmp_path)


def test_a_zip_that_unfolds_to_too_much_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("w.zip", "d.json.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", bytes(100_000))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unfolded"))
    monkeypatch.setattr(datasets, "LARGEST_ARRAY", 50_000)
    monkeypatch.setattr("fedtap.simulator.data.posteriordb.LARGEST_ARCHIVE", 50_000)
    for ask in (lambda: open_dataset(str(tmp_path / "w.zip"), tmp_path), lambda: read_draws(tmp_path / "d.json.zip")):
        with pytest.raises(FedtapError, match="unfolds to 100,000 bytes, and no more than 50,000 are read"):
            ask()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol__shape": [3, 14000, 14000]}, "at most 268,435,456 numbers"),
        ({"protocol__shape": [3, 9000, 9000]}, "has shape"),
        ({"protocol__model": "mlp(width=40000)"}, "missing|has shape"),
        ({"protocol__model": "lenet(width=60000, depth=200)"}, "missing"),
        ({"protocol__model": "mlp(depth=1000000000)"}, "depth to 256"),
        ({"protocol__model": "mlp(width=" + "9" * 150 + ")"}, "width to 65,536"),
        ({"protocol__classes": 2**30}, "classes 1,048,576"),
        ({"protocol__batch": 10**9}, "at most 268,435,456 numbers"),
        ({"protocol__local_steps": 10**9}, "at most 1,000,000"),
        ({"protocol__shape": "3,8,8"}, "its shape a list"),
        ({"protocol__shape": [3, 8, 8.0]}, "whole numbers from 1"),
        ({"protocol__prior": "x" * 201}, "200 letters at most"),
        ({"protocol__model": "gpt(layers=100000)", "protocol__shape": [8]}, "layers is at most 256"),
        (
            {"protocol__model": "attention(heads=9999, around='bert', vocabulary=9999999)", "protocol__shape": [9, 9]},
            "miss",
        ),
        ({"protocol__model": "bayesian_network(500, 0.1)", "protocol__shape": [10**8]}, "missing"),
        ({"stacked": "no"}, "stacked is true or false"),
    ],
)
def test_a_small_leak_takes_no_more_memory_than_it_has(tmp_path: Path, change: Any, said: str) -> None:
    heard().save(tmp_path / "leak.safetensors")
    rewritten(tmp_path / "leak.json", **change)
    with pytest.raises(FedtapError, match=said) as refused:
        load(tmp_path / "leak.safetensors", architecture)
    assert len(str(refused.value)) < 300


def test_a_safetensors_header_that_promises_more_than_is_there(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(FedtapError, match="cannot be read as safetensors"):
        with_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that depends on real numbers where `real`."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(48, 48), nn.Linear(48, 48)
        self.two.weight = self.one.weight
        self.top = nn.Linear(48, 4)
        self.register_buffer("scale", torch.ones(1))
        if real:
            assert float(self.one.weight.detach().sum()) != 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.top(self.two(self.one(images.flatten(1)))) * self.scale


def tied(shape: Any, classes: int) -> nn.Module:
    return Tied(real=False)


def tied_and_real(shape: Any, classes: int) -> nn.Module:
    return Tied(real=True)


@pytest.mark.parametrize("function", ["tied", "tied_and_real"])
@pytest.mark.parametrize("small", [2**22, 0])
def test_tied_weights_stay_tied_on_the_meta_device(monkeypatch: pytest.MonkeyPatch, function: str, small: int) -> None:
    monkeypatch.setattr(fedtap.simulator.models.registry, "SMALL_MODEL", small)
    name = f"{__name__}:{function}"
    bare, real = build(name, (3, 4, 4), 4), build(name, (3, 4, 4), 4, seed=0)
    shapes = [{key: tensor.shape for key, tensor in net.named_parameters()} for net in (bare, real)]
    assert shapes[0] == shapes[1]
    assert "two.weight" not in shapes[0]
    assert {tensor.device.type for tensor in (*bare.parameters(), *bare.buffers())} == {"meta"}
    assert bare.two.weight is bare.one.weight  # type: ignore[union-attr]
    untied = on_meta(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert len(list(untied.named_parameters())) == 4


def test_a_seed_gives_the_weights_that_it_always_gave() -> None:
    for name in ("mlp", "convnet", "resnet20", "vit"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            expected = BUILDERS[name]((3, 16, 16), 10).state_dict()
        found, bare = build(name, (3, 16, 16), 10, seed=7), build(name, (3, 16, 16), 10)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
        assert {key: t.shape for key, t in bare.state_dict().items()} == {key: t.shape for key, t in expected.items()}
        assert found.training
        assert bare.training


# Files that are none.

JSON = {
    b"[" * 100_000: "nested deeper than 32",
    b'{"a":' * 33 + b"1" + b"}" * 33: "nested deeper than 32",
    b'{"a": ' + b"9" * 400 + b"}": "64 bits",
    b'{"a": ' + b"9" * 5000 + b"}": "4300 digits",
    b'{"a": "\xff"}': "invalid start byte",
    b'{"a": "\\ud800"}': "surrogates not allowed",
    b"[1, 2]": "no JSON object",
    b"": "Expecting value",
    b'{"a": [' + b"[]," * 1_000_001 + b"1]}": "1,000,000 lists",
}


@pytest.mark.parametrize("content", JSON, ids=range(len(JSON)))
def test_json_of_strangers_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FedtapError, match=JSON[content]) as refused:
        read_json(tmp_path / "a.json")
    assert len(str(refused.value)) < 300
    assert "a.json" in str(refused.value)


def test_paths_that_no_file_has_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "large.json") == {"a": 1}
    monkeypatch.setattr(files, "LARGEST_JSON", 4)
    for path in (
        tmp_path / "loop",
        tmp_path / ("x" * 300),
        Path("a\0b"),
        Path("/dev/zero"),
        tmp_path,
        tmp_path / "large.json",
    ):
        with pytest.raises(FedtapError) as refused:
            read_json(path)
        assert len(str(refused.value)) < 300
        assert str(refused.value).isprintable()
    for path in (tmp_path / "loop/a", tmp_path / ("x" * 300) / "a", tmp_path / "a\0b"):
        with pytest.raises(FedtapError, match="could not be written"):
            write_atomically(path, b"")


@pytest.mark.parametrize(
    "text",
    [
        "idlg(" + "1+" * 2000 + "1)",
        "idlg(" + "-" * 5000 + "1)",
        "idlg" + ".a" * 5000,
        "-" * 9999 + "a",
        "idlg(steps=" + "9" * 400 + ")",
        "idlg(" + "9" * 5000 + ")",
        "restarts(idlg, 'x" + "y" * 999 + "')",
        "idlg," * 99 + "x" * 999,
    ],
)
def test_an_attack_of_thousands_of_terms_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(FedtapError, match=r"attack|whole number") as refused:
        parse(text)
    assert len(str(refused.value)) < 300
