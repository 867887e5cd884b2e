"""How text becomes tokens for a model that is evaluated or writes, and tokens become text.

Checkpoints that were trained here add no special tokens. A transformers folder may (one that opens
every text, for example), and its published scores were measured with them. So its own tokenizer is
used, called as lm-eval calls it, also by a checkpoint that was imported from it.
`read_model_text_files` gathers what such a checkpoint keeps of its source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from tokenizers import Tokenizer

from iiet.weights import CONFIG
from orchestrator.models.folder import (
    GENERATION_CONFIG,
    TOKEN_IDS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_text_files,
    tokenizer_file,
)
from orchestrator.models.loading import CHECKPOINT, EXPORTED, folder_kind, read_config
from orchestrator.models.tokenizer import (
    end_of_text_id,
    find_end_of_text_id,
    load_tokenizer,
    load_transformers_tokenizer,
)
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import UserError, quoted

MAX_SYMBOLS_SHOWN = 6
TOKEN_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""


class ModelTokenizer(Protocol):
    """What scoring and generation need from a tokenizer."""

    prefix_id: int
    """The token that replaces an empty context."""
    end_ids: frozenset[int]
    """Tokens that end a text."""
    tokenizer: Any
    """The library's tokenizer, for pieces of text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text, with the tokenizer's special tokens if wanted."""
        ...

    def encode_document(self, text: str) -> tuple[int, ...]:
        """Return the tokens of the beginning of a document; at least one."""
        ...

    def symbol_id(self, text: str) -> int | None:
        """Return the token of a text that is never merged with the text around it, or None."""
        ...

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        ...

    def chat(self, messages: Sequence[Message], *, opens_answer: bool, template: str | None) -> str:
        """Return messages as the chat template writes them.

        Args:
            opens_answer: Begin the assistant's answer; otherwise the last message is its beginning.
            template: Name of a template; the model's default when None.

        Raises:
            UserError: If there is no such template, or it fails.
        """
        ...


class PlainTokenizer:
    """The tokenizer of a model that was trained here; it adds no special tokens.

    Raises:
        UserError: If the file is missing or damaged, or has no end-of-text token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tokenizer: Tokenizer = load_tokenizer(path)
        self.prefix_id = end_of_text_id(self.tokenizer)
        self.end_ids = frozenset({self.prefix_id})
        self._symbols = {
            token.content: number
            for number, token in self.tokenizer.get_added_tokens_decoder().items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:  # noqa: ARG002
        """Return the tokens of a text, as in the training data."""
        return self._encode(text, add_special_tokens=False)

    def encode_document(self, text: str) -> tuple[int, ...]:
        """Return the tokens after an end-of-text token, unless the tokenizer adds its own."""
        plain = self._encode(text, add_special_tokens=False)
        ids = self._encode(text, add_special_tokens=True)
        return tuple(ids) if tuple(ids[:1]) != plain[:1] else (self.prefix_id, *plain)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # Spaces between symbols mean nothing; a tokenizer that reads text reads them, too.
        for readable in (text, "".join(text.split())):
            with suppress(Exception):  # tokenizers raises plain Exception
                found = self.tokenizer.encode(readable, add_special_tokens=add_special_tokens)
                return tuple(found.ids)
        raise UserError(
            f"the model's tokenizer cannot read {quoted(text)}; it reads symbols such as "
            f"{', '.join(self.symbols[:MAX_SYMBOLS_SHOWN])}"
        )

    @property
    def symbols(self) -> list[str]:
        """Texts that are never merged with the text around them, without the end of a text."""
        return [text for text, number in self._symbols.items() if number != self.prefix_id]

    def symbol_id(self, text: str) -> int | None:
        """Return the token of a text that is never merged with the text around it, or None."""
        return self._symbols.get(text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def chat(
        self,
        messages: Sequence[Message],  # noqa: ARG002
        *,
        opens_answer: bool,  # noqa: ARG002
        template: str | None,  # noqa: ARG002
    ) -> str:
        """Raise `UserError`: models that were trained here have no chat template."""
        raise _no_template(self._path.parent)


class FolderTokenizer:
    """The tokenizer of a transformers folder, with the special tokens that it adds.

    Raises:
        UserError: If the folder has no tokenizer that can be loaded, or the tokenizer names no
            token to begin a text with.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self.loaded = load_transformers_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.tokenizer: Any = getattr(self.loaded, "backend_tokenizer", None)
        first, end = self.loaded.bos_token_id, self.loaded.eos_token_id
        first = end if first is None else first
        if first is None:
            raise UserError(
                f"the tokenizer in {folder} names neither a bos_token nor an eos_token, and a text "
                "without context needs one; name one in tokenizer_config.json"
            )
        self.prefix_id = int(first)
        self.end_ids = frozenset(_stop_token_ids(folder) | (set() if end is None else {end}))
        self._prefix = self.loaded.decode([self.prefix_id])

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text; an opening token that is present is not added again."""
        wanted = add_special_tokens and not text.startswith(self._prefix)
        return tuple(self.loaded.encode(text, **({} if wanted else {"add_special_tokens": False})))

    def encode_document(self, text: str) -> tuple[int, ...]:
        """Return the tokens as transformers does; the opening token for an empty text."""
        return self.encode(text, add_special_tokens=True) or (self.prefix_id,)

    def symbol_id(self, text: str) -> None:
        """Return None: only the text as a whole says how its tokens are made."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self.loaded.decode(tokens, skip_special_tokens=skip_special_tokens))

    def chat(self, messages: Sequence[Message], *, opens_answer: bool, template: str | None) -> str:
        """Return messages as the chat template writes them; see `ModelTokenizer`."""
        try:
            return str(
                self.loaded.apply_chat_template(
                    list(messages),
                    chat_template=self._template(template),
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                    continue_final_message=not opens_answer,
                )
            )
        except UserError:
            raise
        except Exception as error:  # A template is a program and can fail in any way.
            raise UserError(f"the chat template of {self._folder} fails: {error}") from None

    def _template(self, name: str | None) -> str:
        known = self.loaded.chat_template
        if not known:
            raise _no_template(self._folder)
        named = known if isinstance(known, dict) else {"default": known}
        if (name or "default") not in named:
            raise UserError(
                f"{self._folder} has no chat template named {name or 'default'}; it has "
                f"{', '.join(sorted(named))}"
            )
        return str(named[name or "default"])


def checkpoint_tokenizer(checkpoint: Path) -> ModelTokenizer:
    """Return how a checkpoint reads text: as in training here, or as in the folder it came from.

    Raises:
        UserError: If it has no tokenizer, or one that cannot be used.
    """
    if (checkpoint / TOKENIZER_CONFIG).is_file():
        return FolderTokenizer(checkpoint)
    return PlainTokenizer(tokenizer_file(checkpoint))


def check_template(tokenizer: ModelTokenizer, prompts: Prompts) -> None:
    """Raise `UserError` if prompts need a chat template that the model does not have."""
    if prompts.chat_template:
        question: list[Message] = [{"role": "user", "content": "?"}]
        tokenizer.chat(question, opens_answer=True, template=prompts.template_name)


def read_token_ids(file: Path, name: str) -> list[int]:
    """Return the ids of a special token in a configuration; it may be one, a list, or absent.

    Raises:
        UserError: If the file cannot be read, or the value is no token's number.
    """
    value = read_config(file.parent, file.name).get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise UserError(
            f"{name} in {file} must be a token's number, or a list of them; got {value!r}"
        )
    return ids


def read_model_text_files(
    folder: Path, tokenizer: Path | None, *, vocab_size: int
) -> dict[str, bytes]:
    """Return the `TEXT_FILES` for a checkpoint of a folder's model, as name -> content.

    A model that was trained here needs none of them.

    Args:
        folder: Model folder of any kind.
        vocab_size: Number of tokens of the model.
        tokenizer: The `tokenizer.json` to use; the other files of the tokenizer are beside it.

    Raises:
        UserError: If one cannot be read, or the tokenizer cannot be loaded with them.
    """
    kind = folder_kind(folder)
    if kind == CHECKPOINT:
        return read_text_files(folder)
    token_ids: dict[str, Any] = {}
    for name in TOKEN_ID_NAMES:
        # Some configurations write -1 for none.
        ids = [n for n in read_token_ids(folder / CONFIG, name) if 0 <= n < vocab_size]
        is_list = bool(ids) and isinstance(read_config(folder)[name], list)
        token_ids[name] = ids if is_list else next(iter(ids), None)
    is_usual, files = not any(token_ids.values()), dict[str, bytes]()
    if tokenizer is not None:
        beside, config = read_text_files(tokenizer.parent), dict[str, Any]()
        files = {name: beside[name] for name in TOKENIZER_FILES if name in beside}
        if TOKENIZER_CONFIG in files:
            config = dict(read_config(tokenizer.parent, TOKENIZER_CONFIG))
            config.pop("auto_map", None)  # No code of the folder runs.
            files[TOKENIZER_CONFIG] = _json_file(config)
        # The model's type may choose the tokenizer's class.
        loaded = _load_tokenizer(tokenizer, files, read_config(folder).get("model_type", "llama"))

        plain = load_tokenizer(tokenizer)
        if token_ids["eos_token_id"] is None:
            found = loaded.eos_token_id
            token_ids["eos_token_id"] = end_of_text_id(plain) if found is None else found
        has_own_tokens = loaded.bos_token_id is not None or loaded.chat_template
        is_usual = token_ids["eos_token_id"] == find_end_of_text_id(plain) and not has_own_tokens

        # A checkpoint's `config.json` names no tokenizer class; scoring needs a token before a
        # text.
        config["tokenizer_class"] = type(loaded).__name__
        for name in ("bos_token", "eos_token"):
            token_id = token_ids[f"{name}_id"]
            token_id = token_id[0] if isinstance(token_id, list) else token_id
            if getattr(loaded, name) is None and token_id is not None and token_id < len(loaded):
                config[name] = loaded.convert_ids_to_tokens(token_id)
        files[TOKENIZER_CONFIG] = _json_file(config)
    if (generation := folder / GENERATION_CONFIG).is_file():
        read_token_ids(generation, "eos_token_id")  # Raises if it is damaged.
        files[GENERATION_CONFIG] = generation.read_bytes()
    return {} if kind == EXPORTED and is_usual else {**files, TOKEN_IDS: _json_file(token_ids)}


def _load_tokenizer(tokenizer: Path, files: Mapping[str, bytes], model_type: str) -> Any:
    """Load a tokenizer with the files beside it, as transformers would."""
    with TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copyfile(tokenizer, copy / TOKENIZER)
        for file, content in {**files, CONFIG: _json_file({"model_type": model_type})}.items():
            (copy / file).write_bytes(content)
        try:
            return load_transformers_tokenizer(copy)
        except UserError as error:
            raise UserError(str(error).replace(name, str(tokenizer.parent))) from None


def _json_file(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _stop_token_ids(folder: Path) -> set[int]:
    """Return the tokens that end a text, as the files of a model from elsewhere name them."""
    files = [folder / name for name in (CONFIG, TOKEN_IDS, GENERATION_CONFIG)]
    found = [read_token_ids(file, "eos_token_id") for file in files if file.is_file()]
    return {number for ids in found for number in ids if number >= 0}


def _no_template(folder: Path) -> UserError:
    return UserError(
        f"{folder} has no chat template; put the one that the model was trained with into its "
        "tokenizer_config.json (as chat_template), or use the model without: it then reads the "
        "text as it is"
    )
