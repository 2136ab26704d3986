"""A user's Flower app, as Flower itself reads it: its name, its components and its run config.

No file of it is changed. The app's modules are imported, so this is for a process of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import MessageType, UserConfig
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args
from flwr.supercore.object_ref import load_app

from fedtap.scenarios.audit.process import users_code
from fedtap.simulator.data.vision import torchvision
from fedtap.simulator.errors import FedtapError, short


@dataclass(frozen=True)
class FlowerApp:
    """What is played: the two components of an app, written for Flower's Message API or for its legacy one."""

    name: str
    """The project's name."""
    version: str
    """The project's version."""
    client: ClientAppCallable
    """The component that each node runs, a ClientApp."""
    server: Callable[..., Any]
    """The component that the server runs: `server(grid=..., context=...)`."""
    digest: str
    """Of the folder's Python files and its pyproject.toml."""
    run_config: UserConfig
    """The app's own configuration, with what `--set` replaced."""
    components: tuple[str, str]
    """The client and the server, as module:attribute."""


def reconfigured(app: FlowerApp, path: Path, overrides: Sequence[str], client: ClientAppCallable) -> FlowerApp:
    """The app with another run config and another client, and nothing imported again.

    Raises:
        FedtapError: it has no such key.
    """
    return replace(app, run_config=_config(path, overrides), client=client)


def mods_of(client: object) -> list[Mod]:
    """A ClientApp's mods on the way of a train reply, each once: of the whole app, and of ``@app.train(mods=[…])``.

    Flower keeps the latter in nothing but the closures of the functions that it makes of them.
    """
    found = list(getattr(client, "_mods", None) or ())
    functions = getattr(client, "_registered_funcs", None) or {}
    for name, function in functions.items():
        while name.split(".")[0] == MessageType.TRAIN and function is not None:
            inside = _closure_of(function)
            if inside.get("_mod") is not None and not any(mod is inside["_mod"] for mod in found):
                found.append(inside["_mod"])
            function = inside.get("_ffn")
    return found


def _closure_of(function: object) -> dict[str, Any]:
    """The values that a function has from where it was made, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


class _Unloadable(Exception):
    """What Flower raises where a component is not of the form module:attribute."""


def flower_app(path: Path, overrides: Sequence[str] = ()) -> FlowerApp:
    """Load the app in the folder `path`.

    Args:
        path: a folder with a pyproject.toml that names the components.
        overrides: `key=value`, as `flwr run --run-config` takes them.

    Raises:
        FedtapError: it is no Flower app, names no components, lacks such a key, or raises as it is imported.
    """
    try:
        project = get_project_config(path)
    except (OSError, ValueError) as error:  # a syntax error in TOML is a ValueError
        raise FedtapError(
            f"{short(path)} is no Flower app ({short(error, 120)}): name the folder whose pyproject.toml has "
            "[tool.flwr.app.components], as `flwr new` makes it."
        ) from error
    components = project["tool"]["flwr"]["app"]["components"]
    if missing := [name for name in ("serverapp", "clientapp") if not isinstance(components.get(name), str)]:
        raise FedtapError(
            f"The app in {short(path)} names no {missing[0]}, so there is no federation to play: name it under "
            "[tool.flwr.app.components] as module:attribute."
        )
    run_config = _config(path, overrides)
    named = components["clientapp"], components["serverapp"]
    client, server = (component(path, one) for one in named)
    about = project["project"]
    return FlowerApp(str(about["name"]), str(about["version"]), client, server, _digest(path), run_config, named)


def _digest(path: Path) -> str:
    """Of names and bytes of the files that make the app."""
    known = hashlib.blake2b(digest_size=8)
    for file in sorted([path / "pyproject.toml", *path.rglob("*.py")]):
        known.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes() + b"\0")
    return known.hexdigest()


def _config(path: Path, overrides: Sequence[str]) -> UserConfig:
    """The app's run config.

    Raises:
        FedtapError: an override cannot be read, or the app has no such key.
    """
    try:
        changed: Mapping[str, Any] = parse_config_args([quoted_override(one) for one in overrides]) if overrides else {}
        return get_fused_config_from_dir(path, dict(changed))
    except Exception as error:  # of click, tomli or Flower itself
        raise FedtapError(
            f"--set {short(' '.join(overrides))} cannot be used ({short(error, 120)}): write key=value with a key of "
            "[tool.flwr.app.config]."
        ) from error


def quoted_override(override: str) -> str:
    """`key=value` with quotes around a value that is neither a number nor true or false."""
    key, sign, value = override.partition("=")
    plain = value in ("true", "false") or value[:1] in "\"'" or _number(value)
    return override if plain or not sign else f'{key}="{value}"'


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def component(path: Path, named: str) -> Any:
    """The object that `module:attribute` names in the app's folder.

    Raises:
        FedtapError: importing it raises, or there is no such attribute.
    """

    def said(why: str) -> str:
        return (
            f"{short(named)} of the app cannot be imported ({why}): see that `flwr run` plays the app in this "
            "environment first."
        )

    with users_code(said):
        try:
            return load_app(named, _Unloadable, path)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            torchvision()  # a build for CUDA beside a torch for CPUs, with which the app's transforms work all the same
            return load_app(named, _Unloadable, path)
