"""Settings of the cluster: its address, its variables, and a varying number of GPUs."""

from __future__ import annotations

import pytest

from orchestrator.settings import ClusterSettings, resolve_settings
from orchestrator.workspace.errors import UserError


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        (None, None, "local"),
        (None, "", "local"),
        (None, "head:6379", "head:6379"),
        ("other:6379", "head:6379", "other:6379"),
        ("local", "head:6379", "local"),
        ("auto", "head:6379", "auto"),
    ],
)
def test_the_setting_counts_before_the_variable(
    setting: str | None, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ClusterSettings(address=setting).ray_address == expected


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "[fe80::1]:6379", "a-b.example:1", "auto"])
def test_addresses_of_clusters_are_accepted(address: str) -> None:
    assert ClusterSettings(address=address).ray_address == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "Ray Client"),
        ("http://head:8265", "HOST:PORT"),
        ("head", "HOST:PORT"),
        ("head:0", "HOST:PORT"),
        ("head:65536", "HOST:PORT"),
        ("head:6379 x", "HOST:PORT"),
        ("", "HOST:PORT"),
    ],
)
def test_other_texts_are_refused_in_settings_and_in_the_environment(
    address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"cluster.address: .*{words}"):
        resolve_settings({"cluster": {"address": address}})
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"RAY_ADDRESS: .*{words}"):
            ClusterSettings().ray_address  # noqa: B018


def test_a_trial_with_too_few_workers_is_one_shard() -> None:
    cluster = ClusterSettings(num_gpus=32, parallel="fsdp", num_shards=8)
    assert {n: cluster.shards_of(n) for n in (4, 8, 12, 16)} == {4: None, 8: 8, 12: None, 16: 8}


def test_a_job_starts_with_the_fewest_gpus() -> None:
    assert ClusterSettings(num_gpus=8).fewest_gpus == 8
    assert ClusterSettings(num_gpus=8, min_gpus=2).fewest_gpus == 2


@pytest.mark.parametrize("entry", ["HF_TOKEN", "AWS_*", "NCCL_DEBUG=INFO", "KEY_FILE=/a b", "A="])
def test_variables_are_names_patterns_and_harmless_values(entry: str) -> None:
    assert resolve_settings({"cluster": {"env": [entry]}}).cluster.env == (entry,)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("*", "the name of a variable"),
        ("1A", "the name of a variable"),
        ("A B=c", "the name of a variable"),
        ("HF_TOKEN=hf_abc", "give only its name"),
        ("MY_SECRET_KEY=abc", "give only its name"),
        ("PROXY=http://me:hf_abc@host", "give only its name"),
    ],
)
def test_secrets_are_not_given_by_value_and_are_not_repeated(entry: str, words: str) -> None:
    with pytest.raises(UserError, match=f"cluster.env: .*{words}") as caught:
        resolve_settings({}, [f"cluster.env=['{entry}']"])
    assert "abc" not in str(caught.value)
