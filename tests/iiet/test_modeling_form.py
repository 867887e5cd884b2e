"""The code of an export has the form that tools for transformers' models expect."""

import copy

import make_modeling
import pytest
import torch
from model_cases import make_model, tokens
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iiet.exporting import export, transformers_model

FAMILIES = ("vanilla", "looped", "iiet", "pcformer", "ode_rk2_gated")
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Method -> an exported folder of a small model."""
    return {
        method: export(
            make_model(method, dtype=torch.float32),
            tmp_path_factory.mktemp(method),
            token_ids={"pad_token_id": 0, "eos_token_id": 1},
        )
        for method in FAMILIES
    }


def loaded(folder, kind=AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, **REMOTE, **options).eval()


@pytest.fixture(scope="module")
def models(folders):
    """Method -> the model of its folder; who changes one copies it."""
    return {method: loaded(folder) for method, folder in folders.items()}


# Batching servers


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.slow
def test_continuous_batching_gives_the_tokens_of_generate(method, folders):
    model = loaded(folders[method])
    lengths = (3, 5, 9, 4, 7, 8, 6, 11, 2, 10)
    prompts = [tokens(length, seed=length).tolist() for length in lengths]
    options = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    one_by_one = [
        model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    # Without limits, the cache takes nearly all of the machine's memory.
    limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    together = model.generate_batch(
        prompts, generation_config=options, continuous_batching_config=limits, progress_bar=False
    )
    assert [list(output.generated_tokens) for output in together.values()] == one_by_one


class AttentionOfVllm:
    """Stands for `vllm.Attention`, which keeps the keys and values of a slot itself."""

    def __init__(self, config):
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = None
        self.keys = self.values = torch.empty(0, self.num_kv_heads, config.head_dim)

    @property
    def impl(self):
        return self

    def forward(self, query, key, value):
        """Attend, (tokens, heads * head_dim), to all tokens so far."""
        self.keys = torch.cat([self.keys, key.unflatten(-1, (self.num_kv_heads, -1))])
        self.values = torch.cat([self.values, value.unflatten(-1, (self.num_kv_heads, -1))])
        query = query.unflatten(-1, (self.num_heads, -1))
        num_tokens = len(self.keys)
        num_new = len(query)
        causal = torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (query, self.keys, self.values)),
            attn_mask=causal, scale=self.scale, enable_gqa=True,
        )  # fmt: skip
        return mixed.transpose(0, 1).flatten(1)


def attend_as_vllm(module, query, key, value, attention_mask, scaling, attention_instances, **_):
    """Attend as the function does that vLLM registers under the name "vllm"."""
    assert attention_mask is None
    attention = attention_instances[module.layer_idx]
    attention.impl.scale = scaling
    num_tokens = query.shape[-2]
    flat = (x.transpose(1, 2).reshape(num_tokens, -1) for x in (query, key, value))
    return attention.forward(*flat), None


@pytest.fixture
def vllm_attention():
    ALL_ATTENTION_FUNCTIONS.register("vllm", attend_as_vllm)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping["vllm"]


def served_as_vllm(model, instances, ids, start):
    """Run a base model as `Base.forward` does, for one request."""
    outputs = model(
        input_ids=ids[None],
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.arange(start, start + len(ids))[None],
        attention_instances=instances,
        return_dict=False,
    )
    return outputs[0][0]


@pytest.mark.parametrize("method", FAMILIES)
@torch.no_grad()
def test_the_contract_of_vllm_holds(method, folders, models, vllm_attention):
    """Imitates `vllm/model_executor/models/transformers/`: `base.py` of vLLM's commit 03bf3c92, and
    `vllm_attention_forward` in `__init__.py` of 055e47c2 (both of 2026)."""
    whole = models[method]
    config = AutoConfig.from_pretrained(folders[method], **REMOTE)
    assert type(whole).is_backend_compatible()
    assert config.architectures == [type(whole).__name__]
    config._attn_implementation = "vllm"
    model = AutoModel.from_config(config, **REMOTE).eval()
    weights = {name.removeprefix("model."): x for name, x in whole.state_dict().items()}
    head = weights.pop("lm_head.weight")
    model.load_state_dict(weights)
    assert {"layers.*.self_attn.q_proj", "layers.*.mlp.down_proj"} <= model.tp_plan.keys()

    instances = {slot: AttentionOfVllm(config) for slot in range(config.num_hidden_layers)}
    ids = tokens(12)
    parts = []
    start = 0
    for part in ids.split([7, 1, 3, 1]):
        parts.append(served_as_vllm(model, instances, part, start))
        start += len(part)
    expected = whole(ids[None]).logits[0]
    torch.testing.assert_close(torch.cat(parts) @ head.T, expected, rtol=1e-5, atol=1e-5)

    if method != "vanilla":
        assert not model.pp_plan
        del instances[config.num_hidden_layers - 1]
        with pytest.raises(ValueError, match="pipeline-parallel-size"):
            served_as_vllm(model, instances, ids, 0)


@torch.no_grad()
def test_windows_of_several_sizes_are_refused_where_a_server_makes_the_masks(vllm_attention):
    windows = {"sliding_windows": (8, None, 5)}
    model = transformers_model(make_model(dtype=torch.float32, **windows))
    assert set(model.config.layer_types) == {"full_attention"}
    ids = tokens(12)
    mask = torch.ones(12, 12).tril().bool()[None, None]
    with pytest.raises(ValueError, match="sliding_windows"):
        model(ids[None], attention_mask=mask)
    with pytest.raises(ValueError, match="sliding_windows"):
        served_as_vllm(model.model, {}, ids, 0)


@torch.no_grad()
def test_a_window_is_a_layer_type_of_each_evaluation():
    decoder = make_model(schedule=(1, 0, 2), dtype=torch.float32, sliding_windows=(None, 5, 5))
    model = transformers_model(decoder)
    assert model.config.sliding_window == 5
    full = "full_attention"
    slides = "sliding_attention"
    assert model.config.layer_types == [full, full, slides, slides, slides, slides]
    ids = tokens(2, 14)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = decoder.generate(ids, max_new_tokens=9)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


# Auto classes and training


@pytest.mark.parametrize("method", FAMILIES)
@torch.no_grad()
def test_auto_classes_load_the_base_model_and_a_classifier(method, folders, models, tmp_path):
    whole = models[method]
    ids = tokens(2, 9)
    base = loaded(folders[method], AutoModel)
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(whole.lm_head(hidden), whole(ids).logits)

    classifier = loaded(folders[method], AutoModelForSequenceClassification, num_labels=3)
    output = classifier(ids, labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    assert output.loss.isfinite()
    torch.testing.assert_close(output.logits, classifier.score(hidden)[:, -1])
    classifier.save_pretrained(tmp_path)
    reloaded = loaded(tmp_path, AutoModelForSequenceClassification)
    assert torch.equal(reloaded(ids).logits, output.logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks it.
@pytest.mark.parametrize("method", FAMILIES)
def test_lora_trains_its_own_weights_alone(method, models):
    model = copy.deepcopy(models[method])
    ids = tokens(2, 9)
    logits_before = model(ids).logits
    # PEFT knows the projections of a `model_type` of transformers.
    targets = {} if method == "vanilla" else {"target_modules": ["q_proj", "v_proj"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **targets))
    torch.testing.assert_close(adapted(ids).logits, logits_before)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    num_layers = 3
    assert len(trained) == num_layers * 2 * 2
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("method", "recomputes"), [("looped", False), *((method, True) for method in FAMILIES)]
)
@pytest.mark.slow
def test_the_trainer_trains(method, recomputes, folders, tmp_path):
    model = loaded(folders[method])
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    options = TrainingArguments(
        tmp_path, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, activation_checkpointing=recomputes,
    )  # fmt: skip
    loss_before = model(tokens(8, 12), labels=tokens(8, 12)).loss.item()
    Trainer(model, options, train_dataset=rows).train()
    loss_after = model.eval()(tokens(8, 12), labels=tokens(8, 12)).loss.item()
    assert loss_after < 0.9 * loss_before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["looped", "iiet", "pcformer"])
@torch.no_grad()
def test_a_model_compiles_as_one_graph(method):
    model = transformers_model(make_model(method, (1, 0), dtype=torch.float32))
    ids = tokens(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


# The files


@pytest.mark.parametrize("family", make_modeling.FAMILIES)
def test_each_file_is_what_its_template_gives(family):
    text = (make_modeling.MODELS / f"modeling_{family}.py").read_text(encoding="utf-8")
    assert text == make_modeling.modeling_text(family), "type `make modeling`"


def test_an_import_keeps_the_names_that_are_used():
    code = "import copy\nimport os\nfrom a import b as c, d\n\nos.remove(c)\n"
    expected = "import os\nfrom a import b as c\n\nos.remove(c)\n"
    assert make_modeling.without_unused_imports(code) == expected
