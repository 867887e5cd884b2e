"""Tables of what other packages can add, by name: methods and influence metrics (`iiet.facts`),
and more.

A table knows the places of this project's own classes. Another package adds one by an entry point
in its metadata: the table's group, a name, and the place of the class. Names are known without an
import; a class is imported when it is first used, so a broken package is an error only for what
uses it, and settings read the names without PyTorch.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

__all__ = ["ExtensionError", "ExtensionTable", "package_of"]

T = TypeVar("T")


class ExtensionError(ValueError):
    """What another package adds cannot be used; the text names the package and what to do."""


class UnknownExtension(ExtensionError, KeyError):
    """A table has no such name, perhaps because a package is not installed."""

    __str__ = Exception.__str__  # A KeyError would show the text in quotes.


class ExtensionTable(Mapping[str, T]):
    """Classes by name: this project's own, then those of other packages.

    Args:
        group: The group of the entry points, such as `iiet.methods`.
        kind: What a name stands for, such as `method`; for messages.
        own: Names of this project, which no package can replace, and their classes, or the places
            of classes that were not used yet.
        bases: Places; every class is a subclass of one of these.
    """

    def __init__(self, group: str, kind: str, own: dict[str, Any], *bases: str) -> None:
        self.group, self.kind, self.own, self.bases = group, kind, own, bases

    def __getitem__(self, name: str) -> T:
        """Return the class of a name; imports it, once.

        Raises:
            ExtensionError: the class cannot be imported, or is not of the table's kind; or, as a
                KeyError too, there is no such name.
        """
        if isinstance(self.own.get(name), str):
            self.own[name] = pkgutil.resolve_name(self.own[name])
        found: T = self.own[name] if name in self.own else self._added(name)
        return found

    def _added(self, name: str) -> Any:
        entry = next((entry for entry in self.entry_points() if entry.name == name), None)
        if entry is None:
            raise UnknownExtension(
                f"there is no {self.kind} {name!r}; known: {', '.join(self)}; a package that adds "
                "it must be installed here"
            )
        what = f"the {self.kind} {name!r} of the package {package_of(entry)}"
        try:
            found = entry.load()
        except Exception as error:  # A module runs its own code.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExtensionError(
                f"{what} cannot be imported from {entry.value} ({reason}); repair the package, or "
                "uninstall it"
            ) from error
        bases = tuple(map(pkgutil.resolve_name, self.bases))
        if not (isinstance(found, type) and issubclass(found, bases)):
            names = " or ".join(self.bases)
            raise ExtensionError(f"{what} must be a subclass of {names}, got {found!r}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.own or any(name == entry.name for entry in self.entry_points())

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *sorted(entry.name for entry in self.entry_points())])

    def __len__(self) -> int:
        return sum(1 for _ in self)  # `list` would ask for the length.

    def entry_points(self) -> list[EntryPoint]:
        """Return what other packages add; of one name, the first on the path."""
        known = reversed(_entry_points(self.group, tuple(sys.path)))
        found = {entry.name: entry for entry in known if entry.name not in self.own}
        return list(found.values())

    def package(self, name: str) -> str | None:
        """Return the package that adds a name, with its version; None for this project's own."""
        return next((package_of(e) for e in self.entry_points() if e.name == name), None)


def package_of(entry: EntryPoint) -> str:
    """Return name and version of the package that an entry point is of."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


@lru_cache(maxsize=64)
def _entry_points(group: str, _: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reading all metadata takes milliseconds; the result depends on the path.
    return tuple(entry_points(group=group))
