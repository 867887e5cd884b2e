"""Tables of what other packages can add, by name: methods, influence metrics, and more.

A table holds this project's own classes. Another package adds one by an entry point in its
metadata: the table's group, a name, and the place of the class. Names are read from the metadata; a
class is imported when it is first used, so a broken package is an error only for what uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
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


class ExtensionNames(Collection[str]):
    """The names of a table, known without an import: its own, then those of other packages.

    Args:
        group: The group of the entry points, such as `iiet.methods`.
        kind: What a name stands for, such as `method`; for messages.
        own: The names of this project, which no package can replace.
    """

    def __init__(self, group: str, kind: str, own: Collection[str]) -> None:
        self.group, self.kind, self.own = group, kind, tuple(own)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *sorted(entry.name for entry in self.entry_points())])

    def __contains__(self, name: object) -> bool:
        return name in self.own or any(entry.name == name for entry in self.entry_points())

    def __len__(self) -> int:
        return len(self.own) + len(self.entry_points())

    def entry_points(self) -> tuple[EntryPoint, ...]:
        """Return what other packages add; of one name, the first on the path."""
        found = {
            entry.name: entry for entry in reversed(_entry_points(self.group, tuple(sys.path)))
        }
        return tuple(entry for name, entry in found.items() if name not in self.own)

    def package(self, name: str) -> str | None:
        """Return the package that adds a name, with its version; None for this project's own."""
        return next((package_of(e) for e in self.entry_points() if e.name == name), None)


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
        self.names, self.bases = names, bases
        self._classes = dict(own)

    def __getitem__(self, name: str) -> T:
        """Return the class of a name.

        Raises:
            UnknownExtension: there is no such name; it is a KeyError, too.
            ExtensionError: the class cannot be imported, or is not of the table's kind.
        """
        if name not in self._classes:
            entries = [entry for entry in self.names.entry_points() if entry.name == name]
            if not entries:
                raise UnknownExtension(
                    f"there is no {self.names.kind} {name!r}; known: {', '.join(self)}; a package "
                    "that adds it must be installed here"
                )
            self._classes[name] = self._loaded(entries[0])
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
        if not (isinstance(found, type) and issubclass(found, self.bases)):
            bases = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in self.bases)
            raise ExtensionError(f"{what} must be a subclass of {bases}, got {found!r}")
        return cast(T, found)


def package_of(entry: EntryPoint) -> str:
    """Return name and version of the package that an entry point is of."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


@lru_cache(maxsize=64)
def _entry_points(group: str, _: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reading all metadata takes milliseconds; the result depends on the path.
    return tuple(entry_points(group=group))
