"""An influence metric of one's own."""

from torch.nn import functional

from iiet.iiad.influence import Comparison


class Angle(Comparison):
    """The angle between two consecutive outputs of a layer, in radians."""

    def compare(self, before, after):
        """Compare outputs of a sequence, (time, dim) in float64; return (time,)."""
        cosine = functional.cosine_similarity(before, after, dim=-1)
        return cosine.clamp(-1, 1).arccos()
