"""Tables of what other packages can add, by name: methods and influence metrics
(`iiet.model.facts`), and more.

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
        noun: What a name stands for, such as `method`; for messages.
        own_classes: Names of this project, which no package can replace, and their classes, or the
            places of classes that were not used yet.
        bases: Places; every class is a subclass of one of these.
    """

    def __init__(self, group: str, noun: str, own_classes: dict[str, Any], *bases: str) -> None:
        self.group = group
        self.noun = noun
        self.own_classes = own_classes
        self.bases = bases

    def __getitem__(self, name: str) -> T:
        """Return the class of a name, as `load`."""
        return self.load(name)

    def load(self, name: str) -> T:
        """Import the class of a name, once, and return it.

        Raises:
            ExtensionError: the class cannot be imported, or is not of the table's kind; or, as a
                KeyError too, there is no such name.
        """
        if isinstance(self.own_classes.get(name), str):
            self.own_classes[name] = pkgutil.resolve_name(self.own_classes[name])
        cls: T = self.own_classes[name] if name in self.own_classes else self._load_added(name)
        return cls

    def _load_added(self, name: str) -> Any:
        entry = next((entry for entry in self.entry_points() if entry.name == name), None)
        if entry is None:
            raise UnknownExtension(
                f"there is no {self.noun} {name!r}; known: {', '.join(self)}; a package that adds "
                "it must be installed here"
            )
        subject = f"the {self.noun} {name!r} of the package {package_of(entry)}"
        try:
            cls = entry.load()
        except Exception as error:  # A module runs its own code.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExtensionError(
                f"{subject} cannot be imported from {entry.value} ({reason}); repair the package, "
                "or uninstall it"
            ) from error
        bases = tuple(map(pkgutil.resolve_name, self.bases))
        if not (isinstance(cls, type) and issubclass(cls, bases)):
            names = " or ".join(self.bases)
            raise ExtensionError(f"{subject} must be a subclass of {names}, got {cls!r}")
        return cls

    def __contains__(self, name: object) -> bool:
        is_added = any(name == entry.name for entry in self.entry_points())
        return name in self.own_classes or is_added

    def __iter__(self) -> Iterator[str]:
        added = sorted(entry.name for entry in self.entry_points())
        return iter([*self.own_classes, *added])

    def __len__(self) -> int:
        return sum(1 for _ in self)  # `list` would ask for the length.

    def entry_points(self) -> list[EntryPoint]:
        """Return what other packages add; of one name, the first on the path."""
        # Reversed, because a later entry of a dictionary replaces an earlier one of its key.
        last_to_first = reversed(_entry_points(self.group, tuple(sys.path)))
        by_name = {entry.name: entry for entry in last_to_first}
        return [entry for name, entry in by_name.items() if name not in self.own_classes]

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
