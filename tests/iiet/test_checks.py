"""Every public dataclass names the values that are out of range, all at once."""

import dataclasses
import math

import pytest
import torch
from model_cases import tokens

import iiet
from iiet import (
    Batch,
    DistillationConfig,
    GenerationOptions,
    InferenceCost,
    InfluenceTable,
    IterationSchedule,
    ModelConfig,
)
from iiet.decoding.sampling import Sampler
from iiet.decoding.speculative import DraftRecord
from iiet.iiad.pruning import ThresholdSchedule
from iiet.methods import METHODS
from iiet.model.facts import MethodFacts, MetricFacts
from iiet.model.losses import LazyLogits

IDS = tokens(2, 4)
ROWS = ((0.3, 0.1), (0.2,))
ImplicitEulerOptions = METHODS["iiet"].facts.Options

CORRECT = {
    Batch: {"input_ids": IDS, "targets": IDS},
    DistillationConfig: {},
    DraftRecord: {},
    ThresholdSchedule: {
        "schedule": IterationSchedule((1,)),
        "threshold_above": -math.inf,
        "threshold_up_to": 0.5,
    },
    GenerationOptions: {"max_new_tokens": 1},
    ImplicitEulerOptions: {},
    InferenceCost: {field.name: 1 for field in dataclasses.fields(InferenceCost)},
    InfluenceTable: {
        "metric": "cosine",
        "value_rows": ROWS,
        "error_rows": ROWS,
        "num_tokens": 8,
    },
    IterationSchedule: {"corrections": (1, 0)},
    LazyLogits: {"hidden": torch.zeros(2, 4, 3), "weight": torch.zeros(5, 3)},
    MethodFacts: {},
    MetricFacts: {},
    ModelConfig: {**iiet.PRESETS["tiny"], "num_kv_heads": 4, "schedule": 3},
    Sampler: {},
}
"""Values that are allowed."""

WRONG = [
    (Batch, {"targets": IDS.float()}),
    (Batch, {"component_numbers": IDS.bool()}),
    (Batch, {"mask": IDS[:1]}),
    (Batch, {"target_count": -1.0}),
    (Batch, {"position_count": math.nan}),
    (DistillationConfig, {"divergence": "typo"}),
    (DistillationConfig, {"kl_weight": -1, "temperature": -1}),
    (DistillationConfig, {"kl_weight": math.inf}),
    (DistillationConfig, {"temperature": 1e4}),
    (DistillationConfig, {"hidden_weight": True}),
    (DistillationConfig, {"start_step": -1}),
    (DistillationConfig, {"start_step": 1.5}),
    (DistillationConfig, {"start_step": 4, "end_step": 3}),
    (DistillationConfig, {"start_step": 4, "end_step": 4}),
    (DraftRecord, {"drafted": -1, "plain_steps": 0.5}),
    (DraftRecord, {"rounds_by_draft": {"0": -1}}),
    (ThresholdSchedule, {"schedule": (1, 0)}),
    (ThresholdSchedule, {"threshold_up_to": -math.inf}),
    (ThresholdSchedule, {"threshold_up_to": math.nan}),
    (GenerationOptions, {"max_new_tokens": 0, "eos_token_id": -1, "draft_tokens": "many"}),
    (GenerationOptions, {"eos_token_id": [1, None], "draft_tokens": -1}),
    (GenerationOptions, {"temperature": -1.0, "top_k": 0, "top_p": 1.5}),
    (GenerationOptions, {"kv_strategy": "last", "draft": "0"}),
    (ImplicitEulerOptions, {"damping": 0.0}),
    (ImplicitEulerOptions, {"learn_damping": True, "differentiated_corrections": 0}),
    (ImplicitEulerOptions, {"start": "zero"}),
    (ImplicitEulerOptions, {"start": "identity", "damping": 0.5}),
    (InferenceCost, {"decode_flops_per_token": -1.0, "num_parameters": math.inf}),
    (InfluenceTable, {"metric": ""}),
    (InfluenceTable, {"value_rows": ((0.3, math.nan), (0.2,))}),
    (InfluenceTable, {"error_rows": ((0.3,), (0.2,))}),
    (InfluenceTable, {"error_rows": ((0.3, -0.1), (0.2,))}),
    (InfluenceTable, {"num_tokens": 0, "residual_rows": ((0.1,),)}),
    (InfluenceTable, {"layer_values": (0.1,)}),
    (InfluenceTable, {"layer_values": (0.1, math.nan)}),
    (InfluenceTable, {"layer_errors": (0.1,)}),
    (InfluenceTable, {"layer_accuracy_lost": (0.1,)}),
    (InfluenceTable, {"accuracy_lost_rows": ((0.1,), (0.1,))}),
    (IterationSchedule, {"corrections": (-2,)}),
    (LazyLogits, {"weight": torch.zeros(3, 5)}),
    (MethodFacts, {"Options": dict, "num_evaluations": 0, "full_level": 0, "is_random": 1}),
    (MethodFacts, {"version": 0, "num_left": -1, "has_corrections": None, "repeats_stack": "no"}),
    (MetricFacts, {"version": 0, "needs_targets": 1}),
    (ModelConfig, {"method": ["iiet"]}),
    (ModelConfig, {"dim": 0, "rope_theta": "far"}),
    (Sampler, {"temperature": math.nan, "top_k": 1.5, "top_p": 0.0}),
    (Sampler, {"top_k": True}),
    (Sampler, {"row_keys": torch.zeros(2)}),
]


@pytest.mark.parametrize(("kind", "changes"), WRONG)
def test_values_out_of_range_are_named(kind, changes):
    correct = kind(**CORRECT[kind])
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        dataclasses.replace(correct, **changes)
    assert all(name in str(caught.value) for name in changes)


def test_every_public_dataclass_is_tested():
    public = [getattr(iiet, name) for name in iiet.__all__]
    dataclasses_of_iiet = {value for value in public if dataclasses.is_dataclass(value)}
    assert dataclasses_of_iiet <= {kind for kind, _ in WRONG} == set(CORRECT)


def test_what_is_unknown_is_nan():
    unknown = {"threshold_above": math.nan, "threshold_up_to": math.nan}
    dataclasses.replace(ThresholdSchedule(**CORRECT[ThresholdSchedule]), **unknown)
    InferenceCost(**{**CORRECT[InferenceCost], "weight_bytes_per_token": math.nan})
    InfluenceTable("cosine", ROWS, ((math.nan, math.nan), (math.nan,)), 8)
