"""What our model classes of lm-eval share: chat templates, progress, answers stored before."""

from __future__ import annotations

from typing import Any

from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.models.tokenizer import Message, ModelTokenizer
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


class ChatModel:
    """What lm-eval asks of a model class to write prompts with the model's chat template.

    `journal` has the answers to the current task that were given before an interruption.
    """

    text: ModelTokenizer
    prompts = Prompts()
    progress = Progress()
    journal = AnswerJournal()
    _noted = False

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's key of stored requests, which are not used here."""
        return ""

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the model's template writes them.

        Some templates refuse messages of the system. As in lm-eval, a task's description is then
        left out; an instruction of the user is not.

        Raises:
            UserError: If the model has no such template, or it fails.
        """
        options: dict[str, Any] = {
            "opens_answer": add_generation_prompt,
            "template": self.prompts.template_name,
        }
        try:
            return self.text.chat(chat_history, **options)
        except UserError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history) or self.prompts.system_instruction is not None:
                raise
            text = self.text.chat(others, **options)
            if not self._noted:
                self.progress.note(f"the description of the task is left out: {error}")
                self._noted = True
            return text
