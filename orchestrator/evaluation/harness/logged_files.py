"""Write an evaluation in the files that lm-eval writes with `--log_samples`.

The store keeps what a model said, but neither documents nor prompts. So lm-eval evaluates again, on
a model class that answers from the store: its own code builds prompts, filters and metrics, and its
own tracker writes the files. No weights are loaded. The values of all items must come out as they
are stored. It is done on request only: the files repeat all documents and prompts, and take as long
as lm-eval needs without a model.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from orchestrator.evaluation.harness.chat import ChatModel
from orchestrator.evaluation.harness.run import FEWSHOT_SEED, evaluate_task, task_result
from orchestrator.evaluation.harness.suite import Suite
from orchestrator.evaluation.harness.suppressed_output import suppress_output
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.evaluation import (
    FILTER_MARK,
    NO_FILTER,
    STDERR_SUFFIX,
    EvaluationResult,
    TaskResult,
)
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import expand_user


@dataclass(frozen=True)
class LoggedOutput:
    """Where the files of one model go: a folder with its name, inside of `folder`."""

    folder: Path
    name: str


class StoredModel(ChatModel, LM):  # type: ignore[misc]
    """A model of lm-eval that answers with what is stored of the current task."""

    result: TaskResult

    def __init__(self, tokenizer: ModelTokenizer, prompts: Prompts) -> None:
        super().__init__()
        self.text, self.prompts = tokenizer, prompts

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Return the stored score of each continuation."""
        scores = self._stored(requests, self.result.log_likelihoods)
        return list(zip(scores, self._stored(requests, self.result.is_greedy), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Return the stored score of each text."""
        return self._stored(requests, self.result.log_likelihoods)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Return the stored answers."""
        return self._stored(requests, self.result.answers)

    def _stored(self, requests: list[Instance], responses: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the response to each request; an item's requests come in the stored order."""
        seen: Counter[int] = Counter()
        found = []
        for request in requests:
            found.append(responses[request.doc_id][seen[request.doc_id]])
            seen[request.doc_id] += 1
        return found


def new_output_folder(path: Path | str) -> Path:
    """Return the folder for `LoggedOutput`, made if it is missing.

    Raises:
        UserError: If it cannot be made, or lm-eval would take its name for a file.
    """
    folder = expand_user(path).absolute()
    if folder.suffix == ".json":
        raise UserError(f"--log-samples takes a folder, whose name ends not in .json; got {path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log-samples: cannot make the folder {path}: {error.strerror}") from None
    return folder


def write_lm_eval_files(
    output: LoggedOutput,
    suite: Suite,
    evaluation: EvaluationResult,
    tokenizer: ModelTokenizer,
    config: Mapping[str, Any],
) -> Path:
    """Write `results_DATE.json` and `samples_TASK_DATE.jsonl`; return their folder.

    Args:
        suite: The loaded tasks of the evaluation.
        evaluation: Its results hold all responses; see `TaskResult.has_all_responses`.
        tokenizer: The model's, for prompts by its chat template.
        config: `model`, `model_args`, `limit` and `batch_size`, for the results.

    Raises:
        RunFailed: If a task asks again for other items, or the files cannot be written.
    """
    prompts = suite.prompts or Prompts()
    model = StoredModel(tokenizer, prompts)
    results: dict[str, Any] = {}
    for name, model.result in evaluation.results.items():
        found = _asked_again(suite, name, model, config["limit"])
        for part, values in found.items():
            results.setdefault(part, {}).update(values)
    samples = results.pop("samples")
    results |= {
        "group_subtasks": {name: list(tasks) for name, tasks in evaluation.groups.items()},
        "config": {
            **config,
            "apply_chat_template": prompts.chat_template,
            "fewshot_seed": FEWSHOT_SEED,
        },
        "date": time.time(),
        "lm_eval_version": metadata.version("lm_eval"),
    }
    return _write(output, results, samples, prompts)


def _asked_again(suite: Suite, name: str, model: StoredModel, limit: int | None) -> dict[str, Any]:
    task, stored = suite.tasks[name], model.result
    try:
        output = evaluate_task(task, name, model, model.prompts, limit)
    except LookupError:
        raise RunFailed(f"the stored responses to {name} are not those that it asks for") from None
    again = task_result(task, name, output)
    # As texts, where NaN equals itself.
    if json.dumps([again.items, again.values]) != json.dumps([stored.items, stored.values]):
        raise RunFailed(f"the stored responses to {name} give other values than were measured")
    for label, value in stored.metrics.items():
        if label.endswith(STDERR_SUFFIX):
            metric, _, filter_name = label.removesuffix(STDERR_SUFFIX).partition(FILTER_MARK)
            key = f"{metric}{STDERR_SUFFIX},{filter_name or NO_FILTER}"
            output["results"][name][key] = value
    return output


def _write(
    output: LoggedOutput,
    results: dict[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
    prompts: Prompts,
) -> Path:
    # Imported here: it loads pandas and loggers of other services, for these files only.
    from lm_eval.loggers.evaluation_tracker import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(output.folder))
    about = tracker.general_config_tracker
    about.log_experiment_args(
        model_source="iiet-orch",
        model_args={"model": output.name},
        system_instruction=prompts.system_instruction,
        chat_template=None,
        fewshot_as_multiturn=prompts.fewshot_as_multiturn,
    )
    with suppress_output():
        tracker.save_results_aggregated(results, samples)
        for name, of_task in samples.items():
            tracker.save_results_samples(name, of_task)
    folder = output.folder / str(about.model_name_sanitized)
    # The tracker logs errors, and goes on.
    files = {f"samples_{name}_{tracker.date_id}.jsonl": len(of) for name, of in samples.items()}
    missing = [name for name, count in files.items() if _num_lines(folder / name) != count]
    if not (folder / f"results_{tracker.date_id}.json").is_file() or missing:
        raise RunFailed(f"cannot write all of lm-eval's files into {folder}; is its disk full?")
    return folder


def _num_lines(path: Path) -> int:
    if not path.is_file():
        return -1
    with path.open("rb") as lines:
        return sum(1 for _ in lines)
