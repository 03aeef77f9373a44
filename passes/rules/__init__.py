"""The axis rules, as data. Importing this package registers them all; a plugin adds its own module of ``register`` calls."""

from tpcompile.passes.rules import contractions, equations, indexing, pointwise, positions, reductions, views
from tpcompile.passes.rules.base import RULES, Call, Held, Meta, Rule, bind, call_of, register, tensor_nodes

__all__ = ["RULES", "Call", "Held", "Meta", "Rule", "bind", "call_of", "register", "tensor_nodes"]

_BUILT_IN = (contractions, equations, indexing, pointwise, positions, reductions, views)
