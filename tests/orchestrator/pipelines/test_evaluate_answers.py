"""`iiet-orch evaluate` of a task with generated answers: examples, chat templates, keys, errors."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval_tasks import logged_responses
from refusals import assert_names

from orchestrator import cli
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.models.open import open_model

DOCUMENTATION = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"
ROWS = [{"question": f"{a} and {b}?", "answer": a} for a, b in ("ab", "cd", "ef", "gh", "ij")]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT = "{{ messages[-1]['content'] }}"


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A task as a user writes it: a YAML file and two files of items."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for split, rows in (("test", ROWS[:3]), ("train", ROWS[3:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    config = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("test", "train")},
            "cache_dir": str(tmp_path / "arrow"),
        },
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}} A:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        "filter_list": [
            {"name": "strict-match", "filter": [{"function": "take_first"}]},
            {
                "name": "lowercase",
                "filter": [{"function": "lowercase"}, {"function": "take_first"}],
            },
        ],
        "metadata": {"version": 1.0},
    }
    (folder / "questions.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def llama(save_llama) -> Callable[..., Path]:
    """A function that saves a Llama with a chat template and room for examples."""
    return partial(save_llama, chat_template=TEMPLATE, max_position_embeddings=96)


def first_prompts(workspace: Path) -> dict[str, str]:
    """Return the first prompt of each stored evaluation, as lm-eval gave it to the model."""
    prompts = {}
    for samples in workspace.glob("evaluations/*/samples_*.jsonl"):
        sample = json.loads(samples.read_text().splitlines()[0])
        prompts[samples.parent.name] = sample["arguments"]["gen_args_0"]["arg_0"]
    return prompts


@pytest.fixture
def evaluate(tmp_path, tasks, capfd) -> Callable[..., tuple[int, str, list[Any]]]:
    def run(*arguments: Any) -> tuple[int, str, list[Any]]:
        """Return the exit code, what was printed, and all stored results."""
        command = ["evaluate", *map(str, arguments), "--suite", "questions"]
        code = cli.main([*command, "--include-path", str(tasks), "-w", str(tmp_path / "space")])
        printed = capfd.readouterr()
        store = EvaluationStore(tmp_path / "space" / "evaluations")
        stored = [
            (store.read(folder.name), logged_responses(folder)["questions"])
            for folder in sorted((tmp_path / "space" / "evaluations").glob("*"))
        ]
        return code, " ".join((printed.out + printed.err).split()), stored

    return run


@pytest.mark.slow
def test_all_that_shapes_a_prompt_is_in_the_key(llama, evaluate, tmp_path):
    folder = llama()
    chat = ("--apply-chat-template", "--num-fewshot", 1)
    forms = [
        (),
        ("--num-fewshot", 1),
        ("--apply-chat-template",),
        chat,
        (*chat, "--set", "evaluation.fewshot_as_multiturn=false"),
        (*chat, "--set", "evaluation.system_instruction=Answer."),
        ("--set", "evaluation.system_instruction=Answer."),
        ("--set", "evaluation.fewshot_as_multiturn=false"),  # Without a template nothing changes.
    ]
    prompts: dict[str, str] = {}
    for form in forms:
        code, text, stored = evaluate(folder, *form)
        assert code == 0, text
        prompts |= first_prompts(tmp_path / "space")  # A new one comes last.
    assert len(stored) == len(forms) - 1
    assert list(prompts.values()) == [
        "Q: a and b? A:",
        "Q: g and h? A: g\n\nQ: a and b? A:",
        "<|user|>Q: a and b? A:\n<|assistant|>",
        "<|user|>Q: g and h? A:\n<|assistant|>g\n<|user|>Q: a and b? A:\n<|assistant|>",
        "<|user|>Q: g and h? A: g\n\nQ: a and b? A:\n<|assistant|>",
        "<|system|>Answer.\n<|user|>Q: g and h? A:\n<|assistant|>g\n"
        "<|user|>Q: a and b? A:\n<|assistant|>",
        "Answer.Q: a and b? A:",
    ]
    # Another template of the model is another evaluation.
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant", "bot"))
    assert len(evaluate(folder, "--apply-chat-template")[2]) == len(stored) + 1


def test_a_template_is_chosen_by_its_name_and_one_that_is_missing_measures_nothing(
    llama, evaluate, tmp_path
):
    folder = llama()
    plain = llama("plain")
    (plain / "chat_template.jinja").unlink()
    code, text, stored = evaluate(folder, plain, "--apply-chat-template")
    assert code == 2
    assert_names(text, "plain", "chat template")
    assert stored == []
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text(SHORT)
    assert evaluate(folder, "--chat-template", "short")[0] == 0
    assert list(first_prompts(tmp_path / "space").values()) == ["Q: a and b? A:"]
    code, text, _ = evaluate(folder, "--chat-template", "long")
    assert code == 2
    assert_names(text, "long", "default, short")


@pytest.mark.slow
def test_a_model_that_transformers_runs_answers_as_the_decoder(llama, evaluate):
    # Within the context, these rotary angles are the usual ones.
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    models = [llama(), llama("scaled", rope_parameters=scaled)]
    assert open_model(models[1]).config is None
    code, text, stored = evaluate(*models, "--apply-chat-template", "--num-fewshot", 2)
    assert code == 0, text
    assert len(stored) == 2
    (first, answers), (second, other_answers) = stored
    assert answers == other_answers
    assert first.metrics == second.metrics


@pytest.mark.slow
def test_the_task_of_the_documentation_runs(llama, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    (text,) = re.findall(r"```yaml\n(task: .*?)```", DOCUMENTATION.read_text(), flags=re.DOTALL)
    (command,) = re.findall(
        r"iiet-orch (evaluate tiny --suite capitals .*)", DOCUMENTATION.read_text()
    )
    Path("tasks").mkdir()
    Path("tasks/capitals.yaml").write_text(text)
    for name, country in (("capitals", "Chile"), ("examples", "Peru")):
        row = {"country": country, "city": "Lima"}
        Path(f"tasks/{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    arguments = shlex.split(command.replace("tiny", str(llama())))
    assert cli.main([*arguments, "-w", "space"]) == 0
    assert "exact_match *" in capfd.readouterr().out
    [prompt] = first_prompts(Path("space")).values()
    assert prompt.startswith("Q: What is the capital of Peru?\nA: Lima\n\n")
