"""Trials that ASHA may stop early: the rule, the competitors, and why one was stopped."""

from __future__ import annotations

from orchestrator.records.record import Record


class AshaRule(Record):
    """When trials are compared, and how many continue."""

    first_rung: float
    """Share of the steps at which trials are first compared."""
    reduction_factor: int = 2
    """One of this many trials at a rung continues."""

    @property
    def text(self) -> str:
        """One sentence for a plan."""
        rungs, share = [], self.first_rung
        while share < 1:
            rungs.append(f"{share:.3g}")
            share *= self.reduction_factor
        return (
            f"one of {self.reduction_factor} learning rates of a model continues at "
            f"{', '.join(rungs)} of the steps (ASHA), so the cost is an upper bound"
        )


class EarlyStop(Record):
    """Why a trial was stopped."""

    rule: AshaRule
    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    competitor: str
    """Label of the trial that was better."""
    reason: str
    """Both validation losses."""

    @property
    def share_saved(self) -> float:
        """Share of the trial's steps that were not made."""
        return 1.0 - self.step / self.num_steps

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"stopped early at step {self.step} of {self.num_steps}: {self.reason}"


class AshaTrial(Record):
    """What a trial competes with."""

    rule: AshaRule
    folder: str
    """Folder of the trial."""
    num_steps: int
    """Steps of its whole training."""
    competitors: dict[str, str]
    """Label -> folder of the same model at other learning rates."""

    @property
    def model(self) -> str:
        """A name that is the same for all that compete."""
        return min([self.folder, *self.competitors.values()])
