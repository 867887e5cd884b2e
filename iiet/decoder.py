"""The decoder: embed, advance L times, norm, logits. The same for every method.

    h_0    = embed_tokens(input_ids)
    h_l    = layer_l(h_{l-1}, ...)        for l = 1..L; where the method repeats the stack, again
    logits = lm_head(norm(h_L))

What a Llama has is named as in transformers' Llama; what a method adds, by the method.

The iteration schedule belongs to a call, not to the weights: a decoder has all parameters of its
method and runs under any schedule. So both stages of training use one model, and so do teacher and
students.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iiet.backbone import Backbone
from iiet.decoding.generation import stream
from iiet.decoding.request import GenerationOptions
from iiet.decoding.speculative import DraftRecord
from iiet.decoding.static_steps import StaticSteps
from iiet.hf.published import weights_from_published
from iiet.hf.weights import (
    CONFIG,
    MODEL_TYPE,
    WEIGHTS,
    config_from_json,
    read_folder,
    write_folder,
)
from iiet.methods import METHODS, Evaluation, Layer, Observer
from iiet.methods.base import LayerCall
from iiet.model.batch import Batch
from iiet.model.cache import KeyValueCache, KvStrategy, evaluation_slots
from iiet.model.config import ModelConfig, preset, schedule_problems
from iiet.model.context import make_context
from iiet.model.fast import can_step, few_rows_product, is_bare, may_read_weights
from iiet.model.layers import Block, Rope, StepWeights, draw_weights, product_dtype
from iiet.model.losses import LazyLogits, Logits, batch_cross_entropy
from iiet.model.schedule import IterationSchedule, ScheduleLike

__all__ = ["Decoder", "decoder_from_published"]


class Decoder(nn.Module):
    """A causal language model whose layers are those of the config's method."""

    activation_checkpointing: bool = False
    """Whether training keeps only the layers' inputs and recomputes layers in the backward pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Looked up once: a graph of `torch.compile` must not look for installed packages.
        self.method: type[Layer] = METHODS[config.method]
        """The class of the layers."""
        self.model = Backbone(config)
        self.lm_head: nn.Module | None = None  # Tied to the embedding.
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rope = Rope(
            config.head_dim, config.context_length, config.rope_theta, config.rope_scaling
        )
        for module in self.modules():
            draw_weights(module, config.initializer_std)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Decoder:
        """Make a decoder of a named size with fresh weights; arguments and errors of
        `iiet.preset`."""
        return cls(preset(name, **overrides))

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], dtype: torch.dtype | None = None
    ) -> Decoder:
        """Load a model folder: what `save_pretrained` wrote, a checkpoint of the orchestrator, an
        export, a plain model of transformers (`iiet.hf.plain_models`), or the published naming.

        Args:
            folder: holds `config.json` and `model.safetensors`, or the index of several files.
            dtype: dtype of the weights (norms and mix of a method stay at least float32); None: the
                file's.

        Raises:
            ValueError: a file is missing or damaged, the model is of a type that no decoder runs,
                or the weights do not fit the config.
        """
        folder = Path(folder)
        values, weights = read_folder(folder)
        try:
            if values.get("model_type") == MODEL_TYPE:
                decoder = _with_weights(config_from_json(values), weights)
            else:
                decoder = decoder_from_published(values, weights)
        except ValueError as error:
            raise ValueError(f"cannot load {folder}: {error}") from None
        return decoder if dtype is None else decoder.to(dtype)

    def save_pretrained(self, folder: str | PathLike[str], **further_values: Any) -> None:
        """Write `config.json`, perhaps with further values, and `model.safetensors`; makes the
        folder."""
        write_folder(folder, self.config, self.state_dict(), **further_values)

    @property
    def schedule(self) -> IterationSchedule:
        """The schedule of a call without `schedule=`; zeros for a method without corrections."""
        return self.config.corrections

    def method_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a plain Llama of the same sizes does not have, by name."""
        return {f"model.{name}": p for name, p in self.model.method_parameters().items()}

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype in which keys and values are computed."""
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.model.embed_tokens.weight.dtype

    def new_cache(
        self, *, batch_size: int, max_tokens: int, strategy: KvStrategy = "exact"
    ) -> KeyValueCache:
        """Return an empty cache for this schedule, on this device, in `cache_dtype`."""
        return KeyValueCache(
            self.config,
            batch_size=batch_size,
            max_tokens=max_tokens,
            device=self.device,
            dtype=self.cache_dtype,
            strategy=strategy,
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embed_tokens.weight.device

    def copy(self, *, schedule: ScheduleLike | None = None) -> Decoder:
        """Return a decoder with weights of its own, perhaps under another schedule."""
        twin = copy.deepcopy(self)
        return twin if schedule is None else twin.with_schedule(schedule)

    def with_schedule(self, schedule: ScheduleLike) -> Decoder:
        """Return a decoder with another schedule that shares this one's parameters.

        It is not compiled, even if this one is compiled as a whole. A schedule that does not fit
        the method or the number of layers is a ValueError.
        """
        config = self.config.with_schedule(schedule)
        twin = Decoder.__new__(Decoder)
        # Dictionaries of its own, so that a hook on one does not fire on the other.
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value.copy() if isinstance(value, dict) else value
        twin.config = config
        # A compiled or wrapped forward calls this decoder and would use its schedule.
        twin.__dict__.pop("forward", None)
        twin.__dict__.pop("_compiled_call_impl", None)
        return twin

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        schedule: ScheduleLike | None = None,
        cache: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last_only: bool = False,
        return_hidden: bool = False,
        observe: Observer | None = None,
        loss_fn: Callable[..., Any] | None = None,
    ) -> Any:
        """Compute the logits of each token's successor.

        Args:
            input_ids: (batch, time) integers; with a cache, the tokens after those that it holds.
            inputs_embeds: (batch, time, dim), instead of `input_ids`.
            schedule: corrections of this call, instead of the config's.
            cache: keys and values of earlier tokens, and which of them are padding; extended here.
            attention_mask: (batch, cached + time), false for padding. Positions count the others.
                Or, with `position_ids` and without a cache, (batch, time, time): true where a token
                (second axis) may look, at itself at least.
            position_ids: (batch or 1, time), instead of counted positions. Without mask and cache,
                a position that does not follow the previous one starts another sequence of the row.
            last_only: whether to compute the last token's logits only, (batch, 1, vocab).
            return_hidden: whether to return the hidden states `h_1..h_L`, without final norm, too;
                those of the last run where the method repeats the stack.
            observe: called after each field evaluation.
            loss_fn: called with what would be returned; its result is returned instead. It may get
                `LazyLogits`, from which the losses of this package compute logits in chunks.

        Returns:
            Logits, (batch, time, vocab); or these and L hidden states, each (batch, time, dim).

        Raises:
            ValueError: more tokens than the context, a schedule that does not fit the model, a
                cache of another schedule, or a mask or positions that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hiddens = []
        for hidden in self.hidden_states(
            self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds,
            schedule=schedule,
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            observe=observe,
        ):
            last = hidden
            if return_hidden:
                hiddens.append(hidden)
        last = last[:, -1:] if last_only else last
        logits = self.logits(last) if loss_fn is None else self._lazy_logits(last)
        answer = (logits, tuple(hiddens)) if return_hidden else (logits,)
        if loss_fn is not None:
            return loss_fn(*answer)
        return answer if return_hidden else logits

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        schedule: ScheduleLike | None = None,
    ) -> Tensor:
        """Compute the mean cross-entropy of the targets, a scalar.

        The logits are computed in chunks and never whole.

        Args:
            input_ids: (batch, time).
            targets: (batch, time), the token that each position must predict, or `NO_TARGET` (-100)
                where it predicts none; nothing shifts them. None: the next token, as in text.
            attention_mask: (batch, time), false for padding, which is neither read nor predicted.
            schedule: corrections of this call, instead of the config's.

        Raises:
            ValueError: tensors of other shapes, and as `forward`.
        """
        if targets is None:
            batch = Batch.of_text(input_ids, attention_mask)
        else:
            batch = Batch(input_ids, targets, attention_mask)
        if batch.mask is not None and attention_mask is not None:
            # The last padding before a text does not predict its first token.
            batch = replace(batch, mask=batch.mask.bool() & attention_mask.bool())
        loss: Tensor = self(
            input_ids,
            schedule=schedule,
            attention_mask=attention_mask,
            loss_fn=partial(batch_cross_entropy, batch=batch),
        )
        return loss

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue prompts; return them with their continuations, (batch, time + new).

        Arguments and errors are those of `stream`. It ends early when all rows have ended.
        """
        following = self.stream(input_ids, attention_mask, **options)
        return torch.cat([input_ids, *(tokens.unsqueeze(1) for tokens in following)], dim=1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        record: DraftRecord | None = None,
        steps: StaticSteps | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Continue prompts, one step at a time: yield the next tokens, (batch,).

        Args:
            input_ids: prompts, (batch, time).
            attention_mask: (batch, time), false for padding on the left.
            record: gets what drafts did, while it happens.
            steps: decodes in steps of fixed shapes, and lets several generations, one after the
                other, share a cache and graphs. None: on a GPU those that the decoder keeps, and
                steps that follow the number of tokens elsewhere.
            options: the fields of `iiet.GenerationOptions`, such as `max_new_tokens`,
                `eos_token_id`, `temperature` and `draft`.

        Raises:
            ValueError: an option out of range, or more tokens than the context holds; at the call,
                not at the first step. At a step: its logits are not finite.
            TypeError: there is no such option.
        """
        chosen = GenerationOptions(**options)
        return stream(
            self, input_ids, chosen, attention_mask=attention_mask, record=record, steps=steps
        )

    def hidden_states(
        self,
        embeddings: Tensor,
        *,
        schedule: ScheduleLike | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        position_ids: Tensor | None = None,
        observe: Observer | None = None,
    ) -> Iterator[Tensor]:
        """Yield `h_1, ..., h_L`, each (batch, time, dim); the only loop over layers.

        Where the method repeats the stack, they are those of the last run. Arguments are those of
        `forward`.

        Raises:
            ValueError: as `forward`.
        """
        schedule = self._schedule_of_call(schedule)
        evaluations_per_layer = self.evaluations_per_layer(schedule)
        if cache is not None and cache.evaluations_per_layer != evaluations_per_layer:
            cached = ",".join(map(str, cache.evaluations_per_layer))
            made = ",".join(map(str, evaluations_per_layer))
            raise ValueError(
                f"the cache is for {cached} evaluations per layer, this pass makes {made}; decode "
                "with the iteration schedule that the cache was made for, or make a new cache"
            )
        context = make_context(
            embeddings,
            self.rope,
            step_weights=self._step_weights(embeddings, cache),
            windows=self.config.windows,
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        slots = None if cache is None else evaluation_slots(evaluations_per_layer)
        layers = self.model.layers
        shared = self.model.shared
        hidden = embeddings
        state = self.method.start(embeddings)
        num_runs = self.method.facts.num_runs(schedule)
        for run in range(num_runs):
            for number, layer in enumerate(layers):
                call = LayerCall(
                    schedule[number],
                    context,
                    slots=None if slots is None else slots[number],
                    shared=shared,
                    recompute=self.activation_checkpointing and cache is None,
                    observe=observe,
                    first_evaluation=run * (evaluations_per_layer[number] // num_runs),
                )
                hidden, state = layer(hidden, state, call)
                if run == num_runs - 1:
                    yield hidden

    def evaluations(
        self,
        input_ids: Tensor,
        *,
        inputs: bool = False,
        schedule: ScheduleLike | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[tuple[int, int], Tensor]:
        """Return the output (or with `inputs` the input) of each field evaluation by (layer, k).

        Both count from 0, so k = 0 is the prediction; each tensor is (batch, time, dim). Nothing is
        detached: call under `torch.no_grad()` for measuring. Arguments and errors are those of
        `forward`.
        """
        record: dict[tuple[int, int], Tensor] = {}

        def observe(seen: Evaluation) -> None:
            record[seen.layer, seen.k] = seen.input if inputs else seen.output

        for _ in self.hidden_states(
            self.model.embed_tokens(input_ids),
            schedule=schedule,
            attention_mask=attention_mask,
            observe=observe,
        ):
            pass
        return record

    def _step_weights(
        self, embeddings: Tensor, cache: KeyValueCache | None
    ) -> dict[Block, StepWeights] | None:
        """Return what the fields read in a decoding step, or None where they compute as usual."""
        if cache is None or not can_step(embeddings):
            return None
        weights_of: dict[Block, StepWeights] = {}
        for layer in cast("Iterable[Layer]", self.model.layers):
            weights = layer.step_weights()
            if weights is None:
                return None
            weights_of[layer] = weights
        return weights_of

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the last hidden state, (batch, time, dim), to logits, (batch, time, vocab)."""
        normed = self.model.norm(hidden)
        head = self.lm_head
        if can_step(normed) and (head is None or is_bare(head, nn.Linear)):
            weight = cast("Tensor", (head or self.model.embed_tokens).weight)
            product = few_rows_product(normed, weight, len(normed))
            return product.view(len(normed), 1, -1).contiguous()
        if head is None:
            return F.linear(normed, self.model.embed_tokens.weight)
        logits: Tensor = head(normed)
        return logits

    def _lazy_logits(self, hidden: Tensor) -> Logits:
        """Return logits that a loss can compute in chunks, unless the head must be called."""
        if self.lm_head is None:
            head: nn.Module = self.model.embed_tokens
            reads_weight = may_read_weights() and is_bare(head, nn.Embedding)
        else:
            head = self.lm_head
            reads_weight = may_read_weights() and is_bare(head, nn.Linear)
        # The gradients of a chunk are computed before a loss is scaled, and float16 loses them.
        if not reads_weight or product_dtype(hidden) == torch.float16:
            return self.logits(hidden)
        return LazyLogits(self.model.norm(hidden), cast("Tensor", head.weight))

    def evaluations_per_layer(self, schedule: ScheduleLike | None = None) -> tuple[int, ...]:
        """Count the evaluations of each layer under a schedule, the decoder's own when None.

        One that does not fit the method or the number of layers is a ValueError.
        """
        schedule = self._schedule_of_call(schedule)
        facts = self.method.facts
        return tuple(
            facts.evaluations_per_layer(schedule, layer) for layer in range(self.config.num_layers)
        )

    def _schedule_of_call(self, schedule: ScheduleLike | None) -> IterationSchedule:
        """Return the decoder's own schedule for None, else that which is written; errors as above.

        A config with this schedule would say the same, but to make one in a graph of
        `torch.compile` takes what no graph may do.
        """
        if schedule is None or schedule is self.schedule:
            return self.schedule
        parsed = IterationSchedule.parse(schedule, num_layers=self.config.num_layers)
        if problems := schedule_problems(self.config.method, self.method.facts, parsed):
            raise ValueError("; ".join(problems))
        return parsed


def decoder_from_published(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Decoder:
    """Build a decoder from a configuration of the published naming, or of a plain model of
    transformers, and its weights.

    Args:
        config: the values of `config.json`, as for `iiet.hf.published.config_from_published`.
        weights: by published name; used as they are, with their dtype and device.

    Raises:
        ValueError: the config cannot be read, or weights are missing, left over, of the wrong
            shape, or not finite; all named at once.
    """
    return _with_weights(*weights_from_published(config, weights))


def _with_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """Return a decoder of these weights, which are not copied; those that do not fit are a
    ValueError."""
    with torch.device("meta"):
        decoder = Decoder(config)
    try:
        decoder.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        # PyTorch writes a line for each weight that does not fit, below a line of its own.
        first, *further = str(error).splitlines()[1:] or [str(error)]
        num_further = f" ({len(further)} more like it)" if further else ""
        raise ValueError(f"{WEIGHTS} does not fit {CONFIG}: {first.strip()}{num_further}") from None
    return decoder
