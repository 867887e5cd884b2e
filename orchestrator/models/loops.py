"""Looped models of other projects: what sets their depth, and what a token costs at each depth.

A class for each `model_type` reads depth and costs from the model's configuration, so a plan needs
neither weights nor code of the model. Each time a model is loaded, its class is checked against the
layers that run (`evaluation/looped.py`). Other packages add classes by entry points of the
group `iiet_orch.depth`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from iiet.extensions import ExtensionTable
from orchestrator.workspace.errors import UserError

Depth = tuple[int, ...]
"""Numbers of loops: one, or as many as the model has kinds of loops."""


class LoopedModel:
    """How a kind of looped model gets its depth, and what a token costs.

    Args:
        config: Content of the model's `config.json`.
    """

    settings: ClassVar[tuple[str, ...]]
    """Entries of the configuration that set the depth."""
    layers: ClassVar[tuple[str, ...]] = ("model.layers",)
    """Paths of the modules whose children are the layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config: Mapping[str, Any] = config.get("text_config") or config

    def number(self, *names: str) -> int:
        """Return the first present one of these entries of the configuration.

        Raises:
            UserError: If all are missing, or it is not a whole number.
        """
        value = next((self.config[name] for name in names if self.config.get(name)), None)
        if not isinstance(value, int):
            raise UserError(f"the model's config.json does not say {' or '.join(names)}")
        return value

    def parse(self, text: str) -> Depth:
        """Read a depth as typed: `4`, or as many numbers as there are settings, `2,3`.

        Raises:
            UserError: If the text is not a depth of this model.
        """
        parts = text.split(",")
        numbers = [int(part) for part in parts if part.strip().isdigit()]
        default = self.default_depth
        if len(numbers) != len(parts) or len(parts) not in (1, len(default)) or 0 in numbers:
            kind = self.config.get("model_type")
            names = " and ".join(self.settings)
            raise UserError(
                f"a depth of a {kind} model is {names}, each 1 or more, such as "
                f"{','.join(map(str, default))}; got {text!r}"
            )
        # One number sets the outer loops; the inner ones run as often as the configuration says.
        return (*numbers, *default[len(numbers) :])

    @property
    def default_depth(self) -> Depth:
        """The depth that the configuration has."""
        return tuple(self.number(name) for name in self.settings)

    def changes(self, depth: Depth) -> dict[str, Any]:
        """Return the changes of the configuration for a depth."""
        return dict(zip(self.settings, depth, strict=True))

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""
        return self.number("num_hidden_layers")

    def layer_runs(self, depth: Depth) -> int:
        """Return how many layers a token passes."""
        return self.num_layers * depth[0]

    def kv_numbers(self, depth: Depth) -> int:
        """Return how many numbers a token adds to the cache; each run has its own slot."""
        return self.layer_runs(depth) * 2 * self.kv_width()

    def kv_width(self, prefix: str = "") -> int:
        """Return the numbers of a token's keys in one slot, where entries have this prefix."""
        # `n_heads` and `n_embd` are Huginn's names.
        heads = self.number(f"{prefix}num_attention_heads", "n_heads")
        kv_heads = self.config.get(f"{prefix}num_key_value_heads") or heads
        head_dim = (
            self.config.get(f"{prefix}head_dim") or self.number("hidden_size", "n_embd") // heads
        )
        return int(kv_heads * head_dim)

    @property
    def starts_at_random(self) -> bool:
        """Whether the loops start from a random state."""
        return False

    def loop_end(self) -> str:
        """Return the path of the module whose calls end the loops."""
        return f"{self.layers[0]}.{self.num_layers - 1}"


class Ouro(LoopedModel):
    """The stack of layers runs `total_ut_steps` times.

    Source: Zhu et al. 2025 (Ouro).
    """

    settings = ("total_ut_steps",)


class Nanbeige(LoopedModel):
    """The stack of layers runs `num_loops` times."""

    settings = ("num_loops",)


class Huginn(LoopedModel):
    """Prelude, a core that runs `mean_recurrence` times, coda; the core's state starts at random.

    Source: Geiping et al. 2025 (Huginn); models that were retrofitted with its code.
    """

    settings = ("mean_recurrence",)
    layers = ("transformer.prelude", "transformer.core_block", "transformer.coda")

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Layers of the prelude, the core and the coda."""
        return (
            self.number("n_layers_in_prelude"),
            self.number("n_layers_in_recurrent_block"),
            self.number("n_layers_in_coda"),
        )

    @property
    def num_layers(self) -> int:
        return sum(self._parts)

    def layer_runs(self, depth: Depth) -> int:
        prelude, core, coda = self._parts
        return prelude + core * depth[0] + coda

    @property
    def starts_at_random(self) -> bool:
        return self.config.get("state_init") != "zero"

    def loop_end(self) -> str:
        return f"transformer.core_block.{self._parts[1] - 1}"


class HrmText(LoopedModel):
    """Two stacks: in each of `H_cycles`, the low one runs `L_cycles` times, the high one once.

    Source: transformers, `hrm_text`; Wang et al. 2025 (hierarchical reasoning model).
    """

    settings = ("H_cycles", "L_cycles")
    layers = ("model.L_module.layers", "model.H_module.layers")

    @property
    def _per_stack(self) -> int:
        # Before transformers has read the file, another entry may have the number.
        return self.number("num_layers_per_stack", "num_hidden_layers")

    @property
    def num_layers(self) -> int:
        return 2 * self._per_stack

    def layer_runs(self, depth: Depth) -> int:
        high, low = depth
        return self._per_stack * high * (low + 1)

    def changes(self, depth: Depth) -> dict[str, Any]:
        # Its cache has as many layers as run.
        stacks = {
            "num_layers_per_stack": self._per_stack,
            "num_hidden_layers": self.layer_runs(depth),
        }
        return super().changes(depth) | stacks

    def loop_end(self) -> str:
        return "model.H_module"


class Inkling(LoopedModel):
    """Layers from start to end run `loop_num_passes` times, each time from the state before them.

    Layers that attend to a window have other numbers of heads than those that see all.
    Source: transformers, `inkling2_loop`.
    """

    settings = ("loop_num_passes",)

    def _runs(self, depth: Depth) -> Iterator[int]:
        """Yield the index of each layer that a token passes, as often as it passes it."""
        start = self.number("loop_layer_index_start")
        end = self.number("loop_layer_index_end")
        yield from range(self.num_layers)
        for _ in range(depth[0] - 1):
            yield from range(start, end)

    def layer_runs(self, depth: Depth) -> int:
        return len([*self._runs(depth)])

    def kv_numbers(self, depth: Depth) -> int:
        # Without the entry, every sixth layer sees all, as in transformers.
        kinds = self.config.get("layer_types") or [
            "hybrid" if layer % 6 == 5 else "hybrid_sliding" for layer in range(self.num_layers)
        ]
        width = {"hybrid": self.kv_width(), "hybrid_sliding": self.kv_width("swa_")}
        return sum(2 * width[kinds[layer]] for layer in self._runs(depth))

    def loop_end(self) -> str:
        return f"model.layers.{self.number('loop_layer_index_end') - 1}"


LOOPED_MODELS: ExtensionTable[type[LoopedModel]] = ExtensionTable(
    "iiet_orch.depth",
    "looped model",
    {
        "ouro": Ouro,
        "nanbeige": Nanbeige,
        "huginn_raven": Huginn,
        "hrm_text": HrmText,
        "inkling2_loop": Inkling,
        "inkling2_loop_text": Inkling,
    },
    "orchestrator.models.loops.LoopedModel",
)
"""Classes by the `model_type` of transformers; other packages add some by entry points."""
