"""A gradient captured elsewhere: from one's own model and `torch.autograd.grad` to a reconstruction."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fedtap
from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.linear import Linear
from fedtap.attackers.gradients.rgap import RGAP
from fedtap.scenarios.command.main import main
from fedtap.simulator.attack import Attack, Reconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, load
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.captured import leak
from tests.support.attack_leaks import pictures

SHAPE = (3, 16, 16)


class Unused(nn.Module):
    """With a BatchNorm, whose buffers travel, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.unused = (
            nn.Linear(768, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 10),
            nn.Linear(2, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(images.flatten(1)))))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.other, self.head = (nn.Linear(a, b) for a, b in ((768, 8), (8, 8), (8, 8), (8, 10)))
        self.other.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(self.embed(images.flatten(1)))))))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 10))


def captured(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()), allow_unused=True)


def test_a_gradient_as_autograd_returns_it_is_a_leak() -> None:
    images, labels = pictures(2, 1)
    model = plain()
    grads = [captured(model, x, y) for x, y in zip(images, labels, strict=True)]
    found = leak(model, grads[0], shape=SHAPE)
    assert (found.protocol.classes, found.protocol.batch, len(found)) == (10, 1, 1)
    assert float((Linear()(found).images - images[:1]).abs().max()) < 1e-3
    by_name = {name: grad for (name, _), grad in zip(model.named_parameters(), grads[0], strict=True)}
    for same in (
        leak(model, by_name, shape=SHAPE, classes=10),
        leak(model, grads, shape=SHAPE)[0],
        leak(model, [by_name], shape=SHAPE),
        leak(model, {f"_orig_mod.module.{name}": grad for name, grad in by_name.items()}, shape=SHAPE),
        leak(nn.DataParallel(model), grads[0], shape=SHAPE),
        leak(torch.compile(model, backend="eager"), grads[0], shape=SHAPE),  # type: ignore[arg-type]
    ):
        assert all(torch.equal(same.gradient[name], found.gradient[name]) for name in found.gradient)
        assert same.protocol.model == "Sequential"
        assert all(torch.equal((same.weights or {})[name], (found.weights or {})[name]) for name in found.gradient)
    assert len(IDLG(steps=2)(leak(model, grads, shape=SHAPE, defence="noise(0.1)")).images) == 2
    assert all(parameter.device.type == "meta" for parameter in found.network.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_opacus_wraps_a_model_whose_gradient_is_read() -> None:
    from opacus.grad_sample import GradSampleModule

    images, labels = pictures(1, 1)
    model = plain()
    grads = captured(model, images[0], labels[0])
    wrapped = GradSampleModule(model)
    by_name = {name: grad for (name, _), grad in zip(wrapped.named_parameters(), grads, strict=True)}
    assert next(iter(by_name)).startswith("_module.")
    assert torch.equal(leak(wrapped, by_name, shape=SHAPE).gradient["1.weight"][0], grads[0])  # type: ignore[arg-type]


def test_what_is_unused_or_frozen_has_a_gradient_of_zeros_and_buffers_come_along() -> None:
    images, labels = pictures(1, 4)
    torch.manual_seed(0)
    model = Unused()
    grads = captured(model, images[0], labels[0])
    found = leak(model, grads, shape=SHAPE, batch=4)
    assert not found.gradient["unused.weight"].any()
    assert set(found.buffers) == {"norm.running_mean", "norm.running_var"}
    assert IDLG(steps=2)(found).images.isfinite().all()
    model.first.requires_grad_(False)
    moving = [grad for (_, p), grad in zip(model.named_parameters(), grads, strict=True) if p.requires_grad]
    frozen = leak(model, moving, shape=SHAPE, batch=4)
    assert not frozen.gradient["first.weight"].any()
    assert torch.equal(frozen.gradient["last.weight"], found.gradient["last.weight"])


def test_weights_that_layers_share_are_one_tensor_under_either_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = pictures(2, 1)
    model = Tied()
    grads = captured(model, images[0], labels[0])
    found = leak(model, grads, shape=SHAPE)
    assert found.network.get_parameter("other.weight") is found.network.get_parameter("one.weight")
    assert torch.equal(IDLG(steps=2)(found).labels, labels[:1])
    start = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert float(IDLG(steps=60)(found, start=start).objective) < 0.1 * float(
        IDLG(steps=1)(found, start=start).objective
    )
    found.save(tmp_path / "leak.safetensors")
    tensors = load_file(tmp_path / "leak.safetensors")
    for group in ("gradient", "weights"):
        tensors[f"{group}/other.weight"] = tensors[f"{group}/one.weight"].clone()
        tensors[f"{group}/_module.head.bias"] = tensors.pop(f"{group}/head.bias")
    save_file(tensors, tmp_path / "leak.safetensors")

    def same(*_: object) -> nn.Module:
        return found.network

    again = load(tmp_path / "leak.safetensors", same)
    assert all(torch.equal(again.observed[name], found.observed[name]) for name in found.observed)
    tensors["gradient/other.weight"] += 1
    save_file(tensors, tmp_path / "leak.safetensors")
    with pytest.raises(FedtapError, match="two values are given"):
        load(tmp_path / "leak.safetensors", same)


class SharedFirst(nn.Module):
    """The first layer's weight is the second's too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, 10)
        self.other.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.other(torch.sigmoid(self.one(images.flatten(1))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (Linear(), "uses the weights of its one more than once"),
        (ExactGIT(), "uses the weight one.weight once more"),
        (RGAP(), "uses the weight one.weight once more"),
    ],
)
def test_closed_forms_refuse_a_weight_that_layers_share(attack: Attack, said: str) -> None:
    torch.manual_seed(0)
    images, labels = pictures(1, 1)
    model = SharedFirst()
    found = leak(model, captured(model, images[0], labels[0]), shape=SHAPE)
    with pytest.raises(FedtapError, match=said):
        attack(found)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, g: leak(m, g, shape=(5,)), "does not take two inputs of shape"),
        (lambda m, g: leak(m, g[1:], shape=SHAPE), "3 tensors, and the model has 4 parameters"),
        (lambda m, g: leak(m, g, shape=SHAPE, classes=7), "returns 10 logits and not 7"),
        (lambda m, g: leak(m, {"nobody": g[0]}, shape=SHAPE), "not of it nobody"),
        (lambda m, g: leak(m, [*g[:3], g[3] * torch.nan], shape=SHAPE), "NaN"),
        (lambda m, g: leak(m[:3], g[:2], shape=SHAPE, classes=10), "returns 16 logits and not 10"),
        (lambda m, g: leak(nn.Conv2d(3, 4, 3), g, shape=SHAPE), r"returns \(2, 4, 14, 14\) for two inputs"),
        (lambda m, g: leak(m, [t[:1] for t in g], shape=SHAPE), "needs"),
        (lambda m, g: leak(m, torch.optim.Adam(m.parameters()).state_dict(), shape=SHAPE), "a value of type"),
        (lambda m, g: leak(m, torch.optim.Adam(m.parameters()), shape=SHAPE), "of type Adam: give what torch"),
        (lambda m, g: leak(m, g[0], shape=SHAPE), "of type Tensor"),
        (lambda m, g: leak(m, {m[1].weight: g[0]}, shape=SHAPE), "of type dict"),
        (lambda m, g: leak(m, 0, shape=SHAPE), "of type int"),
        (lambda m, g: leak(m, [t.to("meta") for t in g], shape=SHAPE), "meta device"),
        (lambda m, g: leak(m, [t.cfloat() for t in g], shape=SHAPE), "complex"),
        (lambda m, g: leak(m, g, shape=SHAPE, bacth=2), "did you mean batch"),
        (lambda m, g: leak(m, g, shape=SHAPE, batch=0), "whole numbers from 1"),
        (lambda m, g: leak(m.state_dict(), g, shape=SHAPE), "of type OrderedDict, and what was trained"),
        (lambda m, g: fedtap.attack(leak(m, g, shape=SHAPE), IDLG), "is no attack: give its name"),  # type: ignore[call-overload]
    ],
)
def test_a_gradient_of_something_else_is_refused_in_a_sentence(
    call: Callable[[nn.Module, tuple[Tensor, ...]], Leak], said: str
) -> None:
    images, labels = pictures(1, 1)
    model = plain()
    with pytest.raises(FedtapError, match=said) as caught:
        call(model, captured(model, images[0], labels[0]))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_arrays_sparse_tensors_and_generators_are_the_same_gradient() -> None:
    images, labels = pictures(1, 1)
    model = plain()
    grads = [part for part in captured(model, images[0], labels[0]) if part is not None]
    expected = leak(model, grads, shape=SHAPE).observed
    for given in ([g.numpy() for g in grads], [g.to_sparse() for g in grads], iter(grads)):
        found = leak(model, given, shape=SHAPE).observed
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_attacked(kind: torch.dtype) -> None:
    images, labels = pictures(1, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Sigmoid(), nn.Linear(64, 10)).to(kind)
    grads = captured(model, images[0].to(kind), labels[0])
    found = fedtap.attack(leak(model, grads, shape=SHAPE), "idlg(steps=200)")
    assert float((found.images[0] - images[0]).abs().max()) < (1e-3 if kind == torch.float64 else 0.2)
    assert model[1].weight.dtype == kind


def test_units_dropped_at_random_are_told_of() -> None:
    images, labels = pictures(1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    with pytest.warns(UserWarning, match="drops units at random"):
        leak(model, captured(model, images[0], labels[0]), shape=SHAPE)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leak(model, captured(model, images[0], labels[0]), shape=SHAPE)


def test_what_is_no_gradient_of_the_model_is_told_of() -> None:
    images, labels = pictures(1, 1)
    model = plain()
    gradient = captured(model, images[0], labels[0])
    with pytest.warns(UserWarning, match="zero in every entry: the client did not train"):
        leak(model, [torch.zeros_like(one) for one in model.parameters()], shape=SHAPE)
    with pytest.warns(UserWarning, match="equal to the model's own weights"):
        leak(model, list(model.parameters()), shape=SHAPE)
    with pytest.warns(UserWarning, match=r"weights were given in its place. \(1 of 2 victims\)"):
        leak(model, [gradient, dict(model.named_parameters())], shape=SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leak(model, gradient, shape=SHAPE)


@pytest.mark.parametrize("seed", ["a", -1, 1.5, None])
def test_a_seed_is_a_whole_number_from_0(seed: Any) -> None:
    images, labels = pictures(1, 1)
    model = plain()
    found = leak(model, captured(model, images[0], labels[0]), shape=SHAPE)
    with pytest.raises(FedtapError, match="it is a whole number from 0"):
        fedtap.attack(found, "linear", seed=seed)
    assert torch.equal(fedtap.attack(found, "linear", seed=np.int64(3)).labels, labels)  # type: ignore[arg-type]


class Sigmoid(torch.autograd.Function):
    """Written as most are, with what is saved in forward."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        y = x.sigmoid()
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context: Any, above: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = context.saved_tensors
        return above * y * (1 - y)  # type: ignore[no-any-return]


class VmappedSigmoid(Sigmoid):
    """Written as the error asks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.sigmoid()

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Tensor) -> None:
        context.save_for_backward(output)


def test_a_custom_autograd_function_is_attacked_once_it_is_written_as_the_error_says() -> None:
    images, labels = pictures(1, 1)

    class Custom(nn.Module):
        def __init__(self, function: type[Sigmoid]) -> None:
            super().__init__()
            self.first, self.last, self.function = nn.Linear(768, 64), nn.Linear(64, 10), function

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.function.apply(self.first(x.flatten(1))))  # type: ignore[no-any-return, no-untyped-call]

    model = Custom(Sigmoid)
    grads = captured(model, images[0], labels[0])
    with pytest.raises(FedtapError, match="setup_context and generate_vmap_rule = True"):
        fedtap.attack(leak(model, grads, shape=SHAPE), "idlg(steps=200)")
    model.function = VmappedSigmoid
    found = fedtap.attack(leak(model, grads, shape=SHAPE), "idlg(steps=200)")
    assert float((found.images[0] - images[0]).abs().max()) < 1e-2


def test_a_leak_is_saved_at_a_path_given_as_text(tmp_path: Path) -> None:
    images, labels = pictures(1, 1)
    model = plain()
    leak(model, captured(model, images[0], labels[0]), shape=SHAPE).save(str(tmp_path / "a.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


def test_a_file_without_a_victims_axis_or_weights_names_its_own_cause(tmp_path: Path) -> None:
    images, labels = pictures(1, 1)
    model, path = plain(), tmp_path / "leak.safetensors"
    found = leak(model, captured(model, images[0], labels[0]), shape=SHAPE)

    def same(*_: object) -> nn.Module:
        return found.network

    found.save(path)
    tensors = load_file(path)
    save_file({n: t[0] if n.startswith("gradient/") else t for n, t in tensors.items()}, path)
    with pytest.raises(FedtapError, match=r"has the shape of one victim's.*leading axis \(tensor\[None\]\)"):
        load(path, same)
    save_file({n: t for n, t in tensors.items() if not n.startswith("weights/")}, path)
    with pytest.raises(FedtapError, match=r"does not know them: put them into its file as weights/NAME") as caught:
        IDLG().accepts(load(path, same))
    assert not re.search("--threat-model", str(caught.value))


def attacked(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """`fedtap attack` in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedtap", "attack", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


MINE = "def cat(shape, classes):\n    from tests.simulator.test_captured import plain\n    return plain()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two leaks and one file that is none, of a model of one's own."""
    (tmp_path / "mine_captured.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    images, labels = pictures(2, 1)
    model = plain()
    for number in range(2):
        grads = captured(model, images[number], labels[number])
        found = leak(model, grads, shape=SHAPE, name="mine_captured:cat")
        found.save(tmp_path / f"leaks/{number}.safetensors")
    (tmp_path / "leaks/broken.safetensors").write_bytes(b"no")
    (tmp_path / "leaks/broken.json").write_text("{}")
    return tmp_path


def test_a_folder_of_leaks_is_attacked_in_one_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = pictures(2, 1)
    words = ["--model", "mine_captured:cat", "--attack", "linear,idlg(steps=2)", "--out", folder / "out"]
    assert attacked(monkeypatch, folder / "leaks", *words) == 0
    found = rows(folder / "out")
    assert [(row["leak"], row["attack"]) for row in found] == [
        ("broken.safetensors", None),
        *((f"{number}.safetensors", attack) for number in range(2) for attack in ("linear", "idlg")),
    ]
    assert "is no leak's description" in found[0]["error"]
    for row, number in zip(found[1::2], range(2), strict=True):
        assert row["labels"] == labels[number].tolist()
        assert row.get("error") is None
        pixels = np.asarray(Image.open(folder / "out" / row["picture"]).convert("RGB")) / 255
        np.testing.assert_allclose(pixels, images[number, 0].permute(1, 2, 0), atol=3e-3)
    said = capsys.readouterr().out
    assert "pictures/" in said
    assert "broken.safetensors: " in said
    page = (folder / "out/report.html").read_text()
    assert page.count("<img") == 4
    assert "PSNR" not in page


def test_an_attack_that_fails_everywhere_ends_in_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder / "leaks/0.safetensors", "--model", "mine_captured:cat", "--attack", "idlg(steps=1)", "--out"]

    def fails(*_: object) -> object:
        raise FedtapError("It :cat: did [bold]not[/bold] work: try another.")

    with monkeypatch.context() as patch:
        patch.setattr(IDLG, "reconstruct", fails)
        assert attacked(patch, *words, folder / "one") == 1
    assert rows(folder / "one")[0]["error"].startswith("It :cat:")
    assert "It :cat: did [bold]not[/bold] work" in " ".join(capsys.readouterr().out.split())
    with monkeypatch.context() as patch:
        nowhere = Reconstruction(torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1).long(), torch.full((1,), torch.nan))
        patch.setattr(IDLG, "reconstruct", lambda *_: nowhere)
        assert attacked(patch, *words, folder / "two") == 1
    assert "diverged" in rows(folder / "two")[0]["error"]
    assert attacked(monkeypatch, *words, folder / "three") == 0
    assert attacked(monkeypatch, folder / "leaks/broken.safetensors", "--out", folder / "four") == 2
    assert attacked(monkeypatch, folder, "--out", folder / "four") == 2
    assert "holds no leaks" in capsys.readouterr().err
    assert not (folder / "four").exists()


def test_a_run_in_which_every_row_is_an_error_ends_in_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> object:
        raise ValueError("no data today")

    for step in ("gradients", "sgd"):  # of clients together, and of each
        monkeypatch.setattr(f"fedtap.clients.honest.{step}", fails)
    words = ["run", "first_leak", "--victims", "1", "--size", "8", "--attack", "linear", "--model", "mlp"]
    monkeypatch.setattr(sys, "argv", ["fedtap", *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "no data today" in rows(tmp_path)[0]["error"]


def test_the_documented_way_from_gradient_to_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/own_gradient.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    mine = ModuleType("mine")
    mine.model = build("lenet", (3, 32, 32), 10, seed=1)  # type: ignore[attr-defined]
    mine.gradients = captured(mine.model, torch.rand(1, 3, 32, 32), torch.tensor([4]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    names: dict[str, Any] = {}
    exec(code[1].replace('"idlg"', '"idlg(steps=1)"'), names)
    assert names["found"].labels.item() == 4
    assert load(tmp_path / "leaks/mine.safetensors", build, "lenet").protocol.batch == 1
