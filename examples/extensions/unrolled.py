"""A kind of looped model of one's own."""

from orchestrator.models.loops import LoopedModel


class Unrolled(LoopedModel):
    """The first layer runs once, the others `num_unrolls` times."""

    settings = ("num_unrolls",)
    layers = ("model.layers",)  # Modules whose children are the layers.

    def layer_runs(self, depth):
        return 1 + depth[0] * (self.num_layers - 1)
