"""Measure a model on tasks and held-out tokens; what the store holds is not measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from iiet.decoder import Decoder
from orchestrator.data.mixture import open_data
from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.batch_limit import BatchLimit
from orchestrator.evaluation.harness import Suite, run_model, run_suite
from orchestrator.evaluation.harness.run import JournalOf, OnResult
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.models.evaluated_model import EvaluatedModel
from orchestrator.models.folder import DTYPES
from orchestrator.records.evaluation import EvaluationKeys, EvaluationResult, TaskResult
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.training.devices import World, device_precision
from orchestrator.training.objective import validation_metrics
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.provenance import content_key

VALIDATION_LOSS = "validation_loss"
NUM_VALIDATION_TOKENS = 65_536
"""Tokens of the validation loss in the tables."""
LARGEST_VALIDATION_BATCH = 16
"""Sequences in one forward pass of it."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a model is measured; only precision and limit determine the numbers."""

    precision: Precision | None = None
    """Weights and arithmetic; by the device when unset: bf16 on GPUs that have it, else fp32."""
    limit: int | None = None
    """Score only this many items of each task."""
    batch_size: int = 32
    device: str = "cpu"
    trust_remote_code: bool = False
    needs_responses: bool = False
    """Measure again what an older version stored without all that the model said."""


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
        model: EvaluatedModel,
        store: EvaluationStore,
        conditions: Conditions,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._store, self._conditions = model, store, conditions
        self._progress = progress or Progress()

    @cached_property
    def precision(self) -> Precision:
        """Weights and arithmetic of the model, if a decoder runs it."""
        return self._conditions.precision or device_precision(self._conditions.device)

    def has_stored(self, suite: Suite) -> bool:
        """Return whether all tasks of a suite have been measured before."""
        return all(map(self._read, self._keys(suite).values()))

    def stored_answers(self, suite: Suite) -> dict[str, int | None]:
        """Return for each task how many answers are stored; None if its result is."""
        return {
            name: None if self._store.read(key) else self._store.journal(key, name).num_answers
            for name, key in self._keys(suite).items()
        }

    def tasks(self, suite: Suite) -> Measured:
        """Measure the tasks of a suite.

        Raises:
            UserError: If the weights or the tokenizer are missing or damaged.
        """
        keys = self._keys(suite)
        found = {name: self._read(key) for name, key in keys.items()}
        results = {name: result for name, result in found.items() if result}
        missing = [name for name in suite.tasks if name not in results]

        def store(result: TaskResult) -> None:
            # One by one: what is measured survives an interruption.
            self._store.write(keys[result.name], result)
            results[result.name] = result

        def journal_of(name: str) -> AnswerJournal:
            journal = self._store.journal(keys[name], name)
            if journal.num_answers:
                self._progress.note(
                    f"{name}: {journal.num_answers:,} answers were stored before an interruption"
                )
            return journal

        if partly := [name for name in missing if self._store.read(keys[name])]:
            self._progress.note(
                f"{', '.join(partly)}: measured again, as results of an earlier version lack what "
                "lm-eval's files hold"
            )
        if missing:
            self._run(suite.only(missing), store, journal_of)
        evaluation = EvaluationResult(
            results={name: results[name] for name in suite.tasks},
            groups=suite.groups,
            skipped=suite.skipped,
        )
        stored = EvaluationKeys(tasks=keys, groups=suite.groups, skipped=suite.skipped)
        return Measured(evaluation, stored, len(missing), self.precision)

    def validation_loss(self, tokens_folder: Path) -> float:
        """Measure the mean loss over held-out tokens, in nats.

        Raises:
            UserError: If the weights or the tokens are missing or damaged.
        """
        fingerprint = open_data(tokens_folder).fingerprint
        key = self._key(content_key(VALIDATION_LOSS, fingerprint, NUM_VALIDATION_TOKENS))
        found = self._store.read(key)
        if found is None:
            loss = heldout_loss(self._decoder, tokens_folder, note=self._progress.note)
            found = TaskResult(name=VALIDATION_LOSS, version="1", metrics={VALIDATION_LOSS: loss})
            self._store.write(key, found)
        return found.metrics[VALIDATION_LOSS]

    def _read(self, key: str) -> TaskResult | None:
        result = self._store.read(key)
        if result and self._conditions.needs_responses and not result.has_all_responses:
            return None
        return result

    def _keys(self, suite: Suite) -> dict[str, str]:
        limit = self._conditions.limit
        return {name: self._key(suite.fingerprint(name), limit) for name in suite.tasks}

    def _key(self, what: str, limit: int | None = None) -> str:
        # Models that transformers runs keep their own dtype.
        precision = self.precision if self._model.config else None
        return content_key("evaluation", [*self._model.key, precision], what, limit)

    @cached_property
    def _decoder(self) -> Decoder:
        return self._model.decoder(DTYPES[self.precision], device=self._conditions.device)

    def _run(self, suite: Suite, on_result: OnResult, journal_of: JournalOf) -> None:
        model, conditions, progress = self._model, self._conditions, self._progress
        if model.config is not None:
            run_suite(
                suite,
                self._decoder,
                model.tokenizer(),
                batch_size=conditions.batch_size,
                limit=conditions.limit,
                progress=progress,
                on_result=on_result,
                journal_of=journal_of,
            )
            return
        # Imported here: transformers takes seconds, and our own models do without it.
        from orchestrator.evaluation.harness.transformers_model import load_transformers_model

        runner = load_transformers_model(
            model.path,
            device=conditions.device,
            batch_size=conditions.batch_size,
            trust_remote_code=conditions.trust_remote_code,
            prompts=suite.prompts,
            progress=progress,
        )
        run_model(
            suite,
            runner,
            limit=conditions.limit,
            progress=progress,
            on_result=on_result,
            journal_of=journal_of,
        )


def heldout_loss(
    decoder: Decoder, tokens_folder: Path, *, note: Callable[[str], None] | None = None
) -> float:
    """Return the mean loss over held-out targets, in nats, under the model's schedule.

    Args:
        note: Called with a sentence if a batch runs out of a GPU's memory; smaller ones follow.

    Raises:
        DeviceError: If the memory is too small for one sequence.
    """
    limit = BatchLimit(LARGEST_VALIDATION_BATCH, "sequences", note)
    while True:
        batches = open_data(tokens_folder).validation_batches(
            context_length=decoder.config.context_length,
            num_tokens=NUM_VALIDATION_TOKENS,
            batch_size=limit.size,
        )
        # The arithmetic is that of the weights, as for the tasks.
        measure = partial(
            validation_metrics,
            decoder,
            list(batches),
            decoder.schedule,
            precision="fp32",
            world=World(device=str(decoder.device)),
        )
        metrics = limit.run(measure, size=limit.size, can_split=limit.size > 1)
        if metrics is not None:
            return metrics[VALIDATION_METRIC]
