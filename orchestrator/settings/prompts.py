"""How the items of a task become prompts, beyond what the task's file says."""

from __future__ import annotations

from orchestrator.settings.section import Section
from orchestrator.workspace.provenance import content_key


class Prompts(Section):
    """The form of an evaluation's prompts; part of the key of what is measured."""

    chat_template: bool | str = False
    """Whether the model's chat template writes them, or the name of one of its templates."""
    fewshot_as_multiturn: bool = True
    """Whether solved examples are turns of the chat, or parts of the user's one message."""
    system_instruction: str | None = None
    """Text before each prompt; the system's message if a chat template writes it."""

    @property
    def key(self) -> str:
        """Hash of the form."""
        return content_key(self.model_dump(mode="json"))

    @property
    def template_name(self) -> str | None:
        """Name of the wanted template; None for the model's default."""
        return self.chat_template if isinstance(self.chat_template, str) else None
