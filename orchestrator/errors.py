"""The one error type that stands for a user's mistake.

Everything that a user can put right (a misspelt setting, a missing file, too few GPUs) is raised as
a `UserError` with a sentence that names what was received, what is allowed and what to do next. The
command line prints that sentence and exits with code 2; nothing else is caught there, so that a
defect of ours keeps its traceback in the log. `Interrupted` stands for a stop that the user asked
for: it says what is saved, the same command goes on from there, the exit code is 130.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can put right; its text says how. Exit code 2."""


class Interrupted(Exception):
    """A stop asked for by the user (Ctrl-C, SIGTERM); says what is saved. Exit code 130."""


class StageFailed(RuntimeError):
    """A stage that could not finish for a reason outside the user's input. Exit code 1."""
