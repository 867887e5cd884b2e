"""A password in an address is never shown, logged or stored."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import pytest
from refusals import assert_names, refused

from orchestrator import cli
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, TrainingSettings
from orchestrator.terminal.logs import command_log
from orchestrator.training.job import check_job
from orchestrator.workspace.errors import (
    Interrupted,
    RunFailed,
    UserError,
    has_secret,
    is_secret_name,
    mask_secrets,
    quoted,
    strip_credentials,
)
from orchestrator.workspace.layout import open_workspace

SECRET = "geh3im"
ADDRESSES = {
    f"http://user:{SECRET}@host:5000/x": "http://***@host:5000/x",
    f"http://{SECRET}@host/": "http://***@host/",
    f"postgresql+psycopg2://user:a@{SECRET}@host/db": "postgresql+psycopg2://***@host/db",
    f"s3://KEY:{SECRET}@bucket/runs": "s3://***@bucket/runs",
    f"s3://KEY:a/b+{SECRET}/c@bucket/runs": "s3://***@bucket/runs",
    f"abfs://:{SECRET}@account.dfs.core.windows.net/c": "abfs://***@account.dfs.core.windows.net/c",
    f"https://host/c?sv=1&sig={SECRET}%2B&se=2": "https://host/c?sv=1&sig=***&se=2",
    f"https://host/?X-Amz-Signature={SECRET}": "https://host/?X-Amz-Signature=***",
    f"s3://bucket/p?access_key=A&secret_key={SECRET}": "s3://bucket/p?access_key=***&secret_key=***",
    f"mysql://host/db?password={SECRET}": "mysql://host/db?password=***",
}  # fmt: skip
HARMLESS = [
    "s3://bucket/runs", "file:///a/b@c", "hdfs://user@host:8020/x", "http://host:5000/a@b",
    "abfss://container@account.dfs.core.windows.net/x", "/a/path@2", "models:/toy@keep-99",
    "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=a&viewStateShareKey=front-toy",
    "--set takes section.key=value",
]  # fmt: skip


def test_a_secret_is_masked_anywhere_in_an_address_and_nothing_else():
    for address, shown in ADDRESSES.items():
        assert mask_secrets(address) == shown
        text = f"API request to '{address}' failed: (Caused by 'x@y')"
        assert mask_secrets(text) == text.replace(address, shown)
        assert SECRET not in quoted(address + 500 * "x")
        assert SECRET not in strip_credentials(address)
        assert "***@" not in strip_credentials(address)
    for text in HARMLESS:
        assert not has_secret(text)
        user = "://user@" in text or "://container@" in text
        assert (mask_secrets(text) == text) == (not user)
    text = "x://" * 10_000
    assert mask_secrets(text) == text, "in less than a minute"


def test_secrets_of_the_environment_are_masked(monkeypatch):
    secret_names = (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "MLFLOW_TRACKING_PASSWORD",
    )
    assert all(map(is_secret_name, secret_names))
    harmless_names = ("RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "NCCL_DEBUG")
    assert not any(map(is_secret_name, harmless_names))
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    monkeypatch.setenv("MY_API_KEY", f"hf_{SECRET}/longer")
    monkeypatch.setenv("SHORT_KEY", "true")
    text = f"401 for Bearer hf_{SECRET}/longer, then hf_{SECRET}; true"
    assert mask_secrets(text) == "401 for Bearer ***, then ***; true"

    text = f"env: ['OTHER_TOKEN={SECRET}', AWS_SECRET_ACCESS_KEY={SECRET}, A_TOKENS=3] b.key=x"
    shown = "env: ['OTHER_TOKEN=***', AWS_SECRET_ACCESS_KEY=***, A_TOKENS=3] b.key=x"
    assert mask_secrets(text) == shown


def test_no_error_holds_a_secret():
    for kind in (UserError, RunFailed, Interrupted):
        error = kind(f"no answer from http://user:{SECRET}@host")
        for copy in (error, pickle.loads(pickle.dumps(error))):
            assert str(copy) == "no answer from http://***@host"
            assert SECRET not in repr(copy.args)


def test_a_log_holds_no_secret(tmp_path):
    address = f"http://user:{SECRET}@host"
    with command_log(tmp_path, "test", verbose=False) as (log, _):
        try:
            raise RuntimeError(address)
        except RuntimeError:
            logging.getLogger("urllib3").exception("no answer from %s", address)
        assert SECRET not in log.read_text(), "it must be masked before a kill"
        os.write(2, b"\xff of a child process: " + address.encode())
    assert SECRET not in log.read_text(errors="replace")
    assert b"\xff of a child process: http://***@host" in log.read_bytes()


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("command", "expected_code"), [("ui --sync", 0), ("report", 2), ("ui", 1)])
def test_an_unreachable_server_is_named_without_its_password(
    command, expected_code, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:9/mlflow")
    monkeypatch.setenv("IIET_WORKSPACE", str(open_workspace(tmp_path).root))
    code = cli.main(command.split())
    printed = "".join(capfd.readouterr())
    assert code == expected_code, printed
    if command != "report":
        assert "127.0.0.1:9/mlflow" in printed
    assert SECRET not in printed
    assert SECRET.encode() not in all_bytes(tmp_path)


def test_storage_with_a_secret_is_refused_and_nothing_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "space"))
    file = tmp_path / "settings.yaml"
    for uri in filter(has_secret, ADDRESSES):
        with refused(ValueError, "address", "key") as caught:
            ClusterSettings(storage=uri)
        assert_names(str(caught.value), "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    file.write_text(f"cluster: {{storage: '{uri}'}}\n")
    for options in (["--storage", uri], [f"--set=cluster.storage={uri}"], ["--config", str(file)]):
        assert cli.main(["pretrain", *options]) == 2
        printed = "".join(capfd.readouterr())
        assert "cluster.storage" in printed
        assert SECRET not in printed
    for option in (f"cluster.storge={uri}", uri):  # Misspelled, or without its name.
        assert cli.main(["pretrain", "--set", option]) == 2
        assert SECRET not in "".join(capfd.readouterr())
    assert not (tmp_path / "space").exists()


def test_a_job_with_a_secret_is_refused(tmp_path, tiny_tokens, tiny_model):
    job = TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model=tiny_model,
        recipe=TrainingSettings(),
        storage=f"s3://KEY:{SECRET}@bucket/runs",
    )
    with pytest.raises(UserError) as caught:
        check_job(job)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_reason_of_a_failed_trial_holds_no_secret():
    from orchestrator.cluster.train import failure_reason  # Imports Ray: seconds.

    error = OSError(f"cannot reach s3://KEY:{SECRET}@bucket\nsecond line")
    assert failure_reason(error) == "OSError: cannot reach s3://***@bucket"
