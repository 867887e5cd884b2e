"""The adapter to transformers 5.24: config, language model and tokenizer around a `Decoder`.

The model wraps a decoder without a copy and works with `generate`, `Trainer` and lm-eval. Caches of
transformers have a slot per layer; the adapter appends the others, one per evaluation, on first
use. This file is also copied into exported folders, where this package is not installed.
"""

# No `from __future__ import annotations`: as strings they would turn the config's type checks off.

import copy
import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from typing import Any

if find_spec("transformers") is None:
    raise ImportError(
        f"{__name__} needs transformers, which is not installed; type pip install transformers"
    )

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from iiet.config import ModelConfig
from iiet.context import get_record, set_record
from iiet.decoder import Decoder
from iiet.precision import KeepsFloat32
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG_NAMES

__all__ = ["IIETConfig", "IIETForCausalLM", "fast_tokenizer"]


@strict
class IIETConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A `ModelConfig` under the names that transformers uses, checked when a model is built.

    An earlier check would miss what `from_pretrained(folder, corrections=[...])` overrides, because
    transformers does not check it.
    """

    model_type = "iiet"
    # So that config.json states every value, whatever the defaults of the version that reads it.
    has_no_defaults_at_init = True

    # `iiet.weights.CONFIG_NAMES` says which fields of `ModelConfig` these are.
    method: str = "iiet"
    method_options: dict[str, Any] | None = None
    corrections: list[int] | tuple[int, ...] | str | int | None = None
    """The iteration schedule: corrections per layer, text ("1,0,0", "3..0"), or one number for all
    layers; None for methods without corrections."""
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 1408
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_model_config(
        cls, config: ModelConfig, *, end_of_text_id: int | None = None
    ) -> "IIETConfig":
        """Translate a core config; the token that ends a document stops generation, and pads."""
        core = config.to_dict()
        values: dict[str, Any] = {theirs: core.get(ours) for theirs, ours in CONFIG_NAMES.items()}
        return cls(**values, eos_token_id=end_of_text_id, pad_token_id=end_of_text_id)

    def to_model_config(self) -> ModelConfig:
        """Translate back; a ValueError lists everything that is wrong with the values."""
        values = {ours: getattr(self, theirs) for theirs, ours in CONFIG_NAMES.items()}
        return ModelConfig.from_dict(values)


class IIETForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A decoder as a causal language model of transformers.

    Raises:
        ValueError: the config's values do not fit together, or ask for other attention than sdpa.
    """

    config_class = IIETConfig
    config: IIETConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Layers read each other's estimates, so a decoder stays on one device.
    _no_split_modules = ["Decoder"]  # noqa: RUF012

    def __init__(self, config: IIETConfig) -> None:
        _check_attention(config._attn_implementation)
        super().__init__(config)
        self.decoder = Decoder(config.to_model_config())
        schedule = self.decoder.config.schedule
        config.corrections = None if schedule is None else list(schedule)
        # Which weights from_pretrained(dtype=torch.bfloat16) leaves in float32.
        self._keep_in_fp32_modules_strict = {
            name for name, module in self.named_modules() if isinstance(module, KeepsFloat32)
        }
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_decoder(
        cls,
        decoder: Decoder,
        *,
        end_of_text_id: int | None = None,
        token_ids: Mapping[str, int | list[int] | None] | None = None,
    ) -> "IIETForCausalLM":
        """Wrap a decoder without a copy.

        Args:
            decoder: in any mode and dtype, on any device.
            end_of_text_id: the token that ends a document, stops generation and pads.
            token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` to set instead.
        """
        config = IIETConfig.from_model_config(decoder.config, end_of_text_id=end_of_text_id)
        for name, value in (token_ids or {}).items():
            setattr(config, name, value)
        with torch.device("meta"):  # The decoder built here is thrown away, so it takes no memory.
            model = cls(config)
        model.decoder = decoder
        model.train(decoder.training)
        return model

    def to_decoder(self) -> Decoder:
        """Return the decoder itself."""
        return self.decoder

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        output_hidden_states: bool | None = None,
        schedule: str | IterationSchedule | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, given labels, the loss.

        Args:
            input_ids: this and the next four as in `Decoder.forward`.
            attention_mask: 0 for padding.
            position_ids: instead of counted positions.
            cache: a cache of transformers.
            inputs_embeds: instead of `input_ids`.
            labels: (batch, time), -100 where there is nothing to learn; shifted here.
            use_cache: whether to make a cache where none is given. Off by default, unlike
                in other models: scoring would fill a slot per evaluation and throw them away.
            logits_to_keep: the number of tokens at the end to return logits for, 0 for all; or the
                indices of the tokens, (count,).
            output_hidden_states: whether to return L + 1 hidden states, each (batch, time, dim), as
                a Llama does: the embeddings, `h_1..h_{L-1}`, and `h_L` after the final norm.
                (`Decoder` returns `h_L` before the norm.)
            schedule: iteration schedule of this call, as value or text, instead of the config's.
            others: `past_key_values`, the older name of `cache`; `num_items_in_batch` and
                `shift_labels`, for the loss; `cache_position`, which must continue the cache;
                `token_type_ids` of one type, which some tokenizers return. Anything else must be
                None or False.

        Raises:
            ValueError: an argument asks for what the model cannot do.
        """
        cache = _chosen_cache(cache, others.pop("past_key_values", None))
        loss_options = {
            name: others.pop(name)
            for name in ("num_items_in_batch", "shift_labels")
            if others.get(name) is not None
        }
        _check_others(others, cache=cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        decoder = self._under(schedule)
        if cache is not None:
            _prepare_cache(cache, decoder.evaluations_per_layer())
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.decoder.embedding(input_ids), None
        found = self.decoder(
            input_ids,
            schedule=None if schedule is None else decoder.schedule,
            inputs_embeds=inputs_embeds,
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            last_only=isinstance(logits_to_keep, int) and logits_to_keep == 1,
            return_hidden=bool(output_hidden_states),
        )
        logits, hidden = found, None
        if output_hidden_states:
            logits, states = found
            hidden = (inputs_embeds, *states[:-1], self.decoder.norm(states[-1]))
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, **loss_options
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache, hidden_states=hidden)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        schedule: str | IterationSchedule | None = None,
        **options: Any,
    ) -> Any:
        """Do transformers' `generate`.

        A cheaper schedule of the same weights drafts with
        `generate(..., assistant_model=model.with_schedule("0"))`.

        Args:
            schedule: iteration schedule of this request, as value or text, instead of the config's.

        Raises:
            ValueError: the schedule does not fit.
        """
        asked = {} if schedule is None else {"schedule": self._under(schedule).schedule}
        return super().generate(inputs, generation_config, **asked, **options)

    def with_schedule(self, schedule: str | int | IterationSchedule) -> "IIETForCausalLM":
        """Return a model with the same weights, shared, under another iteration schedule.

        Raises:
            ValueError: the schedule does not fit.
        """
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        twin = type(self).from_decoder(
            self._under(schedule), token_ids={name: getattr(self.config, name) for name in names}
        )
        twin.generation_config = copy.deepcopy(self.generation_config)
        return twin

    def _under(self, schedule: str | int | IterationSchedule | None) -> Decoder:
        """Return the decoder under a schedule; under its own for None."""
        if schedule is None:
            return self.decoder
        num_layers = self.config.num_hidden_layers
        return self.decoder.with_schedule(IterationSchedule.parse(schedule, num_layers=num_layers))

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and with it a tied head."""
        assert isinstance(value, nn.Embedding), value
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None where it is the embedding."""
        return self.decoder.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.decoder.head = value

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """Change the vocabulary's size; the arguments are those of transformers."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **options)
        self.decoder.config = dataclasses.replace(
            self.decoder.config, vocab_size=embedding.num_embeddings
        )
        return embedding

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes the layers; what `activation_checkpointing_enable` sets."""
        return self.decoder.activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.decoder.activation_checkpointing = enabled

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *_: Any, **__: Any
    ) -> None:
        """Accept "sdpa", which is what the decoder computes; refuse any other."""
        _check_attention(attn_implementation)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Leave the padding mask as it is; the decoder makes positions and full mask from it."""
        return attention_mask

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        # transformers does not know the modules of methods. Its versions of torch's functions
        # leave loaded weights alone.
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and not type(module).__module__.startswith("torch."):
            reset()


def fast_tokenizer(
    tokenizer_file: str | PathLike[str], *, end_of_text: str, context_length: int
) -> PreTrainedTokenizerFast:
    """Wrap a `tokenizer.json`, written by the tokenizers library, for transformers and lm-eval.

    Args:
        tokenizer_file: the file.
        end_of_text: the token that ends a document; it also pads, and opens an empty context. A
            tokenizer without it is a ValueError.
        context_length: longest input of the model, in tokens.
    """
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tokenizer_file),
        model_max_length=context_length,
        padding_side="left",
    )
    # Looked up first: setting it as a special token would add it, beyond the model's embeddings.
    if end_of_text not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer {tokenizer_file} has no token {end_of_text!r}")
    tokenizer.eos_token = end_of_text
    tokenizer.pad_token = end_of_text
    return tokenizer


def _chosen_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is None:
        cache = past_key_values
    elif past_key_values not in (None, cache):
        raise ValueError("cache and past_key_values are two names of one argument; pass one")
    if not isinstance(cache, Cache | None):
        raise ValueError(
            f"cache must be a Cache of transformers, such as DynamicCache(), got a {type(cache)}"
        )
    return cache


def _check_attention(asked: str | dict[str, str] | None) -> None:
    # transformers would only write another one into the config, which the decoder does not read.
    name = asked.get("", "sdpa") if isinstance(asked, dict) else asked
    if name not in (None, "sdpa"):
        raise ValueError(
            f"attn_implementation={name!r} cannot be served: the decoder calls torch's "
            "scaled_dot_product_attention and never forms the attention weights; leave it out or "
            "pass 'sdpa', and leave out output_attentions, for which transformers asks for 'eager'"
        )


def _check_others(others: dict[str, Any], *, cache: Cache | None) -> None:
    """Refuse arguments that would otherwise be silently ignored."""
    given = {name: value for name, value in others.items() if value is not None}
    if given.pop("output_attentions", False):
        raise ValueError(
            "output_attentions=True cannot be served: the attention kernel never forms the "
            "attention weights; leave it out"
        )
    if not given.pop("is_causal", True):
        raise ValueError("is_causal=False cannot be served: the model is causal; leave it out")
    types = given.pop("token_type_ids", None)
    if types is not None and bool((types != 0).any()):
        raise ValueError(
            "token_type_ids of several types cannot be served: the model knows one type of token; "
            "leave them out"
        )
    numbers = given.pop("cache_position", None)
    held = 0 if cache is None else int(cache.get_seq_length())
    if numbers is not None and numbers.tolist() != list(range(held, held + len(numbers))):
        raise ValueError(
            f"cache_position must count on from the {held} tokens that the cache holds, got "
            f"{numbers.tolist()}; leave it out, or pass position_ids for other positions"
        )
    asked = [name for name, value in given.items() if value is not False]
    if asked:
        raise ValueError(f"the model takes no {', '.join(asked)}; leave it out")


def _prepare_cache(cache: Cache, evaluations_per_layer: tuple[int, ...]) -> None:
    """Give a cache, made with one slot per layer, one slot per evaluation."""
    num_layers, num_slots = len(evaluations_per_layer), sum(evaluations_per_layer)
    if cache.get_seq_length() == 0:
        set_record(cache, None)  # An emptied cache fits any schedule.
    elif get_record(cache) is None and not num_slots == num_layers == len(cache.layers):
        raise ValueError(
            f"the cache holds tokens in {len(cache.layers)} slots that this model did not fill, "
            f"and nothing says under which iteration schedule; the model makes {num_slots} "
            "evaluations per token; begin with an empty cache"
        )
    if cache.layer_class_to_replicate is None:  # Other caches grow by themselves.
        missing = range(num_slots - len(cache.layers))
        cache.layers += [copy.deepcopy(cache.layers[0]) for _ in missing]


if __name__ == "iiet.huggingface":  # Not in an exported copy, which transformers registers.
    AutoConfig.register(IIETConfig.model_type, IIETConfig)
    AutoModelForCausalLM.register(IIETConfig, IIETForCausalLM)
