"""Tables of what other packages can add, by name: methods, influence metrics, and more.

A table holds this project's own classes. Another package adds one by an entry point in its
metadata: the table's group, a name, and the place of the class. Names are read from the metadata; a
class is imported when it is first used, so a broken package is an error only for what uses it. In a
running process, packages that are installed later are not seen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

__all__ = ["ExtensionError", "ExtensionNames", "ExtensionTable", "UnknownExtension", "package_of"]

T = TypeVar("T")


class ExtensionError(ValueError):
    """What another package adds cannot be used; the text names the package and what to do."""


class UnknownExtension(ExtensionError, KeyError):
    """A table has no such name, perhaps because a package is not installed."""

    __str__ = Exception.__str__  # A KeyError would show the text in quotes.


def _nothing(_: str) -> bool:
    return False


class ExtensionNames(Collection[str]):
    """The names of a table, known without an import: its own, then those of other packages.

    Args:
        group: The group of the entry points, such as `iiet.methods`.
        kind: What a name stands for, such as `method`; for messages.
        own: The names of this project.
        is_reserved: Whether a name means something else already.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        own: Collection[str],
        *,
        is_reserved: Callable[[str], bool] = _nothing,
    ) -> None:
        self.group, self.kind, self.own = group, kind, tuple(own)
        self._is_reserved = is_reserved

    def __iter__(self) -> Iterator[str]:
        others = {entry.name for entry in self.entry_points()}
        return iter([*self.own, *sorted(others - set(self.own))])

    def __contains__(self, name: object) -> bool:
        return name in self.own or any(entry.name == name for entry in self.entry_points())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def entry_points(self) -> tuple[EntryPoint, ...]:
        """Return what other packages add."""
        return _entry_points(self.group, tuple(sys.path))

    def package(self, name: str) -> str | None:
        """Return the package that adds a name, with its version; None for this project's own."""
        entry = self.entry_point(name)
        return None if entry is None else package_of(entry)

    def entry_point(self, name: str) -> EntryPoint | None:
        """Return the entry point of a name; None for this project's own and for unknown names.

        Raises:
            ExtensionError: two packages have the name, or it means something else already.
        """
        found = [entry for entry in self.entry_points() if entry.name == name]
        owners = [package_of(entry) for entry in found]
        if found and (name in self.own or self._is_reserved(name)):
            owners.insert(0, "iiet-orch itself")
        if len(owners) > 1:
            raise ExtensionError(
                f"the {self.kind} {name!r} is defined by {' and by '.join(owners)}; "
                "uninstall one of them, or give it another name"
            )
        return found[0] if found else None


class ExtensionTable(Mapping[str, T]):
    """Classes by name; looking up one of another package imports it.

    Args:
        names: The names that are known.
        own: The classes of this project, one for each of its own names.
        bases: Every class is a subclass of one of these.
    """

    def __init__(
        self, names: ExtensionNames, own: Mapping[str, T], *, bases: tuple[type, ...]
    ) -> None:
        assert set(own) == set(names.own)
        self.names = names
        self._bases = bases
        self._classes = dict(own)
        self._checked: set[str] = set()

    def register(self, name: str, added: T) -> None:
        """Add a class to this process.

        Raises:
            ValueError: the name is taken, or the class is not of the table's kind.
        """
        if self._classes.get(name, added) is not added:
            raise ValueError(f"the {self.names.kind} {name!r} exists already: {self[name]}")
        if problem := self._problem(added):
            raise ValueError(f"the {self.names.kind} {name!r} {problem}")
        self._classes[name] = added
        self._checked.add(name)

    def __getitem__(self, name: str) -> T:
        """Return the class of a name.

        Raises:
            UnknownExtension: there is no such name; it is a KeyError, too.
            ExtensionError: two packages have the name, or the class cannot be imported, or is not
                of the table's kind.
        """
        if name not in self._checked:
            entry = self.names.entry_point(name)
            if entry is not None:
                self._classes[name] = self._loaded(entry)
            if name not in self._classes:
                raise UnknownExtension(
                    f"there is no {self.names.kind} {name!r}; known: {', '.join(self)}; a package "
                    "that adds it must be installed here"
                )
            self._checked.add(name)  # Compiled code looks names up, too, but reads no metadata.
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._classes, *self.names]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _loaded(self, entry: EntryPoint) -> T:
        what = f"the {self.names.kind} {entry.name!r} of the package {package_of(entry)}"
        try:
            found = entry.load()
        except Exception as error:  # A module runs its own code.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExtensionError(
                f"{what} cannot be imported from {entry.value} ({reason}); repair the package, or "
                "uninstall it"
            ) from error
        if problem := self._problem(found):
            raise ExtensionError(f"{what} {problem}")
        return cast(T, found)

    def _problem(self, found: object) -> str | None:
        if not (isinstance(found, type) and issubclass(found, self._bases)):
            bases = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in self._bases)
            return f"must be a subclass of {bases}, got {found!r}"
        if inspect.isabstract(found):
            missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
            return f"must define {missing}, got {found!r}"
        return None


def package_of(entry: EntryPoint) -> str:
    """Return name and version of the package that an entry point is of."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


@lru_cache(maxsize=64)
def _entry_points(group: str, _: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reading all metadata takes milliseconds; the result depends on the path.
    return tuple(entry_points(group=group))
