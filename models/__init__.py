"""Models: families that name a library's parts, pruning methods written against them, and checkpoints read from disk."""

from tpcompile.models.families import SentenceEncoder, TokenEncoder
from tpcompile.models.methods import METHODS, Method, Pruned, Trace, prune
from tpcompile.models.sources import Source, load

__all__ = ["METHODS", "Method", "Pruned", "SentenceEncoder", "Source", "TokenEncoder", "Trace", "load", "prune"]
