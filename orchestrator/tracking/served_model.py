"""The loader of a registered model: texts in; continuations or log-probabilities out.

This file is copied into the folder of each registered model, where `mlflow.pyfunc.load_model`
imports it. So it may import MLflow, pandas, torch and transformers, but nothing from this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARAMS: Mapping[str, int | float | str] = {
    "output": "text",
    "max_new_tokens": 64,
    "temperature": 0.0,
    "schedule": "",
    "draft": "",
}
"""Parameters of `TextModel.predict` with their defaults."""
SCHEDULE_PARAMS = ("schedule", "draft")
"""Those that only models with corrections take."""
OUTPUTS = {"text": "string", "logprob": "double"}
"""Values of the parameter `output`, each the name of the returned column, with its type."""


class TextModel:
    """Reads texts one by one: without padding, no text changes another one's result."""

    def __init__(self, folder: str) -> None:
        """Load model and tokenizer; this runs the model's code in the folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        self.model: Any = model.eval()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return a table with a row for each text.

        Args:
            model_input: A table with one column of texts, or a list of texts.
            params: `output` is `text` for a column `text` with continuations, or `logprob` for a
                column `logprob` with the natural logarithm of the probability of each text, from
                its first token on, as the beginning of a document. Continuations have at most
                `max_new_tokens` tokens, limited by the context length; `temperature` 0 always
                takes the most likely token. Where the model makes corrections, `schedule` is the
                iteration schedule instead of the model's own, `"2,1,0"` or one number for all
                layers, and `draft` a cheaper one that
                proposes tokens; it changes the speed of continuations only.

        Raises:
            MlflowException: If a parameter cannot be served, or a text is too long for `logprob`.
        """
        import pandas
        from mlflow.exceptions import MlflowException

        is_table = hasattr(model_input, "iloc")
        texts = model_input.iloc[:, 0].tolist() if is_table else list(model_input)
        settings = {**PARAMS, **(params or {})}
        try:
            _check(settings)
            read = self._continue if settings["output"] == "text" else self._logprob
            rows = [read(str(text), settings) for text in texts]
        except ValueError as error:  # MLflow's server shows only its own errors.
            raise MlflowException.invalid_parameter_value(str(error)) from error
        column = settings["output"]
        kind = "object" if column == "text" else "float64"
        return pandas.DataFrame({column: pandas.Series(rows, dtype=kind)})

    def _continue(self, prompt: str, settings: Mapping[str, Any]) -> str:
        import torch

        context, wanted = self.model.config.max_position_embeddings, settings["max_new_tokens"]
        ids = self._ids(prompt) or [self._first_token()]
        # A prompt that is too long loses its first tokens, but keeps at least half a context.
        ids = ids[-max(context - wanted, (context + 1) // 2) :]
        temperature = settings["temperature"]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        if settings["draft"]:
            sampling["assistant_model"] = self.model.with_schedule(_counts(settings, "draft"))
        with torch.no_grad():
            output = self._under(settings).generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=min(wanted, context - len(ids)),
                pad_token_id=self.tokenizer.eos_token_id,
                **{"do_sample": False, **sampling},
            )
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def _logprob(self, text: str, settings: Mapping[str, Any]) -> float:
        import torch

        context, ids = self.model.config.max_position_embeddings, self._ids(text)
        first = self._first_token()
        if not ids or ids[0] != first:
            ids = [first, *ids]
        if len(ids) - 1 > context:
            raise ValueError(
                f"output='logprob' reads texts of at most {context} tokens, which is the model's "
                f"context; got one of {len(ids) - 1}"
            )
        if len(ids) == 1:
            return 0.0
        with torch.no_grad():
            logits = self._under(settings)(input_ids=torch.tensor([ids[:-1]])).logits[0]
        chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
        return float(chosen.sum())

    def _under(self, settings: Mapping[str, Any]) -> Any:
        """Return the model under the schedule of a request."""
        if not settings["schedule"]:
            return self.model
        return self.model.with_schedule(_counts(settings, "schedule"))

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self.tokenizer(text)["input_ids"])
        except Exception as error:  # The tokenizers library raises nothing more special.
            known = sorted(self.tokenizer.get_vocab(), key=self.tokenizer.get_vocab().get)
            raise ValueError(
                f"the model's vocabulary has no tokens for {text[:40]!r}; it has {len(known):,} "
                f"tokens, such as {', '.join(map(repr, known[1:4]))}"
            ) from error

    def _first_token(self) -> int:
        # The token before a document: of its own, or that which ends the document before it.
        tokenizer = self.tokenizer
        own = tokenizer.bos_token_id
        return int(tokenizer.eos_token_id if own is None else own)


def _check(settings: Mapping[str, Any]) -> None:
    if settings["output"] not in OUTPUTS:
        raise ValueError(f"output must be {' or '.join(OUTPUTS)}; got {settings['output']!r}")
    if settings["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {settings['max_new_tokens']}")
    if not settings["temperature"] >= 0:
        raise ValueError(f"temperature must be 0 or more; got {settings['temperature']}")
    if settings["draft"] and settings["output"] != "text":
        raise ValueError(f"draft={settings['draft']!r} proposes tokens, which output='text' needs")


def _counts(settings: Mapping[str, Any], name: str) -> int | list[int]:
    """Read "2" or "2,1,0", because a parameter of MLflow is no list."""
    try:
        counts = [int(part) for part in settings[name].split(",")]
    except ValueError:
        raise ValueError(
            f"{name} must be one number, or one for each layer (2,1,0); got {settings[name]!r}"
        ) from None
    return counts[0] if len(counts) == 1 else counts


# MLflow calls this function by its name.
def _load_pyfunc(data_path: str) -> TextModel:
    return TextModel(data_path)
