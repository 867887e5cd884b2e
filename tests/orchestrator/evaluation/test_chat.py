"""Chat templates for lm-eval's prompts: what a template refuses is left out, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.evaluation.harness.chat import ChatModel
from orchestrator.models.tokenizer import Message
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class NoSystem:
    """The tokenizer of a model whose template refuses messages of the system."""

    def chat(self, messages: Sequence[Message], *, opens_answer: bool, template: str | None) -> str:
        if any(message["role"] == "system" for message in messages):
            raise UserError("the system role is not supported")
        text = "/".join(message["content"] for message in messages)
        return f"{template}: {text}{' ->' if opens_answer else ''}"


def chat_model(**prompts: Any) -> ChatModel:
    model = ChatModel()
    model.text = NoSystem()  # type: ignore[assignment]
    model.prompts, model.progress = Prompts(chat_template="short", **prompts), Notes()
    return model


def test_a_description_that_the_template_refuses_is_left_out_with_one_note() -> None:
    model = chat_model()
    assert model.apply_chat_template(MESSAGES) == "short: 1 + 1 ->"
    assert model.apply_chat_template(MESSAGES, add_generation_prompt=False) == "short: 1 + 1"
    assert isinstance(model.progress, Notes)
    assert model.progress.notes == [
        "the description of the task is left out: the system role is not supported"
    ]


def test_an_instruction_of_the_user_is_never_left_out() -> None:
    with pytest.raises(UserError, match="the system role is not supported"):
        chat_model(system_instruction="Add.").apply_chat_template(MESSAGES)
