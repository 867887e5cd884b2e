"""Measure a model on tasks and held-out tokens; what the store holds is not measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iiet.decoder import Decoder
from iiet.facts import facts_of
from orchestrator.data.mixture import open_data
from orchestrator.evaluation.answers import check_answer_settings, smaller_batch
from orchestrator.evaluation.store import EvaluationStore, MeasuredTask
from orchestrator.evaluation.tasks import FEWSHOT_SEED, Suite
from orchestrator.models.open import DTYPES, OpenedModel, device_precision
from orchestrator.models.tokenizer import check_template, trained_opening
from orchestrator.records.evaluation import NO_FILTER, EvaluationKeys, EvaluationResult
from orchestrator.settings.evaluation import Prompts
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.training.objective import validation_metrics
from orchestrator.training.world import World
from orchestrator.workspace.errors import out_of_memory_text
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.evaluation.lm_eval_model import LmEvalModel

VALIDATION_LOSS = "validation_loss"
NUM_VALIDATION_TOKENS = 65_536
"""Tokens of the validation loss in the tables."""
LARGEST_VALIDATION_BATCH = 16
"""Sequences in one forward pass of it."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a model is measured; precision, limit and sequence length determine the numbers."""

    precision: Precision | None = None
    """Weights and arithmetic; by the device when unset: bf16 on GPUs that have it, else fp32."""
    limit: int | None = None
    """Score only this many items of each task."""
    sequence_length: int | None = None
    """Most tokens that the model reads at once; its context when unset."""
    batch_size: int = 32
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measured:
    """An evaluation, the keys of its results in the store, and how they came about."""

    evaluation: EvaluationResult
    keys: EvaluationKeys
    num_run: int
    precision: Precision


class ModelMeasurer:
    """Measures one model; its weights are loaded when something has to be measured."""

    def __init__(
        self,
        model: OpenedModel,
        store: EvaluationStore,
        conditions: Conditions,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._store, self._conditions = model, store, conditions
        self._progress = progress or Progress()

    @cached_property
    def precision(self) -> Precision:
        """Weights and arithmetic of the model."""
        return self._conditions.precision or device_precision(self._conditions.device)

    @property
    def sequence_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._conditions.sequence_length or self._model.context_length

    def has_stored(self, suite: Suite) -> bool:
        """Return whether all tasks of a suite have been measured before."""
        return all(map(self._store.read, self._keys(suite).values()))

    def stored_answers(self, suite: Suite) -> dict[str, int | None]:
        """Return for each task how many answers are stored; None if its result is."""
        return {
            name: None if self._store.read(key) else self._store.journal(key, name).num_answers
            for name, key in self._keys(suite).items()
        }

    def tasks(self, suite: Suite) -> Measured:
        """Measure the tasks of a suite, one after the other.

        Raises:
            UserError: If the weights or the tokenizer are missing or damaged, or a task wants
                answers that the decoder cannot generate.
        """
        keys = self._keys(suite)
        found = {name: self._store.read(key) for name, key in keys.items()}
        results = {name: result for name, result in found.items() if result}
        missing = suite.only([name for name in suite.tasks if name not in results])
        if missing.tasks:
            # Imported here: it takes seconds, and what is stored is read without it.
            from orchestrator.evaluation.lm_eval_model import run_task

            limit, progress = self._conditions.limit, self._progress
            model = self._lm_eval_model(missing)
            num_items = sum(missing.num_items(name, limit) for name in missing.tasks)
            progress.start("evaluate", num_items)
            for name, task in missing.tasks.items():
                model.journal = self._store.journal(keys[name], name)
                if count := model.journal.num_answers:
                    progress.note(f"{name}: {count:,} answers were stored before an interruption")
                measured = run_task(name, task, model, limit)
                # One by one: what is measured survives an interruption.
                self._store.write(keys[name], measured, self._about(suite))
                results[name] = measured.result
                model.num_items_before += measured.result.num_items
                progress.advance(model.num_items_before)
            if model.num_cut:
                progress.note(
                    f"{model.num_cut} prompts lost their beginning: they are longer than the "
                    f"{self.sequence_length} tokens that the model reads at once"
                )
        stored = EvaluationKeys(tasks=keys, groups=suite.groups, skipped=suite.skipped)
        evaluation = EvaluationResult(
            results={name: results[name] for name in suite.tasks},
            groups=suite.groups,
            skipped=suite.skipped,
        )
        return Measured(evaluation, stored, len(missing.tasks), self.precision)

    def validation_loss(self, tokens_folder: Path) -> float:
        """Measure the mean loss over held-out tokens, in nats.

        Raises:
            UserError: If the weights or the tokens are missing or damaged.
        """
        fingerprint = open_data(tokens_folder).fingerprint
        key = self._key(content_key(VALIDATION_LOSS, fingerprint, NUM_VALIDATION_TOKENS))
        found = self._store.read(key)
        if found is None:
            loss = heldout_loss(
                self._decoder,
                tokens_folder,
                sequence_length=self.sequence_length,
                note=self._progress.note,
            )
            run = {
                "results": {VALIDATION_LOSS: {f"{VALIDATION_LOSS},{NO_FILTER}": loss}},
                "versions": {VALIDATION_LOSS: 1},
                "n-shot": {VALIDATION_LOSS: 0},
            }
            measured = MeasuredTask(name=VALIDATION_LOSS, run=run)
            self._store.write(key, measured, {})
            found = measured.result
        return found.metrics[VALIDATION_LOSS]

    def _keys(self, suite: Suite) -> dict[str, str]:
        limit = self._conditions.limit
        # Keys without opening tokens are those of earlier versions, which added none.
        opening = [self._opening] if self._opening else []
        return {name: self._key(suite.fingerprint(name), limit, *opening) for name in suite.tasks}

    @cached_property
    def _opening(self) -> list[int]:
        return trained_opening(self._model.text_folder)

    def _key(self, what: str, limit: int | None = None, *others: Any) -> str:
        # A length that is the context's is absent, so that keys are those of earlier versions.
        is_usual = self.sequence_length == self._model.context_length
        length = [] if is_usual else [self.sequence_length]
        others = (*length, *others)
        return content_key("evaluation", [*self._model.key, self.precision], what, limit, *others)

    @cached_property
    def _decoder(self) -> Decoder:
        return self._model.decoder(DTYPES[self.precision], device=self._conditions.device)

    def _lm_eval_model(self, suite: Suite) -> LmEvalModel:
        """Load the model as one of lm-eval."""
        from orchestrator.evaluation import lm_eval_model
        from orchestrator.evaluation.looped import load_transformers

        model, conditions = self._model, self._conditions
        prompts, device = suite.prompts or Prompts(), conditions.device
        kind: type[LmEvalModel] = lm_eval_model.LmEvalModel
        if model.config is None:
            trusts = conditions.trust_remote_code
            text = model.tokenizer(trust_remote_code=trusts)
            loaded: Any = load_transformers(
                model, trust_remote_code=trusts, device=device, dtype=DTYPES[self.precision]
            )
        else:
            kind, loaded, text = lm_eval_model.DecoderModel, self._decoder, model.tokenizer()
            check_answer_settings(suite.tasks, self.sequence_length)
        check_template(text, prompts)
        return kind(
            loaded,
            text,
            conditions.batch_size,
            prompts=prompts,
            progress=self._progress,
            max_length=conditions.sequence_length,
        )

    def _about(self, suite: Suite) -> dict[str, object]:
        """Return what lm-eval's results say of a run beside its numbers."""
        model, prompts = self._model, suite.prompts or Prompts()
        model_args: dict[str, object] = {"dtype": self.precision}
        if model.config is not None and facts_of(model.config.method).has_corrections:
            model_args["schedule"] = str(model.config.corrections)
        return {
            "config": {
                "model": model.architecture,
                "model_args": model_args,
                "batch_size": self._conditions.batch_size,
                "limit": self._conditions.limit,
                "fewshot_seed": FEWSHOT_SEED,
                "apply_chat_template": prompts.chat_template,
            },
            "model_source": "iiet-orch",
            "system_instruction": prompts.system_instruction,
            "fewshot_as_multiturn": prompts.fewshot_as_multiturn,
        }


def heldout_loss(
    decoder: Decoder,
    tokens_folder: Path,
    *,
    sequence_length: int | None = None,
    batch_size: int = LARGEST_VALIDATION_BATCH,
    note: Callable[[str], None] | None = None,
) -> float:
    """Return the mean loss over held-out targets, in nats, under the model's schedule.

    Args:
        sequence_length: Tokens of a sequence; as many as the model's context has when unset.
        batch_size: Sequences in one forward pass; halved when a GPU runs out of memory.
        note: Called with a sentence that says so.

    Raises:
        DeviceError: If the memory is too small for one sequence.
    """
    batches = open_data(tokens_folder).validation_batches(
        context_length=sequence_length or decoder.config.context_length,
        num_tokens=NUM_VALIDATION_TOKENS,
        batch_size=batch_size,
    )
    try:
        # The arithmetic is that of the weights, as for the tasks.
        metrics = validation_metrics(
            decoder,
            list(batches),
            decoder.schedule,
            precision="fp32",
            world=World(device=str(decoder.device)),
        )
        return metrics[VALIDATION_METRIC]
    except torch.OutOfMemoryError as error:
        problem = out_of_memory_text(error)
    smaller = smaller_batch(batch_size, problem, note)
    return heldout_loss(
        decoder, tokens_folder, sequence_length=sequence_length, batch_size=smaller, note=note
    )
