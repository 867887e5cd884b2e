"""Lets MLflow load a registered model: text in, its continuation out.

This file is copied beside each registered model and imported from there by
`mlflow.pyfunc.load_model`. So it needs torch, transformers and what lies in the model's folder, and
nothing of this package. A row is one prompt; the answer has one text a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TextModel:
    """Continues texts, one after the other: no padding, so no row changes another one's answer."""

    def __init__(self, folder: str) -> None:
        """Load model and tokenizer, with the model's code that lies in the folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        self.model: Any = model.eval()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return the continuation of each prompt.

        Args:
            model_input: A table with one column of texts, or a list of texts.
            params: `max_new_tokens`, which the context limits, and `temperature`, where 0 takes
                the likeliest token.

        Raises:
            ValueError: If `max_new_tokens` is below 1.
        """
        settings = {"max_new_tokens": 64, "temperature": 0.0, **(params or {})}
        if settings["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {settings['max_new_tokens']}")
        table = hasattr(model_input, "iloc")
        prompts = model_input.iloc[:, 0].tolist() if table else list(model_input)
        return [self._continued(str(prompt), **settings) for prompt in prompts]

    def _continued(self, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
        import torch

        context = self.model.config.max_position_embeddings
        ids = self.tokenizer(prompt)["input_ids"] or [self.tokenizer.eos_token_id]
        # Of a prompt that is too long, the last tokens are used: at least half a context.
        ids = ids[-max(context - max_new_tokens, (context + 1) // 2) :]
        how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        with torch.no_grad():
            written = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=min(max_new_tokens, context - len(ids)),
                pad_token_id=self.tokenizer.eos_token_id,
                **{"do_sample": False, **how},
            )
        return str(self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))


def _load_pyfunc(data_path: str) -> TextModel:
    """Load the model; `mlflow.pyfunc.load_model` calls this."""
    return TextModel(data_path)
