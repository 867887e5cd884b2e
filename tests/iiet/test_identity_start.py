"""An IIET with an identity start is the plain model of the same weights, until it has learned."""

import dataclasses
import functools

import pytest
import torch
from model_cases import tokens
from plain_models import CASES, config_of, random_model
from transformers import AutoModelForCausalLM

from iiet import Decoder, decoder_from_published, influence_table, next_token_loss
from iiet.exporting import export, transformers_model
from iiet.hf.plain_models import config_from_plain
from iiet.methods import METHODS
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of

LENGTH = 14
MIXED_SCHEDULE = (0, 3, 2, 1)
SCHEDULES = [3, MIXED_SCHEDULE, (1, 0, 3, 2)]


@functools.cache
def plain_model(case: str) -> Decoder:
    """Return a random model of a type of transformers, in float32."""
    weights = random_model(case).state_dict()
    plain = decoder_from_published(config_of(case).to_diff_dict(), weights)
    return plain.float().eval()


def retrofitted(plain: Decoder, **options: object) -> Decoder:
    """Return an IIET with the weights of a plain model and fresh ones of the method."""
    config = dataclasses.replace(
        plain.config,
        method="iiet",
        schedule=3,
        method_options=facts_of("iiet").Options(start="identity", **options),
    )
    decoder = Decoder(config).eval()
    missing, unexpected = decoder.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == decoder.method_parameters().keys()
    assert not unexpected
    return decoder


def ids_of(plain: Decoder) -> torch.Tensor:
    return tokens(2, LENGTH) % plain.config.vocab_size


def cached_logits(decoder: Decoder, ids: torch.Tensor, schedule: object) -> torch.Tensor:
    """Return the logits of two parts of a prompt, then of single tokens, with a cache."""
    decoder = decoder.with_schedule(schedule)
    cache = decoder.new_cache(batch_size=len(ids), max_tokens=LENGTH)
    parts = ids.split([7, 5, 1, 1], dim=1)
    with torch.no_grad():
        return torch.cat([decoder(part, cache=cache) for part in parts], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_starts_as_the_plain_model_to_the_last_bit(case):
    plain = plain_model(case)
    decoder = retrofitted(plain)
    ids = ids_of(plain)
    logits = plain(ids)
    for schedule in SCHEDULES:
        assert torch.equal(decoder(ids, schedule=schedule), logits), schedule
    cached = cached_logits(decoder, ids, MIXED_SCHEDULE)
    assert torch.equal(cached, cached_logits(plain, ids, 0))


@pytest.mark.parametrize(
    ("case", "kind"),
    [("qwen3 layer types", "vector"), ("smollm3 windows", "scalar")],
)
def test_a_few_steps_move_the_model_and_its_corrections(case, kind):
    plain = plain_model(case)
    decoder = retrofitted(plain, learn_damping=kind)
    ids = ids_of(plain)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        next_token_loss(decoder(ids), ids).backward()
        optimizer.step()
    for layer in decoder.model.layers:
        assert all(gate.abs().max() > 1e-4 for gate in layer.gates())
    with torch.no_grad():
        full = decoder(ids)
        uncorrected = decoder(ids, schedule=0)
        assert not torch.equal(full, plain(ids))
        assert (full - uncorrected).abs().max() > 1e-3
        torch.testing.assert_close(cached_logits(decoder, ids, 3), full, rtol=1e-4, atol=1e-4)


def test_an_export_starts_as_its_source_and_is_drafted_from(tmp_path):
    plain = plain_model("llama")
    ids = ids_of(plain)
    decoder = retrofitted(plain)
    export(decoder, tmp_path / "start")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "start", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids), rtol=1e-5, atol=1e-5)
        for layer in decoder.model.layers:
            for gate in layer.gates():
                gate.uniform_(0.0, 0.5)
            layer.mix.inner.add_(0.05)
        expected = decoder(ids)
        logits = transformers_model(decoder).eval()(ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    drafted = decoder.generate(ids, max_new_tokens=12, draft="0", draft_tokens=3)
    assert torch.equal(drafted, decoder.generate(ids, max_new_tokens=12))


@pytest.mark.parametrize("metric", ["cosine", "relative", "loss"])
def test_corrections_have_no_influence_at_the_start_and_some_when_a_gate_opens(metric):
    plain = plain_model("llama")
    decoder = retrofitted(plain)
    ids = ids_of(plain)
    rows_at_start = influence_table(decoder, ids, metric=metric).value_rows
    assert {value for row in rows_at_start for value in row} == {0.0}
    with torch.no_grad():
        decoder.model.layers[1].damping.fill_(0.3)
    rows = influence_table(decoder, ids, metric=metric).value_rows
    assert all(rows[1])
    assert set(rows[0] + rows[2] + rows[3]) == {0.0}


@torch.no_grad()
def test_influence_compares_what_damped_corrections_leave():
    """The outputs of fields are as far apart as ever where a correction is hardly applied."""
    decoder = retrofitted(plain_model("llama"))
    for layer in decoder.model.layers:
        layer.damping.uniform_(0.1, 0.4)
        layer.correction_norm.blend.uniform_(0.1, 0.4)
    ids = ids_of(decoder)
    evaluations = []
    decoder(ids, observe=evaluations.append)
    expected = []
    for number, layer in enumerate(decoder.model.layers):
        prediction, *corrections = (
            evaluation for evaluation in evaluations if evaluation.layer == number
        )
        before = prediction.estimate
        row = []
        for correction in corrections:
            after = before + layer.damping * (correction.estimate - before)
            row.append((1 - torch.cosine_similarity(before, after, dim=-1)).mean().item())
            before = after
        expected.append(tuple(row))
    rows = influence_table(decoder, ids).value_rows
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3, abs=1e-6)


def test_options_with_the_same_effect_are_equal_and_are_stored():
    options = facts_of("iiet").Options
    assert options(start="identity") == options(start="identity", learn_damping="vector")
    config = config_from_plain(config_of("llama").to_diff_dict())
    config = dataclasses.replace(
        config, method="iiet", schedule=2, method_options=options(start="identity")
    )
    assert config.to_dict()["method_options"] == {"start": "identity", "learn_damping": "vector"}
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("method", METHODS)
def test_facts_say_whether_a_method_has_gates(method):
    facts = facts_of(method)
    choices = [facts.Options()]
    if method == "iiet":
        choices += [facts.Options(start="identity"), facts.Options(learn_damping="scalar")]
    for options in choices:
        config = dataclasses.replace(
            config_from_plain(config_of("llama").to_diff_dict()),
            method=method,
            schedule=2 if facts.has_corrections else None,
            method_options=options,
        )
        layer = METHODS[method](config, 0)
        assert facts.has_gates(options) == any(True for _ in layer.gates())
