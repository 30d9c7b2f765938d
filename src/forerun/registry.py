"""Where names in a recipe find their code: drafters, engines, tasks, algorithms, trackers.

An entry is `name -> "package.module:Name"`, so that a registry is imported without what it names, or the part itself.
Outside the package a name comes from an entry point of the group `forerun.<kind>s`, or is itself such a path, or
"file.py:Name".
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from forerun.errors import UserError, place_of


def load_path(path: str) -> Any:
    """What "package.module:Name" or "file.py:Name" names; modules of the working directory are found.

    Raises:
        ImportError: there is no such module, or it raised something: what, and in which line. AttributeError.
    """
    module, _, name = path.rpartition(":")
    if not module:
        raise ImportError(f"'{path}' names no module; write package.module:Name, or file.py:Name")
    try:
        found = _from_file(Path(module).expanduser()) if module.endswith(".py") else _from_path(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise ImportError(f"{error}{place_of(error)}") from None
        raise ImportError(f"there is no module '{error.name}' in {os.getcwd()} or on Python's path") from None
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ImportError(f"{type(error).__name__}: {message}{place_of(error)}") from None
    return getattr(found, name)


def _from_path(module: str) -> ModuleType:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


def _from_file(path: Path) -> ModuleType:
    """The module of a file, under the file's name unless a library has it; files beside it can be imported from it."""
    file = path.resolve()
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    name = f"{file.stem}_{abs(hash(file))}" if loaded is not None or _names_another(file) else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _names_another(file: Path) -> bool:
    """Whether a library would be imported under this file's name (datasets.py, say)."""
    found = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
    return found is not None and found.origin is not None and Path(found.origin).resolve() != file


class Registry:
    """The names of one kind of part."""

    def __init__(self, kind: str, entries: Mapping[str, Any], members: Sequence[str] = ()) -> None:
        """See the module.

        Args:
            kind: as an error names it, e.g. "drafter".
            entries: name -> "package.module:Name" or the part.
            members: attributes that every part has.
        """
        self.kind = kind
        self.entries = dict(entries)
        self.members = tuple(members)

    def names(self) -> list[str]:
        """Names that ship with the package, then those of entry points."""
        return [*self.entries, *(p.name for p in self._entry_points() if p.name not in self.entries)]

    def check(self, name: str) -> None:
        """Raises UserError, naming the nearest, when there is no such name; a path is not imported for this."""
        if ":" in name or name in self.names():
            return
        known = self.names()
        near = difflib.get_close_matches(name, known, 1)
        if near:
            hint = f"did you mean '{near[0]}'?"
        else:
            hint = f"there are {', '.join(known)}" if known else "write the path of yours, package.module:Name"
        raise UserError(f"No {self.kind} is called '{name}'; {hint}")

    def load(self, name: str) -> Any:
        """What a name stands for.

        Raises:
            UserError: there is no such name, its module cannot be imported, or it is no such part.
        """
        part = self._find(name)
        missing = [member for member in self.members if not hasattr(part, member)]
        if missing:
            raise UserError(f"'{name}' is no {self.kind}: it has no {', no '.join(missing)} (docs/extending.md)")
        return part

    def _find(self, name: str) -> Any:
        self.check(name)
        path = self.entries.get(name) or next((p.value for p in self._entry_points() if p.name == name), name)
        if not isinstance(path, str):
            return path
        try:
            return load_path(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"The {self.kind} '{name}' cannot be imported from {path}: {error}") from None

    def with_trait(self, trait: str) -> list[str]:
        """Names that ship with the package and whose class has the attribute `trait` true. Imports them all."""
        return [name for name in self.entries if getattr(self.load(name), trait)]

    def _entry_points(self) -> Any:
        return entry_points(group=f"forerun.{self.kind}s")


DRAFTERS = Registry(
    "drafter",
    {
        "eagle3": "forerun.drafters.eagle3:Eagle3Drafter",
        "mtp": "forerun.drafters.mtp:MtpDrafter",
        "ngram": "forerun.drafters.ngram:NgramDrafter",
        "trie": "forerun.drafters.trie:TrieDrafter",
        "model": "forerun.drafters.draft_model:ModelDrafter",
        "graft": "forerun.drafters.graft:GraftDrafter",
        "vllm": "forerun.drafters.vllm_native:VllmNativeDrafter",
    },
    members=("from_config", "propose", "trains", "samples"),
)
ENGINES = Registry(
    "engine",
    {"local": "forerun.engine.local.engine:LocalEngine", "vllm": "forerun.engine.vllm.adapter:VllmEngine"},
    members=("from_live", "stream", "shares_weights"),
)
