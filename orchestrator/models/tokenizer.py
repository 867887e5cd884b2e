"""Tokenizers: train a byte-level BPE, load one, and read text as a model does.

Any text has tokens; none stands for "unknown". Training reads no held-out document, and the same
text gives the same file. The end-of-text token ends every document, with id 0 if it is trained.
Models that were trained here have a `tokenizer.json`; their texts begin as their training documents
did, with the tokenizer's opening tokens if it has any. A model from elsewhere may add other special
tokens, too, and its published scores were measured with them. So transformers loads its tokenizer,
from its folder, its checkpoint or its export alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from iiet.hf.weights import CONFIG, MODEL_TYPE
from orchestrator.models.folder import (
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    is_checkpoint,
    read_config,
    read_text_files,
    tokenizer_file,
)
from orchestrator.models.hub import download, is_hub_name, offline
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import UserError, first_line, quoted
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.provenance import file_key

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` entries; a short text may give fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` (or the folder that holds one), or `hub:NAME`.

    Raises:
        UserError: If it is missing or damaged, or the hub cannot be reached.
    """
    path = tokenizer_path(name)
    if not path.is_file():
        raise UserError(
            f"there is no tokenizer at {path}; give the path of a tokenizer.json, or hub:NAME"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain `Exception`.
        raise UserError(
            f"{path} is not a tokenizer.json of the tokenizers library: {error}"
        ) from None


def tokenizer_path(name: str | Path) -> Path:
    """Return the `tokenizer.json` that a user names: the file, its folder, or `hub:NAME`.

    Raises:
        UserError: If the hub does not give it.
    """
    path = download(name, weights=False) if is_hub_name(name) else expand_user(name)
    return path / TOKENIZER if path.is_dir() else path


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-text token; a `UserError` if the tokenizer has no known one."""
    for name in END_OF_TEXT_NAMES:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    raise UserError(
        f"the tokenizer has no end-of-text token; it needs one of {', '.join(END_OF_TEXT_NAMES)}"
    )


def opening_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the special tokens by which a tokenizer begins a text, BOS for Llama 3 and Mistral."""
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        return []  # Tokenizers of symbols cannot read the letter.
    encoding = tokenizer.encode("a", add_special_tokens=True)
    is_special = takewhile(bool, encoding.special_tokens_mask)
    return [token_id for token_id, _ in zip(encoding.ids, is_special, strict=False)]


def trained_opening(folder: Path) -> list[int]:
    """Return the `opening_ids` of a model that was trained here; none for a model from elsewhere or
    without a tokenizer."""
    if not (folder / TOKENIZER).is_file() or not _has_tokenizer_alone(folder):
        return []
    path = folder / TOKENIZER
    # A sweep asks for each trial, and loading a tokenizer takes longer than hashing its file.
    digest = file_key(path)
    if digest not in _openings:
        _openings[digest] = tuple(opening_ids(load_tokenizer(path)))
    return list(_openings[digest])


_openings: dict[str, tuple[int, ...]] = {}
"""Hash of a `tokenizer.json` -> its `opening_ids`."""


def num_token_ids(tokenizer: Tokenizer) -> int:
    """Return the number of ids, including unused ones: the rows of the embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class ModelTokenizer:
    """How a model reads and writes text.

    Args:
        path: Model folder of any kind, or a `tokenizer.json` alone.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        UserError: If there is no tokenizer, it is damaged, or names no token to begin a text with.
    """

    tokenizer: Any
    """The tokenizer of the library `tokenizers`, for pieces of text; None if there is none."""
    loaded: Any = None
    """The tokenizer of transformers; None for a model that was trained here."""
    prefix_id: int
    """The token that replaces an empty context."""
    end_ids: frozenset[int]
    """Tokens that end a text."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = path if path.is_dir() else path.parent
        self._follows_a_text = True
        if not path.is_dir() or _has_tokenizer_alone(path):
            self.tokenizer = load_tokenizer(tokenizer_file(path) if path.is_dir() else path)
            self.prefix_id = end_of_text_id(self.tokenizer)
            self.end_ids = frozenset({self.prefix_id})
            self._opening = tuple(opening_ids(self.tokenizer))
            return
        self.loaded = _load(path, trust_remote_code=trust_remote_code)
        self.tokenizer = getattr(self.loaded, "backend_tokenizer", None)
        begin_id = self.loaded.bos_token_id
        end_id = self.loaded.eos_token_id
        # Trained on documents that an end of text separates, such as an export of a model of ours.
        self._follows_a_text = begin_id is None and not self.loaded.chat_template
        if begin_id is None:
            begin_id = end_id
        if begin_id is None:
            raise UserError(
                f"the tokenizer in {path} names neither a bos_token nor an eos_token, and a text "
                "without context needs one; name one in tokenizer_config.json"
            )
        self.prefix_id = int(begin_id)
        self.end_ids = frozenset(token_ids(path, "eos_token_id"))
        if end_id is not None:
            self.end_ids |= {int(end_id)}

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text; with special tokens, as the model's texts begin.

        An opening token that is present is not added again.
        """
        if self.loaded is None:
            # Not what the tokenizer puts after a text: training documents end by themselves.
            ids = self._plain(text, add_special_tokens=False)
            is_opened = ids[: len(self._opening)] == self._opening
            return ids if is_opened or not add_special_tokens else (*self._opening, *ids)
        opening = self.loaded.decode([self.prefix_id])
        is_opened = text.startswith(opening)
        return self._plain(text, add_special_tokens=add_special_tokens and not is_opened)

    def encode_document(self, text: str) -> tuple[int, ...]:
        """Return the tokens of the beginning of a document; at least one.

        The document follows an end of text if the tokenizer has no opening token of its own.
        """
        ids = self.encode(text, add_special_tokens=True)
        if not self._follows_a_text:
            return ids or (self.prefix_id,)
        plain = self.encode(text, add_special_tokens=False)
        return ids if ids[:1] != plain[:1] else (self.prefix_id, *plain)

    def _plain(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if self._reads_symbols_alone:
            text = "".join(text.split())  # Spaces between symbols mean nothing.
        try:
            if self.loaded is None:
                encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
                return tuple(encoding.ids)
            # By its own default, a tokenizer adds the special tokens that it has.
            if add_special_tokens:
                return tuple(self.loaded.encode(text))
            return tuple(self.loaded.encode(text, add_special_tokens=False))
        except Exception as error:  # tokenizers raises plain `Exception`.
            problem = f"the model's tokenizer cannot read {quoted(text)}: {first_line(error)}"
            raise UserError(problem) from None

    @cached_property
    def _reads_symbols_alone(self) -> bool:
        """Whether the tokenizer is one of depth tasks: it has added tokens, and no other but the
        end of a text."""
        if self.tokenizer is None:
            return False
        return bool(self.tokenizer.get_vocab_size(with_added_tokens=False) == 1)

    @cached_property
    def _symbols(self) -> dict[str, int]:
        """Ids of the texts that are never merged with, or taken from, the text around them."""
        added_tokens = self.tokenizer.get_added_tokens_decoder() if self.tokenizer else {}
        return {
            token.content: number
            for number, token in added_tokens.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }

    @property
    def symbols(self) -> list[str]:
        """Texts that are never merged with the text around them, without the end of a text."""
        return [text for text, number in self._symbols.items() if number != self.prefix_id]

    def symbol_id(self, text: str) -> int | None:
        """Return the token of a text that is never merged with the text around it, or None."""
        return self._symbols.get(text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        tokenizer = self.tokenizer if self.loaded is None else self.loaded
        return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def template(self, name: str | None = None) -> str:
        """Return the chat template of a name, or the model's default.

        Raises:
            UserError: If there is none.
        """
        stored = self.loaded and self.loaded.chat_template
        if not stored:
            raise UserError(
                f"{self._folder} has no chat template; put the one that the model was trained with "
                "into its tokenizer_config.json (as chat_template), or use the model without: it "
                "then reads the text as it is"
            )
        templates = stored if isinstance(stored, dict) else {"default": stored}
        name = name or "default"
        if name not in templates:
            raise UserError(
                f"{self._folder} has no chat template named {name}; it has "
                f"{', '.join(sorted(templates))}"
            )
        return str(templates[name])

    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        *,
        opens_answer: bool = True,
    ) -> str:
        """Return messages, and the opening of an answer, as a chat template writes them.

        Args:
            template: Name of a template; the model's default when None.
            opens_answer: Whether the opening of an answer follows.

        Raises:
            UserError: If there is no such template, or it fails.
        """
        chat_template = self.template(template)
        try:
            return str(
                self.loaded.apply_chat_template(
                    list(messages),
                    chat_template=chat_template,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                )
            )
        except Exception as error:  # A template is a program and can fail in any way.
            raise UserError(f"the chat template of {self._folder} fails: {error}") from None


def check_template(tokenizer: ModelTokenizer, prompts: Prompts) -> None:
    """Raise `UserError` if prompts need a chat template that the model does not have, or that
    refuses the system's message."""
    if prompts.chat_template:
        messages: list[Message] = []
        if prompts.system_instruction:
            messages.append({"role": "system", "content": prompts.system_instruction})
        messages.append({"role": "user", "content": "?"})
        tokenizer.chat(messages, prompts.template_name)


def token_ids(folder: Path, name: str) -> list[int]:
    """Return the ids of a special token in a folder's configurations, such as `eos_token_id`.

    Raises:
        UserError: If a file cannot be read, or a value is neither a token's number nor a list.
    """
    all_ids: list[int] = []
    for file in (CONFIG, GENERATION_CONFIG):
        if not (folder / file).is_file():
            continue
        value = read_config(folder, file).get(name)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in ids):
            raise UserError(
                f"{name} in {folder / file} must be a token's number, or a list of them; "
                f"got {value!r}"
            )
        all_ids += [number for number in ids if number >= 0]  # Some write -1 for none.
    return list(dict.fromkeys(all_ids))


def text_files_of(folder: Path, tokenizer: Path | None, *, vocab_size: int) -> dict[str, bytes]:
    """Return the `TEXT_FILES` by which a checkpoint reads text as the model in a folder does.

    A model that was trained here has none. Of any other, transformers writes the tokenizer as it
    reads it, and `generation_config.json` says which tokens begin and end a text.

    Args:
        folder: Model folder of any kind.
        tokenizer: The `tokenizer.json` to use; the other files of the tokenizer are beside it.
        vocab_size: Number of tokens of the model.

    Raises:
        UserError: If one cannot be read, or the tokenizer cannot be loaded with them.
    """
    if is_checkpoint(folder):
        return read_text_files(folder)
    # Which tokens begin and end a text, of those that the model has.
    values: dict[str, Any] = {}
    if (folder / GENERATION_CONFIG).is_file():
        values = dict(read_config(folder, GENERATION_CONFIG))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = [number for number in token_ids(folder, name) if number < vocab_size]
        values[name] = ids if len(ids) > 1 else next(iter(ids), None)
    if tokenizer is None:
        return {GENERATION_CONFIG: _json_file(values)} if any(values.values()) else {}

    with TemporaryDirectory() as scratch_name:
        # A folder with the tokenizer, as transformers loads it.
        scratch = Path(scratch_name)
        shutil.copyfile(tokenizer, scratch / TOKENIZER)
        for file, content in read_text_files(tokenizer.parent).items():
            (scratch / file).write_bytes(content)
        if (scratch / TOKENIZER_CONFIG).is_file():
            config = dict(read_config(tokenizer.parent, TOKENIZER_CONFIG))
            config.pop("auto_map", None)  # No code of the folder runs.
            (scratch / TOKENIZER_CONFIG).write_bytes(_json_file(config))
        # The model's type may choose the tokenizer's class.
        model_type = read_config(folder).get("model_type", "llama")
        (scratch / CONFIG).write_bytes(_json_file({"model_type": model_type}))
        loaded = _load(scratch, shown=tokenizer.parent)

        # The configuration and the tokenizer tell each other what one of them lacks.
        if values["eos_token_id"] is None:
            values["eos_token_id"] = loaded.eos_token_id
        if values["eos_token_id"] is None:
            values["eos_token_id"] = end_of_text_id(load_tokenizer(tokenizer))
        for token in ("bos_token", "eos_token"):
            token_id = values[f"{token}_id"]
            if isinstance(token_id, list):
                token_id = token_id[0]
            if getattr(loaded, token) is None and token_id is not None and token_id < len(loaded):
                setattr(loaded, token, loaded.convert_ids_to_tokens(token_id))
        # Templates of several names would be files in a folder of their own.
        written = scratch / "written"
        loaded.save_pretrained(written, save_jinja_files=False)
        return {**read_text_files(written), GENERATION_CONFIG: _json_file(values)}


def _has_tokenizer_alone(folder: Path) -> bool:
    """Return whether a folder has the tokenizer of a model that was trained here, or of data."""
    if (folder / TOKENIZER_CONFIG).is_file():
        return False
    has_config = (folder / CONFIG).is_file()
    return not has_config or read_config(folder).get("model_type") == MODEL_TYPE


def _load(folder: Path, *, trust_remote_code: bool = False, shown: Path | None = None) -> Any:
    # Imported here because it takes seconds; our own models do not need it.
    from transformers import AutoTokenizer

    try:
        with offline():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # Damaged files raise dozens of kinds.
        line = first_line(error).replace(str(folder), str(shown or folder))
        raise UserError(f"cannot load a tokenizer from {shown or folder}: {line}") from None


def _json_file(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
