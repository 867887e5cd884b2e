"""Logs of commands: the newest stay, and so do those of commands that still run."""

from __future__ import annotations

from orchestrator.terminal.logs import NUM_LOGS_KEPT, command_log


def test_the_log_of_a_command_that_runs_stays(tmp_path):
    ended = [f"20200101-{number:06}-report-1.log" for number in range(2 * NUM_LOGS_KEPT)]
    for name in ended:
        (tmp_path / name).touch()
    with command_log(tmp_path, "prepare", verbose=False) as (log, _):
        assert log is not None
        running = log.rename(tmp_path / "20190101-000000-prepare-1.log")
        with command_log(tmp_path, "report", verbose=False) as (new_log, _):
            assert new_log is not None
            kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == [running.name, *ended[-NUM_LOGS_KEPT + 1 :], new_log.name]


def test_a_log_that_was_deleted_meanwhile_is_no_error(tmp_path):
    with command_log(tmp_path, "prepare", verbose=False) as (log, _):
        assert log is not None
        log.unlink()
