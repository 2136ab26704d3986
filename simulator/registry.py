"""What a folder offers, by name: attacks, defences and scenarios are all found in this one way.

A file defines one class that is named after it: `exact_git.py` defines `ExactGIT`. Names and docstrings are read from
the source, so that a list of them imports nothing (what several share stands in folders called `parts`); a class is
imported when somebody asks for it, and one that cannot be imported is an error for whoever asks, and for nobody else.
Installed packages add theirs by an entry point.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from fedtap.simulator.errors import FedtapError, short, unknown

Kind = TypeVar("Kind")

ATTACK_GROUP = "fedtap.attacks"
"""The entry point group by which installed packages add attacks."""


@dataclass(frozen=True)
class Entry:
    """Where one class stands: `module:name`, and the file if its name is known without an import."""

    module: str
    name: str
    file: Path | None = None

    @property
    def room(self) -> str:
        """The folder that holds the file; of an installed package, its name."""
        return self.file.parent.name if self.file else self.module.partition(".")[0]


class Registry(Mapping[str, type[Kind]], Generic[Kind]):
    """Name -> class, of a package's files and of the entry points of a group.

    Args:
        kind: what one of them is called in errors, such as `attack`.
        package: the package whose folder, and folders within it, are looked through.
        group: the entry point group by which installed packages add theirs.
        base: `module:Class` of which each is a subclass.
    """

    def __init__(self, kind: str, package: str, group: str, base: str) -> None:
        self.kind, self.package, self.group, self.base = kind, package, group, base

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every name, and where its class stands. A name of fedtap's own is not taken over by an installed package."""
        found: dict[str, Entry] = {}
        for point in entry_points(group=self.group):
            module, _, name = point.value.partition(":")
            found[point.name] = Entry(module, name.strip())
        spec = importlib.util.find_spec(self.package)
        for root in map(Path, (spec.submodule_search_locations if spec else None) or ()):
            for file in sorted(root.rglob("*.py")):
                path = ".".join((self.package, *file.relative_to(root).with_suffix("").parts))
                if "parts" in file.parts or path == self.base.partition(":")[0]:
                    continue
                named = [name for name in CLASS.findall(file.read_text(encoding="utf-8")) if _named(name, file.stem)]
                if named:
                    found[file.stem] = Entry(path, named[0], file)
        return dict(sorted(found.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> type[Kind]:
        """The class of this name.

        Raises:
            FedtapError: there is none, it cannot be imported, or it is of another kind.
        """
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        entry = self.entries[name]
        if entry.module.rpartition(".")[2] != name:  # rows, pictures and files call it by its module
            raise FedtapError(
                f"The entry point {short(name)} of {self.group} names a class in {short(entry.module)}, and rows call "
                f"each {self.kind} by its file: rename the entry point or the file, so that they agree."
            )
        return self._load(name, entry)

    def own(self, name: str) -> type[Kind]:
        """The class that `module:Class` names, of a package on the path.

        Raises:
            FedtapError: it cannot be imported, or it is of another kind.
        """
        module, _, attribute = name.partition(":")
        return self._load(name, Entry(module, attribute))

    def about(self, name: str) -> str:
        """The docstring of the file that defines this name; of an installed package, that of its module."""
        entry = self.entries[name]
        if entry.file is not None:
            return ast.get_docstring(ast.parse(entry.file.read_text(encoding="utf-8"))) or ""
        self[name]
        return importlib.import_module(entry.module).__doc__ or ""

    def fields(self, name: str) -> list[str]:
        """The names of a class's own fields, in order; an installed package is imported for it.

        Raises:
            FedtapError: that package cannot be imported, or the class is of another kind.
        """
        entry = self.entries[name]
        file = entry.file or Path(inspect.getfile(self[name]))
        body = ast.parse(file.read_text(encoding="utf-8")).body
        found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == entry.name), None)
        fields = [node for node in (found.body if found else ()) if isinstance(node, ast.AnnAssign)]
        return [ast.unparse(node.target) for node in fields if "ClassVar" not in ast.unparse(node.annotation)]

    def _load(self, name: str, entry: Entry) -> type[Kind]:
        try:
            found = getattr(importlib.import_module(entry.module), entry.name)
        except (Exception, SystemExit) as error:  # a module may do anything as it is imported
            raise FedtapError(
                f"The {self.kind} {short(name)} cannot be loaded ({type(error).__name__}: {short(error, 120)}): mend "
                f"{short(entry.module)}, or use another {self.kind}."
            ) from error
        module, _, base = self.base.partition(":")
        if not isinstance(found, type) or not issubclass(found, getattr(importlib.import_module(module), base)):
            raise FedtapError(
                f"{short(name)} is no {self.kind}: {self.kind}s are subclasses of {base} in {module}; name one of them."
            )
        return found


def called(kind: type, group: str) -> str:
    """How a class is named where a person chooses one: by its file, as the registry of this group has it; or, where it
    is of a package that is not installed with an entry point, `module:Class`."""
    module, name = kind.__module__, kind.__module__.rpartition(".")[2]
    if module.partition(".")[0] == __package__.partition(".")[0] or any(
        (point.name, point.module) == (name, module) for point in entry_points(group=group)
    ):
        return name
    return f"{module}:{kind.__qualname__}"


CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
"""A class with a base; those without one are never found."""


def _named(name: str, file: str) -> bool:
    """Whether a class of this name is the one that its file is named after."""
    return name.lower() == file.replace("_", "")
