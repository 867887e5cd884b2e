"""Export a decoder to a folder that transformers and lm-eval load without this package.

In: a decoder and, if wanted, its tokenizer. Out: `config.json`, `model.safetensors`, the tokenizer
and the source of every module that the model needs. transformers loads such code under
`trust_remote_code=True`, but copies only modules beside each other that are imported by one dot. So
the modules are written flat under their full names, `iiet/methods/base.py` becomes
`iiet_methods_base.py`, and their imports are rewritten to match. Nothing else in them changes:
exported folders run the same mathematics as here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from iiet.decoder import Decoder
from iiet.huggingface import IIETForCausalLM, fast_tokenizer

__all__ = ["export_pretrained"]

ADAPTER = "iiet.huggingface"
INTERNAL_IMPORT = re.compile(r"^( *)from (iiet[\w.]*) import ", flags=re.MULTILINE)


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
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` of a model that has its own;
            `end_of_text` alone when unset.
        text_files: name to content of a model's own files that say how its tokenizer is used and
            how it generates, as transformers writes them; made from `end_of_text` when unset.

    Returns:
        The folder.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    folder = Path(folder)
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
    module = _flat_name(ADAPTER)
    model.config.auto_map = {
        "AutoConfig": f"{module}.IIETConfig",
        "AutoModelForCausalLM": f"{module}.IIETForCausalLM",
    }
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    for name, content in (text_files or {}).items():
        (folder / name).write_bytes(content)
    for name, source in flat_sources().items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def flat_sources() -> dict[str, str]:
    """Return the rewritten source of the adapter and of all it needs, by flat module name."""
    waiting, sources = [ADAPTER], {}
    while waiting:
        module = waiting.pop()
        if _flat_name(module) in sources:
            continue
        source = _source_of(module)
        waiting += [match[2] for match in INTERNAL_IMPORT.finditer(source)]
        sources[_flat_name(module)] = INTERNAL_IMPORT.sub(
            lambda match: f"{match[1]}from .{_flat_name(match[2])} import ", source
        )
    return sources


def _flat_name(module: str) -> str:
    return module.replace(".", "_")


def _source_of(module: str) -> str:
    """Read a module or a package's own module."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")
