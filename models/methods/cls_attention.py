"""The attention of the CLS token as the score, with thresholds: how many tokens stay depends on the input.

The score is that of EViT (arXiv 2202.07800), which keeps a fixed number; here a token stays when the mean over heads of the
attention that the CLS query pays it reaches the layer's threshold. The prefix (CLS, distillation, registers) never falls.
"""

from typing import ClassVar

from torch import Tensor

from tpcompile.models.families import Parts
from tpcompile.models.methods.demands import check_cls
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.threshold import Score, ThresholdMethod, ThresholdParameters


class ClsAttention(ThresholdMethod):
    """CLS attention over all blocks of a model."""

    name: ClassVar[str] = "cls-attention"
    Parameters = ThresholdParameters
    dials = (Dial("thresholds", most=1.0),)

    def __init__(self, parts: Parts, parameters: ThresholdParameters) -> None:
        check_cls(self.name, parts)
        super().__init__(parts, parameters, parameters.thresholds, parts.prefix)

    def score(self, x: Tensor, alive: Tensor) -> Score:
        """The attention that the first token's query pays a token: mean over heads."""
        return lambda attention: attention.select(2, 0).mean(dim=1)
