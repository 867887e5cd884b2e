"""Progress counts ended and running trials, and looks at no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.records.trial import SweepPlan
from orchestrator.sweeping.trial_queue import RoundProgress
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import checkpoint_name


class Shown(Progress):
    """Remembers what was shown last."""

    done, text = 0.0, ""

    def advance(self, done: float, text: str = "", **_: Any) -> None:
        self.done, self.text = done, text


def train(folder: str, step: int) -> None:
    journal = Journal(Path(folder))
    journal.metrics(step, {"train/loss": 1.0})
    journal.close()


def test_running_trials_count_by_their_steps_and_ended_ones_whole(tiny_plan: SweepPlan) -> None:
    first, second, third = tiny_plan.trials[1:4]
    shown = Shown()
    progress = RoundProgress(shown, [first, second], num_done=1, num_all=4)
    progress.add(third)
    train(first.folder, 20)
    train(second.folder, 30)
    progress.show({first.key})
    assert (shown.done, shown.text) == (1 + 0.9 * 20 / 40, first.label)
    assert progress.saved().startswith("1 of 4 trials are finished; trial "), "it has begun"
    progress.end(first.key, finished=True)
    progress.show({third.key})
    assert (shown.done, shown.text) == (2, "")
    assert progress.saved() == "2 of 4 trials are finished"
    progress.end(third.key, finished=False)
    progress.show([])
    assert shown.done == 3
    assert progress.saved() == "2 of 4 trials are finished", "a failed one has no result"


def test_a_checkpoint_before_the_first_recorded_step_counts_as_saved(tiny_plan: SweepPlan) -> None:
    trial = tiny_plan.trials[1]
    progress = RoundProgress(Shown(), [trial], num_done=1, num_all=4)
    progress.show({trial.key})
    assert progress.saved() == "1 of 4 trials are finished"
    checkpoint = Path(trial.folder) / checkpoint_name(50)
    checkpoint.mkdir(parents=True)
    found = f"1 of 4 trials are finished; trial {trial.label}: saved at step 50"
    assert progress.saved() == found
