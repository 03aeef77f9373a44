"""LTP, Learned Token Pruning (arXiv 2107.00910, KDD 2022), in its hard form with absolute thresholds.

In every layer a token is dropped when the attention it receives, averaged over heads and queries, lies below the layer's
threshold. In the paper's form nothing is protected: a fallen first token computes on, seen by nobody and seeing nobody, and is
still what a classifier reads.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tpcompile.models.families import Parts
from tpcompile.models.methods.threshold import Score, ThresholdMethod, ThresholdParameters


class LtpParameters(ThresholdParameters):
    """Parameters of LTP.

    Attributes:
        n_ref: number of queries the score is averaged over. ``length``: the sample's own number of real tokens, so padding does
            not matter. ``padded``: the padded length of the run, the official form. A number: the padded length used in training.
        protect: ``none``: the paper's form. ``prefix``: the leading tokens that are no words or patches (CLS, distillation,
            registers) never fall.
    """

    n_ref: Annotated[int, Field(ge=1)] | Literal["length", "padded"] = "length"
    protect: Literal["none", "prefix"] = "none"


class Ltp(ThresholdMethod):
    """LTP over all blocks of a model."""

    name: ClassVar[str] = "ltp"
    Parameters = LtpParameters

    def __init__(self, parts: Parts, parameters: LtpParameters) -> None:
        super().__init__(parts, parameters, parts.prefix if parameters.protect == "prefix" else 0)
        self.n_ref = parameters.n_ref

    def score(self, x: Tensor, alive: Tensor) -> Score:
        """The attention a token receives: mean over heads and counted queries."""
        n_ref = self.counted(x, alive)
        return lambda attention: attention.sum(dim=(1, 2)) / (n_ref * attention.shape[1])

    def counted(self, x: Tensor, alive: Tensor) -> Tensor | int:
        """Number of queries the score is averaged over: a number, or float ``[B, 1]``."""
        if self.n_ref == "length":
            return alive.to(x.dtype).sum(dim=1, keepdim=True).clamp(min=1.0)
        return x.shape[1] if self.n_ref == "padded" else self.n_ref
