"""Export a decoder to a folder that transformers and lm-eval load without this package.

The folder holds the weights, the tokenizer and the source of every module that the model needs,
those of a method of another package among them. transformers loads such code under
`trust_remote_code=True`, but copies only modules of one folder that import each other by one dot.
So `iiet/methods/base.py` becomes `iiet_methods_base.py`, and imports are rewritten to match.
Nothing else changes: exported folders run the same mathematics.
"""

from __future__ import annotations

import ast
import inspect
import shutil
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec, resolve_name
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from iiet.decoder import Decoder
from iiet.huggingface import IIETForCausalLM, fast_tokenizer
from iiet.methods import METHODS

__all__ = ["export_pretrained"]

_CORE = "iiet"
_ADAPTER = "iiet.huggingface"
_REGISTRY = "iiet.methods"


def export_pretrained(
    decoder: Decoder,
    folder: str | PathLike[str],
    tokenizer_file: str | PathLike[str] | None = None,
    *,
    end_of_text: str = "<|endoftext|>",
    token_ids: Mapping[str, int | list[int] | None] | None = None,
    text_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write everything that `AutoModelForCausalLM.from_pretrained(folder)` needs.

    Args:
        decoder: exported with its own iteration schedule as the default.
        folder: made if missing; files of the same names are overwritten.
        tokenizer_file: a `tokenizer.json`; without it no tokenizer is written.
        end_of_text: the tokenizer's token that ends a document.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, instead of `end_of_text`.
        text_files: name to content of the model's own files for tokenizer and generation, as
            transformers writes them; made from `end_of_text` when not given.

    Raises:
        ValueError: the tokenizer has no such token, or the source of a method of another package
            cannot be rewritten.
    """
    folder = Path(folder)
    sources = flat_sources(decoder.config.method)
    tokenizer = None
    if tokenizer_file is not None and not text_files:
        tokenizer = fast_tokenizer(
            tokenizer_file,
            end_of_text=end_of_text,
            context_length=decoder.config.context_length,
        )
    end_of_text_id = None if tokenizer is None else tokenizer.eos_token_id
    model = IIETForCausalLM.from_decoder(
        decoder, end_of_text_id=end_of_text_id, token_ids=token_ids
    )
    module = _flat_name(_ADAPTER)
    model.config.auto_map = {
        "AutoConfig": f"{module}.IIETConfig",
        "AutoModelForCausalLM": f"{module}.IIETForCausalLM",
    }
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes for the owner alone.
        shutil.copymode(folder / "config.json", weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    for name, content in (text_files or {}).items():
        (folder / name).write_bytes(content)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def flat_sources(method: str) -> dict[str, str]:
    """Return the rewritten source of the adapter and of all it needs, by flat module name.

    For a method of another package, the adapter also registers it.
    """
    layer = METHODS[method]
    owner = layer.__module__
    packages = {_CORE, _top(owner)}
    if getattr(import_module(owner), layer.__name__, None) is not layer or owner == "__main__":
        raise ValueError(
            f"method {method!r} cannot be exported, as {owner}.{layer.__qualname__} cannot be "
            "imported by that name; define it at the top of a module of its own"
        )
    waiting, sources = [_ADAPTER, owner], {}
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module], needed = _flattened(module, packages)
            waiting += needed
    if packages != {_CORE}:
        sources[_ADAPTER] += (
            f"\nfrom .{_flat_name(_REGISTRY)} import METHODS\n"
            f"from .{_flat_name(owner)} import {layer.__name__}\n\n"
            f"METHODS.register({method!r}, {layer.__name__})\n"
        )
    return {_flat_name(module): source for module, source in sources.items()}


def _top(module: str) -> str:
    return module.partition(".")[0]


def _flat_name(module: str) -> str:
    flat = module.replace(".", "_")
    return flat if _top(module) == _CORE else f"method_{flat}"


def _flattened(module: str, packages: set[str]) -> tuple[str, set[str]]:
    """Return a module's source with its imports from these packages rewritten, and the modules that
    they name.
    """
    try:
        source = inspect.getsource(import_module(module))
    except (OSError, TypeError) as error:
        raise ValueError(f"{module} cannot be exported: {error}") from None
    lines, needed = source.splitlines(), set[str]()
    statements = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    # From the last one up, so that the line numbers above stay valid.
    for node in sorted(statements, key=lambda node: node.lineno, reverse=True):
        imports = _imports(node, str(import_module(module).__package__), packages)
        if not imports:
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        before, after = lines[first][: node.col_offset], lines[last - 1][node.end_col_offset :]
        is_alone = not before.strip() and not after.partition("#")[0].strip()
        if isinstance(node, ast.Import) or not is_alone or _CORE in [i.module for i in imports]:
            raise ValueError(
                f"{module} cannot be exported: line {node.lineno} reads {ast.unparse(node)!r}; "
                "write 'from MODULE import NAME' on a line of its own"
            )
        lines[first:last] = [before + line for found in imports for line in found.flat_lines()]
        needed |= {found.module for found in imports}
    return "\n".join([*lines, ""]), needed


class _Import(NamedTuple):
    """One name that a statement imports."""

    module: str
    name: str | None  # None for the module itself
    known_as: str

    def flat_lines(self) -> list[str]:
        flat = _flat_name(self.module)
        if self.name is not None:
            known_as = "" if self.known_as == self.name else f" as {self.known_as}"
            return [f"from .{flat} import {self.name}{known_as}"]
        # transformers copies a module only for the first form, which does not give the module.
        return [f"from .{flat} import __name__ as _", f"from . import {flat} as {self.known_as}"]


def _imports(node: ast.Import | ast.ImportFrom, package: str, packages: set[str]) -> list[_Import]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        return [_Import(name, None, name) for name in names if _top(name) in packages]
    module = resolve_name("." * node.level + (node.module or ""), package)
    if _top(module) not in packages:
        return []
    found = []
    for alias in node.names:
        known_as, inner = alias.asname or alias.name, f"{module}.{alias.name}"
        if hasattr(import_module(module), "__path__") and find_spec(inner):
            found.append(_Import(inner, None, known_as))
        else:
            source = _source_of_exported_name(alias.name) if module == _CORE else module
            found.append(_Import(source, alias.name, known_as))
    return found


def _source_of_exported_name(name: str) -> str:
    """Return the module from which the package `iiet` takes a name; `iiet` itself if none."""
    for node in ast.walk(ast.parse(inspect.getsource(import_module(_CORE)))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return str(node.module)
    return _CORE
