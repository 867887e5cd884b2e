"""The loader of a registered model: prompts in, continuations out.

This file is copied into the folder of each registered model, where `mlflow.pyfunc.load_model`
imports it. So it may import torch and transformers, but nothing from this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TextModel:
    """Continues prompts one by one: without padding, no prompt changes another one's result."""

    def __init__(self, folder: str) -> None:
        """Load model and tokenizer; this runs the model's code in the folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        self.model: Any = model.eval()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return the continuation of each prompt.

        Args:
            model_input: A table with one column of texts, or a list of texts.
            params: `max_new_tokens`, limited by the context length, and `temperature`, where 0
                always takes the most likely token.

        Raises:
            ValueError: If `max_new_tokens` is below 1.
        """
        settings = {"max_new_tokens": 64, "temperature": 0.0, **(params or {})}
        if settings["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {settings['max_new_tokens']}")
        is_table = hasattr(model_input, "iloc")
        prompts = model_input.iloc[:, 0].tolist() if is_table else list(model_input)
        return [self._continue(str(prompt), **settings) for prompt in prompts]

    def _continue(self, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
        import torch

        context = self.model.config.max_position_embeddings
        ids = self.tokenizer(prompt)["input_ids"] or [self.tokenizer.eos_token_id]
        # A prompt that is too long loses its first tokens, but keeps at least half a context.
        ids = ids[-max(context - max_new_tokens, (context + 1) // 2) :]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        with torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=min(max_new_tokens, context - len(ids)),
                pad_token_id=self.tokenizer.eos_token_id,
                **{"do_sample": False, **sampling},
            )
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


# MLflow calls this function by its name.
def _load_pyfunc(data_path: str) -> TextModel:
    return TextModel(data_path)
