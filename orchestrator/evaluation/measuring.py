"""Measure a model on tasks and held-out tokens; stored results are not measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iiet.decoder import Decoder
from iiet.model.facts import facts_of
from orchestrator.data.mixture import open_data
from orchestrator.evaluation.answers import check_answer_settings, smaller_batch
from orchestrator.evaluation.store import EvaluationStore, MeasuredTask
from orchestrator.evaluation.tasks import FEWSHOT_SEED, LoadedSuite
from orchestrator.models.load import DTYPES, device_precision
from orchestrator.models.open import OpenedModel
from orchestrator.models.tokenizer import check_template, trained_opening
from orchestrator.records.evaluation import (
    NO_FILTER,
    EvaluationKeys,
    EvaluationResult,
    Suite,
    TaskResult,
)
from orchestrator.settings.evaluation import Prompts
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import end_if_stop_requested
from orchestrator.training.objective import validation_metrics
from orchestrator.training.world import World
from orchestrator.workspace.errors import out_of_memory_text
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.evaluation.lm_eval_model import LmEvalModel

VALIDATION_LOSS_ENTRY = "validation_loss"
"""Name of the validation loss in the store of evaluations, where it is an entry like a task."""
NUM_VALIDATION_TOKENS = 65_536
"""Tokens of the measured validation loss."""
LARGEST_VALIDATION_BATCH = 16
"""Sequences in one forward pass of the validation loss."""


@dataclass(frozen=True)
class MeasuredSuite:
    """An evaluation, and the keys of its results in the store."""

    evaluation: EvaluationResult
    keys: EvaluationKeys
    num_run: int
    """Number of tasks that were run; the others had stored results."""
    precision: Precision


class ModelMeasurer:
    """Measures one model; loads its weights at the first measurement."""

    def __init__(
        self,
        model: OpenedModel,
        store: EvaluationStore,
        suite: Suite,
        *,
        device: str = "cpu",
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Take the model, the suite and the device; nothing is loaded yet.

        Args:
            suite: What to measure; without a precision, the device determines it.
            trust_remote_code: Whether code in the model's folder may run.
        """
        self._model = model
        self._store = store
        self._suite = suite
        self._device = device
        self._trust_remote_code = trust_remote_code
        self._progress = progress or Progress()

    @cached_property
    def precision(self) -> Precision:
        """Precision of the model's weights and arithmetic."""
        return self._suite.precision or device_precision(self._device)

    @property
    def sequence_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self._suite.sequence_length or self._model.context_length

    def has_stored(self, loaded: LoadedSuite) -> bool:
        """Return whether all tasks of a suite have been measured before."""
        return all(map(self._store.read, self.keys(loaded).values()))

    def stored_answers(self, loaded: LoadedSuite) -> dict[str, int | None]:
        """Return for each task the number of stored answers; None if its result is complete."""
        return {
            name: None if self._store.read(key) else self._store.journal(key, name).num_answers
            for name, key in self.keys(loaded).items()
        }

    def measure_tasks(self, loaded: LoadedSuite) -> MeasuredSuite:
        """Measure the tasks of a suite, one after the other.

        Raises:
            UserError: If the weights or the tokenizer are missing or damaged, or the decoder cannot
                generate the answers of a task.
        """
        keys = self.keys(loaded)
        results: dict[str, TaskResult] = {}
        for name, key in keys.items():
            if stored_result := self._store.read(key):
                results[name] = stored_result
        missing = loaded.only([name for name in loaded.tasks if name not in results])
        if missing.tasks:
            # Imported only here, because it takes seconds.
            from orchestrator.evaluation.lm_eval_model import run_task

            progress = self._progress
            model = self._lm_eval_model(missing)
            progress.start("evaluate", sum(map(missing.num_items, missing.tasks)))
            for name, task in missing.tasks.items():
                model.journal = self._store.journal(keys[name], name)
                if count := model.journal.num_answers:
                    progress.note(f"{name}: {count:,} answers were stored before an interruption")
                measured = run_task(name, task, model, self._suite.limit)
                # One by one, so that finished tasks survive an interruption.
                self._store.write(keys[name], measured, self._run_description())
                results[name] = measured.result
                model.num_items_before += measured.result.num_items
                progress.advance(model.num_items_before)
            if model.num_cut:
                progress.note(
                    f"the beginning of {model.num_cut} prompts was cut off: the model reads "
                    f"{self.sequence_length} tokens at once"
                )
        unaveraged = tuple(name for name in self._suite.unaveraged or () if name in loaded.tasks)
        evaluation_keys = EvaluationKeys(
            tasks=keys, groups=loaded.groups, skipped=loaded.skipped, unaveraged=unaveraged
        )
        evaluation = EvaluationResult(
            results={name: results[name] for name in loaded.tasks},
            groups=loaded.groups,
            skipped=loaded.skipped,
            unaveraged=unaveraged,
        )
        return MeasuredSuite(evaluation, evaluation_keys, len(missing.tasks), self.precision)

    def validation_loss(self, tokens_folder: Path) -> float | None:
        """Measure the mean loss over held-out tokens, in nats.

        None, and a note, if all of these tokens belong to prompts, which have no loss. With a limit
        of items, it is over as many sequences.

        Raises:
            UserError: If the weights or the tokens are missing or damaged.
        """
        fingerprint = open_data(tokens_folder).fingerprint
        num_tokens = NUM_VALIDATION_TOKENS
        if self._suite.limit is not None:
            num_tokens = min(num_tokens, self._suite.limit * self.sequence_length)
        key = self._key(content_key(VALIDATION_LOSS_ENTRY, fingerprint, num_tokens))
        result = self._store.read(key)
        if result is None:
            loss = heldout_loss(
                self._decoder,
                tokens_folder,
                num_tokens=num_tokens,
                sequence_length=self.sequence_length,
                note=self._progress.note,
            )
            if loss is None:
                advice = "" if self._suite.limit is None else "; set evaluation.limit higher"
                self._progress.note(
                    f"there is no validation loss: all of the {num_tokens:,} held-out tokens "
                    f"belong to prompts{advice}"
                )
                return None
            output = {
                "results": {VALIDATION_LOSS_ENTRY: {f"{VALIDATION_LOSS_ENTRY},{NO_FILTER}": loss}},
                "versions": {VALIDATION_LOSS_ENTRY: 1},
                "n-shot": {VALIDATION_LOSS_ENTRY: 0},
            }
            measured = MeasuredTask(name=VALIDATION_LOSS_ENTRY, output=output)
            self._store.write(key, measured, {})
            result = measured.result
        return result.metrics[VALIDATION_LOSS_ENTRY]

    def keys(self, loaded: LoadedSuite) -> dict[str, str]:
        """Return name of each task -> key of its stored result."""
        opening = trained_opening(self._model.text_folder)
        limit = self._suite.limit
        return {
            name: self._key(loaded.fingerprint(name), limit=limit, opening=opening)
            for name in loaded.tasks
        }

    def _key(
        self, fingerprint: str, *, limit: int | None = None, opening: Sequence[int] = ()
    ) -> str:
        return self._suite.result_key(
            self._model.key,
            fingerprint,
            precision=self.precision,
            context_length=self._model.context_length,
            limit=limit,
            opening=opening,
        )

    @cached_property
    def _decoder(self) -> Decoder:
        return self._model.decoder(DTYPES[self.precision], device=self._device)

    def _lm_eval_model(self, missing: LoadedSuite) -> LmEvalModel:
        """Load the model with lm-eval's interface, for these tasks."""
        from orchestrator.evaluation.lm_eval_model import DecoderModel, LmEvalModel
        from orchestrator.evaluation.looped import load_transformers

        model_type: type[LmEvalModel]
        network: Any
        if self._model.config is None:
            model_type = LmEvalModel
            text_tokenizer = self._model.tokenizer(trust_remote_code=self._trust_remote_code)
            network = load_transformers(
                self._model,
                trust_remote_code=self._trust_remote_code,
                device=self._device,
                dtype=DTYPES[self.precision],
            )
        else:
            model_type = DecoderModel
            text_tokenizer = self._model.tokenizer()
            network = self._decoder
            check_answer_settings(missing.tasks, self.sequence_length)
        prompts = self._suite.prompts or Prompts()
        check_template(text_tokenizer, prompts)
        return model_type(
            network,
            text_tokenizer,
            self._suite.batch_size,
            prompts=prompts,
            progress=self._progress,
            max_length=self._suite.sequence_length,
        )

    def _run_description(self) -> dict[str, object]:
        """Return the fields of lm-eval's results that describe a run."""
        model = self._model
        prompts = self._suite.prompts or Prompts()
        model_args: dict[str, object] = {"dtype": self.precision}
        if model.config is not None and facts_of(model.config.method).has_corrections:
            model_args["schedule"] = str(model.config.corrections)
        return {
            "config": {
                "model": model.architecture,
                "model_args": model_args,
                "batch_size": self._suite.batch_size,
                "limit": self._suite.limit,
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
    num_tokens: int = NUM_VALIDATION_TOKENS,
    sequence_length: int | None = None,
    batch_size: int = LARGEST_VALIDATION_BATCH,
    note: Callable[[str], None] | None = None,
) -> float | None:
    """Return the mean loss over held-out targets, in nats, under the model's schedule; None without
    targets.

    Args:
        num_tokens: Most tokens to read, in whole sequences.
        sequence_length: Tokens of a sequence; as many as the model's context has when unset.
        batch_size: Sequences in one forward pass; halved when a GPU runs out of memory.
        note: Called with a sentence when the batch size is halved.

    Raises:
        DeviceError: If the memory is too small for one sequence.
        Interrupted: If this process was asked to stop.
    """
    validation_batches = open_data(tokens_folder).validation_batches(
        context_length=sequence_length or decoder.config.context_length,
        num_tokens=num_tokens,
        batch_size=batch_size,
    )
    batches = list(validation_batches)
    if not any(batch.num_targets for batch in batches):
        return None
    try:
        # Arithmetic in the weights' dtype, as for the tasks.
        metrics = validation_metrics(
            decoder,
            batches,
            decoder.schedule,
            precision="fp32",
            world=World(device=str(decoder.device)),
            before_batch=end_if_stop_requested,
        )
        return metrics[VALIDATION_METRIC]
    except torch.OutOfMemoryError as error:
        problem = out_of_memory_text(error)
    smaller = smaller_batch(batch_size, problem, note)
    return heldout_loss(
        decoder,
        tokens_folder,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        batch_size=smaller,
        note=note,
    )
