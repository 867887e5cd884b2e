"""What a training has saved is said in few words, also of one that never began."""

from __future__ import annotations

from orchestrator.training.run_locks import describe_saved_state
from orchestrator.workspace.journal import Journal


def test_a_training_that_never_began_is_told_from_one_that_saved_nothing(tiny_job):
    job = tiny_job()
    assert describe_saved_state({"r = 0": job}) == "not started yet"
    journal = Journal(job.folder)
    journal.event("started")
    journal.close()
    assert describe_saved_state({"r = 0": job}) == "nothing was saved"
