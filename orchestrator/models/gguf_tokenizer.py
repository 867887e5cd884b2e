"""Make the files of a tokenizer, as transformers writes them, from the metadata of a GGUF file.

The file has vocabulary, merges and special tokens, but of the rule that cuts text into words before
the merges only a name. A byte-level tokenizer is built here, by the named rule; one with an unknown
rule is refused, because transformers would silently cut by GPT-2's. One of sentencepiece has no
such rule, and transformers builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from orchestrator.models.hub import offline
from orchestrator.workspace.errors import UserError, first_line, quoted

REMEDY = "give the model's own tokenizer.json with --tokenizer FILE"

_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS_AND_WORDS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])
_RULES = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_AND_WORDS),
}
"""Value of `tokenizer.ggml.pre` -> how text is cut. Source: llama.cpp, `llama-vocab.cpp`."""

_CONTROL, _USER_DEFINED = 3, 4  # Values of `tokenizer.ggml.token_type`.
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_gguf_tokenizer(metadata: Mapping[str, Any], path: Path, folder: Path) -> None:
    """Write `tokenizer.json`, its configuration and the chat template to a folder.

    Args:
        metadata: That of the file.
        path: The file.
        folder: Exists.

    Raises:
        UserError: If the file has no tokenizer, or one that cannot be built.
    """
    ggml = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    if "tokens" not in ggml:
        raise UserError(f"{path} has no tokenizer (tokenizer.ggml.tokens); {REMEDY}")
    try:
        special = {name: ggml["tokens"][ggml[key]] for name, key in _SPECIAL.items() if key in ggml}
        tokenizer = _build(ggml, path)
        _add_first_and_last(tokenizer, ggml, special)
        # Imported here because it takes seconds.
        from transformers import PreTrainedTokenizerFast

        whole = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special,
        )
        whole.save_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"cannot build the tokenizer of {path} ({first_line(error, with_type=True)}); {REMEDY}"
        ) from None


def gguf_token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that begin, end and pad a text, as in transformers' `config.json`."""
    first, end, turn, pad = (
        metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")
    )
    ends = [number for number in dict.fromkeys((end, turn)) if number is not None]
    return {
        "bos_token_id": first,
        "eos_token_id": ends if len(ends) > 1 else end,
        "pad_token_id": pad,
    }


def _build(ggml: Mapping[str, Any], path: Path) -> Tokenizer:
    kind = ggml.get("model")
    if kind == "llama" and ggml.get("add_space_prefix", True):
        return _sentencepiece(path)
    rule = ggml.get("pre")
    if kind != "gpt2" or rule not in _RULES:
        raise UserError(
            f"the tokenizer of {path} is of the kind {quoted(kind)} and cuts words by the rule "
            f"{quoted(rule)}; known are gpt2 with the rules {', '.join(sorted(_RULES))}, and llama "
            f"with a space before each text; {REMEDY}"
        )
    return _byte_level(ggml, _RULES[rule])


def _byte_level(ggml: Mapping[str, Any], rule: pre_tokenizers.PreTokenizer) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = rule, decoders.ByteLevel()
    for token, kind in zip(ggml["tokens"], ggml.get("token_type", ()), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            is_control = kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_control)])
    return tokenizer


def _sentencepiece(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    with offline():
        loaded = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return loaded.backend_tokenizer


def _add_first_and_last(
    tokenizer: Tokenizer, ggml: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Let the tokenizer put the tokens around a text that the file says."""
    adds_first = ggml.get("add_bos_token", ggml.get("model") == "llama")
    first = special.get("bos_token", "") if adds_first else ""
    last = special.get("eos_token", "") if ggml.get("add_eos_token") else ""
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token]
    single, second = f"{first} $A {last}".strip(), f"{first} $B {last}".strip()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=ids
    )
