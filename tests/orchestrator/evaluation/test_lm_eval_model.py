"""A decoder under lm-eval: its numbers are those of stock lm-eval and of plain forward passes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_progress import KeptProgress
from lm_eval.api.instance import Instance
from lm_eval_tasks import write_task
from model_cases import schedule_for
from refusals import refused
from sample_texts import tokens_of
from torch import Tensor, nn

from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.model.config import ModelConfig
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.answers import Sampling, generate_answers
from orchestrator.evaluation.lm_eval_model import DecoderModel, run_task
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.evaluation.store import AnswerJournal, MeasuredTask
from orchestrator.evaluation.tasks import LoadedSuite, load_suite, suppress_output
from orchestrator.models.tokenizer import Message, ModelTokenizer, check_template
from orchestrator.records.evaluation import Suite
from orchestrator.reporting.statistics import shared_metric
from orchestrator.settings import resolve_settings
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.stop import stop_when
from orchestrator.workspace.errors import DeviceError, Interrupted, UserError
from orchestrator.workspace.layout import Workspace

ROWS: dict[str, list[dict[str, Any]]] = {
    "lastword": [
        {"context": f"one two three {word} and {word} again", "word": word}
        for word in ("apple", "bear", "cab", "deed", "edge")
    ],
    "choices": [
        {"context": f"a {a} and a", "endings": [f"{a} {b}", f"{b} gone home", "end"], "label": 0}
        for a, b in (("bag", "fog"), ("hen", "pig"), ("log", "cat"), ("map", "pan"))
    ],
    "rolling": [{"text": "bead cafe deaf face feed " * n} for n in (1, 4, 9)],
}
QUESTIONS = ["a bag", "the hen had gone", "cab", "face the deaf pig", "x", "dad had a"]
CONTEXT = 48


@pytest.fixture
def suite(tmp_path) -> LoadedSuite:
    folder = tmp_path / "tasks"
    for name, rows in ROWS.items():
        write_task(folder, name, rows)
    return load_suite(Suite(include_folder=str(folder)))


@pytest.fixture
def make_model(decoder, tokenizer) -> Callable[..., DecoderModel]:
    """A function that makes a model for lm-eval; its arguments change the configuration."""

    def make(batch_size: int = 32, **changes: Any) -> DecoderModel:
        if changes:
            torch.manual_seed(3)
            changed = Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), **changes}))
        return DecoderModel(
            changed if changes else decoder, tokenizer, batch_size, progress=KeptProgress()
        )

    return make


def with_opening(decoder: Decoder, tokenizer: ModelTokenizer) -> Decoder:
    """Return a decoder with weights of its own for a tokenizer with an opening token more."""
    config = {**decoder.config.to_dict(), "vocab_size": tokenizer.tokenizer.get_vocab_size()}
    return Decoder(ModelConfig.from_dict(config)).eval()


def run(
    suite: LoadedSuite, model: DecoderModel, limit: int | None = None
) -> dict[str, MeasuredTask]:
    return {name: run_task(name, task, model, limit) for name, task in suite.tasks.items()}


def scores_of(sample: dict[str, Any]) -> list[float]:
    first = [responses[0] for responses in sample["resps"]]
    return [r[0] if isinstance(r, tuple) else r for r in first]


def questions(
    folder: Path, decoder: Decoder, tokenizer: ModelTokenizer, **changes: Any
) -> tuple[LoadedSuite, list[str]]:
    """Return a task of questions, every second with the decoder's answer, and its answers."""
    contexts = [tokenizer.encode(q, add_special_tokens=False) for q in QUESTIONS]
    settings = Sampling(max_new_tokens=6, stop=("\n",))
    answers = generate_answers(decoder, tokenizer, contexts, settings, [0] * len(contexts))
    rows = [
        {"question": question, "answer": answer if number % 2 else answer + "!"}
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    write_task(folder, "questions", rows, **changes)
    return load_suite(Suite(include_folder=str(folder))), answers


def answers_of(task: MeasuredTask) -> list[list[str]]:
    return [[text for texts in sample["resps"] for text in texts] for sample in task.samples]


@pytest.mark.parametrize("has_opening", [False, True])
def test_numbers_and_answers_equal_those_of_stock_lm_eval(
    has_opening, suite, decoder, tokenizer, opening_path, tiny_tokens, tmp_path, capfd
):
    from lm_eval import evaluator
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.models.huggingface import HFLM

    from iiet.exporting import fast_tokenizer, transformers_model

    path = tiny_tokens / "tokenizer.json"
    if has_opening:
        path = opening_path
        tokenizer = ModelTokenizer(opening_path)
        decoder = with_opening(decoder, tokenizer)
    question_suite, _ = questions(tmp_path / "asked", decoder, tokenizer)
    tasks = suite.tasks | question_suite.tasks
    ours = {name: run_task(name, t, DecoderModel(decoder, tokenizer)) for name, t in tasks.items()}
    assert capfd.readouterr() == ("", "")
    model = transformers_model(decoder)
    text = fast_tokenizer(path, end_of_text="<|endoftext|>", context_length=CONTEXT)
    with suppress_output():
        stock = HFLM(
            pretrained=model, tokenizer=text, max_length=CONTEXT, batch_size=1, logits_cache=False
        )
        theirs = evaluator.evaluate(lm=stock, task_dict={"tasks": tasks}, bootstrap_iters=0)
    for name, task in ours.items():
        for metric, value in task.result.metrics.items():
            if not metric.endswith("_stderr"):
                assert theirs["results"][name][f"{metric},none"] == pytest.approx(value, rel=1e-5)
        samples = theirs["samples"][name]
        if name == "questions":
            assert answers_of(task) == [sample["resps"][0] for sample in samples]
            continue
        for sample, stock_sample in zip(task.samples, samples, strict=True):
            assert scores_of(sample) == pytest.approx(scores_of(stock_sample), rel=2e-6), name
    result = ours["choices"].result
    for metric in ("acc", "acc_norm"):
        error = mean_stderr(result.values[metric])
        assert result.metrics[f"{metric}_stderr"] == pytest.approx(error)
    assert ours["lastword"].result.version == "2.0"
    assert [task.result.num_items for task in ours.values()] == [4, 5, 3, 6]
    limited = run(suite, DecoderModel(decoder, tokenizer), limit=2)
    assert [task.result.num_items for task in limited.values()] == [2, 2, 2]


def test_a_model_reads_texts_as_documents_began_in_its_training(decoder, opening_path, tmp_path):
    texts = [f"a bag had gone a bag {number}" for number in range(60)]
    data = tokens_of(texts, tmp_path / "data", tokenizer=str(opening_path))
    trained = open_tokens(data).train[:].tolist()
    tokenizer = ModelTokenizer(opening_path)
    model = DecoderModel(with_opening(decoder, tokenizer), tokenizer)
    inputs: list[list[int]] = []
    model.decoder.register_forward_pre_hook(lambda _, ids: inputs.append(ids[0][0].tolist()))
    for number, context in enumerate(["a bag had", ""]):
        request = Instance("loglikelihood", {}, (context, " gone a bag"), number)
        model.loglikelihood([request], disable_tqdm=True)
    for text in ("a bag had gone a bag", " gone a bag"):
        expected = [trained[0], *tokenizer.tokenizer.encode(text, add_special_tokens=False).ids]
        assert expected[:-1] in inputs
    assert trained[: len(inputs[0])] == inputs[0]
    assert tokenizer.encode("<s>a", add_special_tokens=True) == tokenizer.encode(
        "a", add_special_tokens=True
    )


def test_prompts_that_lose_their_beginning_are_counted(make_model, tmp_path):
    folder = write_task(tmp_path, "lastword", ROWS["lastword"])
    narrow = make_model(context_length=8)
    run(load_suite(Suite(include_folder=str(folder))), narrow)
    assert narrow.num_cut == len(ROWS["lastword"])


def test_a_model_of_a_longer_context_can_be_measured_at_another_length(
    make_model, suite, decoder, tokenizer, tiny_tokens, tmp_path
):
    question_suite, _ = questions(tmp_path / "asked", decoder, tokenizer)
    tasks = suite.tasks | question_suite.tasks
    longer = {**decoder.config.to_dict(), "context_length": 2 * CONTEXT}
    wide = Decoder(ModelConfig.from_dict(longer)).eval()
    wide.load_state_dict(decoder.state_dict())
    for name, task in tasks.items():
        short = run_task(name, task, DecoderModel(wide, tokenizer, max_length=CONTEXT))
        usual = run_task(name, task, make_model())
        assert short.result == usual.result, name
        assert short.samples == usual.samples, name
    assert heldout_loss(wide, tiny_tokens, sequence_length=CONTEXT) == pytest.approx(
        heldout_loss(decoder, tiny_tokens), rel=1e-6
    )
    assert heldout_loss(wide, tiny_tokens) != heldout_loss(decoder, tiny_tokens)


# Scores


@torch.no_grad()
def plain_score(
    decoder: Decoder, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """Score a continuation by one plain forward pass, after as many tokens as fit."""
    read = (context + continuation)[-(CONTEXT + 1) : -1]
    logits = decoder(torch.tensor([read]))[0, -len(continuation) :]
    scores = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return float(scores.sum()), logits.argmax(-1).tolist() == continuation


def mixed_pairs() -> list[tuple[Any, list[int], list[int]]]:
    """Choices of one token and of several, repeats, one text split in two ways, cut contexts."""
    draw = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(300) for _ in range(draw.randint(least, most))]

    pairs = []
    for most in (1, 1, 6, 9):
        context = tokens(8, 40)
        pairs += [(context, tokens(1, most)) for _ in range(4)]
        pairs.append(pairs[-1])
    context = tokens(10, 10)
    continuation = tokens(6, 6)
    pairs += [(context + continuation[:n], continuation[n:]) for n in range(6)]
    pairs += [(tokens(60, 60), tokens(n, n)) for n in (1, 1, 5, CONTEXT)]
    draw.shuffle(pairs)
    return [(None, *pair) for pair in pairs]


def limit_tokens(decoder: Decoder, most: int = 10**9) -> list[tuple[int, ...]]:
    """Let passes of more tokens run out of memory; return the shapes of all passes."""
    shapes: list[tuple[int, ...]] = []

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(arguments[0].shape))
        if arguments[0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. 1 GiB is free. And more")

    decoder.model.embed_tokens.register_forward_pre_hook(check)
    return shapes


def token_scores(
    model: DecoderModel, pairs: list[tuple[Any, list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """Return log-likelihoods as lm-eval asks for them; the underscore is in its interface."""
    return model._loglikelihood_tokens(pairs)


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_plain_passes(method, make_model):
    schedule = schedule_for(method, (2, 1))
    model = make_model(method=method, schedule=schedule)
    pairs = mixed_pairs()
    expected = [plain_score(model.decoder, *pair[1:]) for pair in pairs]
    for score, right in zip(token_scores(model, pairs), expected, strict=True):
        assert score == (pytest.approx(right[0], abs=1e-4), right[1])


def test_a_batch_that_does_not_fit_is_halved(make_model):
    pairs = mixed_pairs()
    usual = token_scores(make_model(2, method="iiet"), pairs)
    for most in (500, 120, CONTEXT):
        model = make_model(method="iiet")
        shapes = limit_tokens(model.decoder, most)
        scores = token_scores(model, pairs)
        assert [score for score, _ in scores] == pytest.approx([s for s, _ in usual], abs=1e-4)
        notes = model.progress.notes
        assert len(notes) == sum(rows * length > most for rows, length in shapes) < 10
        assert "at most" in notes[0]
    limit_tokens(model.decoder, 10)
    with refused(DeviceError, "1 GiB is free"):
        token_scores(model, pairs)
    with refused(UserError, "49 tokens"):
        token_scores(model, [(None, [1], [2] * 49)])


def test_choices_of_one_token_are_evaluated_once(make_model):
    model = make_model()
    shapes = limit_tokens(model.decoder)
    choices = [(None, [*range(16), n], [choice]) for n in range(3) for choice in range(30)]
    token_scores(model, choices)
    assert shapes == [(3, 17)]


def test_the_validation_loss_of_smaller_batches_is_the_same(decoder, tiny_tokens):
    usual = heldout_loss(decoder, tiny_tokens)
    shapes = limit_tokens(decoder, 4 * CONTEXT)
    notes = list[str]()
    assert heldout_loss(decoder, tiny_tokens, note=notes.append) == pytest.approx(usual, rel=1e-6)
    assert max(rows for rows, _ in shapes) > 4
    assert len(notes) == 2


def test_a_limit_of_items_is_one_of_the_sequences_of_the_validation_loss(decoder, tiny_tokens):
    shapes = limit_tokens(decoder)
    heldout_loss(decoder, tiny_tokens, num_tokens=3 * CONTEXT)
    assert shapes == [(3, CONTEXT)]


def test_a_loss_is_missing_where_only_prompts_are_read(decoder, tmp_path):
    rows = [
        {"prompt": f"Number {number}: " + "who saw the birds? " * 30, "completion": "I did."}
        for number in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"source": "files", "files": [str(path)], "vocab_size": 300}
    tokens = prepare(resolve_settings({"data": tree}).data, Workspace(tmp_path / "workspace"))
    assert heldout_loss(decoder, tokens, num_tokens=CONTEXT) is None
    assert heldout_loss(decoder, tokens) is not None


def test_a_measurement_ends_before_its_next_pass_when_a_stop_is_requested(make_model, tiny_tokens):
    model = make_model()
    shapes = limit_tokens(model.decoder)
    with stop_when(lambda: len(shapes) >= 2):
        with pytest.raises(Interrupted):
            heldout_loss(model.decoder, tiny_tokens, batch_size=1)
        assert len(shapes) == 2
        with pytest.raises(Interrupted):
            token_scores(model, [(None, [1, 2], [3])])
    assert len(shapes) == 2


# Generated answers


def test_examples_are_those_that_stock_lm_eval_draws_in_each_run(make_model, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"question": word, "answer": str(n)} for n, word in enumerate(QUESTIONS)]
    folder = write_task(tmp_path, "questions", rows)
    suite = load_suite(Suite(include_folder=str(folder), num_fewshot=2))
    ours = [run(suite, make_model())["questions"] for _ in range(2)]
    assert ours[0].result.num_fewshot == 2
    with suppress_output():
        stock = simple_evaluate(
            model=make_model(),
            tasks=["questions"],
            task_manager=TaskManager(include_path=[folder], include_defaults=False),
            num_fewshot=2,
            bootstrap_iters=0,
        )
    prompts = [
        [sample["arguments"][0][0] for sample in samples]
        for samples in (*(task.samples for task in ours), stock["samples"]["questions"])
    ]
    assert all(len(prompt.split("\n\n")) == 3 for prompt in prompts[0])
    assert prompts[0] == prompts[1] == prompts[2]


def test_answers_are_compared_under_each_filter(decoder, tokenizer, make_model, tmp_path):
    plain, answers = questions(tmp_path / "plain", decoder, tokenizer)
    results = [run(plain, make_model(size))["questions"].result for size in (1, 4)]
    assert results[0] == results[1]
    assert results[0].metrics["exact_match"] == 0.5
    assert results[0].metrics["exact_match_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert results[0].values["exact_match"] == [0.0, 1.0] * 3

    first = [{"function": "take_first"}]
    changed = {"function": "map", "mapping_dict": {answers[0]: answers[0] + "!"}}
    filters = [
        {"name": "strict-match", "filter": first},
        {"name": "flexible-extract", "filter": [{**changed, "default_value": "?"}, *first]},
    ]
    filtered, _ = questions(tmp_path / "filters", decoder, tokenizer, filter_list=filters)
    result = run(filtered, make_model())["questions"].result
    assert result.metrics["exact_match:strict-match"] == 0.5
    assert result.metrics["exact_match:strict-match_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert result.values["exact_match:flexible-extract"][0] == 1.0
    assert result.num_items == len(QUESTIONS)
    assert result.accuracy_metric == shared_metric([result] * 2) == "exact_match:strict-match"

    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    texts, _ = questions(tmp_path / "texts", decoder, tokenizer, metric_list=[bleu])
    result = run(texts, make_model())["questions"].result
    assert (result.metrics.keys(), result.values) == ({"bleu"}, {})

    # Repetitions are sampled apart, and again alike in batches of any size.
    sampled = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    repeated, _ = questions(
        tmp_path / "repeated", decoder, tokenizer, generation_kwargs=sampled, repeats=3
    )
    runs = []
    for size, path in ((1, tmp_path / "answers"), (1, tmp_path / "answers"), (32, None)):
        model = make_model(size)
        model.journal = AnswerJournal(path)  # The second has all answers.
        runs.append(answers_of(run(repeated, model)["questions"]))
    computed, from_journal, in_one_batch = runs
    assert computed == from_journal == in_one_batch
    assert [len(texts) for texts in computed] == [3] * len(QUESTIONS)
    assert any(len(set(texts)) > 1 for texts in computed)


def test_a_prompt_that_is_too_long_for_its_answer_loses_its_beginning(make_model):
    def answer(prompt: str) -> str:
        options = {"until": ["\n"], "max_gen_toks": 6}
        [text] = make_model().generate_until([Instance("generate_until", {}, (prompt, options), 0)])
        return text

    beginnings = ["one two three " * 20, "face bead cafe " * 20]
    ends = ["the deaf pig had a bag " * 20, "a hen and a fog " * 20]
    assert answer(beginnings[0] + ends[0]) == answer(beginnings[1] + ends[0])
    assert answer(beginnings[0] + ends[0]) != answer(beginnings[0] + ends[1])


# Chat templates

REFUSING = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}{{ message['content'] }}/{% endfor %}"
    "{% if add_generation_prompt %}->{% endif %}"
)


def test_a_prompt_is_a_chat_with_the_instruction_if_that_is_asked_for(
    decoder, tiny_tokens, tmp_path
):
    from iiet.exporting import fast_tokenizer

    fast = fast_tokenizer(
        tiny_tokens / "tokenizer.json", end_of_text="<|endoftext|>", context_length=CONTEXT
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}/{% endfor %}"
    fast.save_pretrained(tmp_path)
    write_task(tmp_path / "tasks", "questions", [{"question": "a bag", "answer": "a"}])
    suite = load_suite(Suite(include_folder=str(tmp_path / "tasks")))
    read = {
        Prompts(): "a bag",
        Prompts(system_instruction="Add."): "Add.a bag",
        Prompts(chat_template=True): "u:a bag/",
        Prompts(chat_template=True, system_instruction="Add."): "s:Add./u:a bag/",
    }
    for prompts, expected in read.items():
        model = DecoderModel(decoder, ModelTokenizer(tmp_path), prompts=prompts)
        [sample] = run(suite, model)["questions"].samples
        assert sample["arguments"][0][0] == expected


def test_a_description_that_the_template_refuses_is_left_out(decoder, tiny_tokens, tmp_path):
    from iiet.exporting import fast_tokenizer

    fast = fast_tokenizer(
        tiny_tokens / "tokenizer.json", end_of_text="<|endoftext|>", context_length=CONTEXT
    )
    fast.chat_template = {"default": "{{ messages }}", "short": REFUSING}
    fast.save_pretrained(tmp_path)
    text = ModelTokenizer(tmp_path)
    messages: list[Message] = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1"},
    ]
    prompts = Prompts(chat_template="short")
    check_template(text, prompts)
    model = DecoderModel(decoder, text, prompts=prompts)
    assert model.apply_chat_template(messages) == "1 + 1/->"
    # An instruction of the user is never left out.
    instructed = prompts.model_copy(update={"system_instruction": "Add."})
    with refused(UserError, "no system role"):
        check_template(text, instructed)
