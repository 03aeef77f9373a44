"""A Program: an executable graph at a known stage. The only module that touches ExportedProgram's internals.

Every stage runs in eager torch, so parity can be checked after any pass. Passes take a copy of the graph (``program.draft()``), change it,
and hand it back (``program.adopt(draft, ...)``); weights are shared between all stages.
"""

import copy
import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from tpcompile.axes import Placement, TokenSet
from tpcompile.errors import StageError, Where
from tpcompile.frames import user_frame
from tpcompile.ops import COMPACT, GATHERED
from tpcompile.rows import Rows
from tpcompile.spec import TensorSpec

TAPS = ("keep", "score", "index", "into")
"""What a site can be asked for, under ``<site>.<tap>``."""


class Stage(enum.IntEnum):
    """How far a program has come. Each stage has a verifier (``passes/verify.py``)."""

    CAPTURED = 0
    MARKED = 1
    PLACED = 2
    COMPACT = 3


@dataclass(frozen=True, slots=True)
class Site:
    """One place where tokens are dropped.

    Attributes:
        name: ``site0``, ``site1``, ... in program order; also the prefix of the engine's taps.
        node: name of the ``prune`` node (``compact`` node once compact).
        keep: name of the bool ``[B, N]`` node that decides.
        score: name of the float ``[B, N]`` node it came from, or empty.
        tokens: the token set born here.
        pinned: number of leading tokens that are stored even when dropped, because something reads their position.
        index: name of the node with the stored positions ``[B, K]``, once compact, or where the model gathers by itself.
        into: name of the int64 ``[B, N]`` node that says into which row of the site's storage each token merged, or empty.
        most: the largest number of rows the site can have to store, where the program shows one: then it stores as many, always.
        whole: every row that has to be stored is kept, in every run: position 0 never falls, and no other is pinned.
    """

    name: str
    node: str
    keep: str
    score: str
    tokens: TokenSet
    pinned: int = 0
    index: str = ""
    into: str = ""
    most: int | None = None
    whole: bool = False

    @property
    def taps(self) -> dict[str, str]:
        """What the site decides: tap (``keep``, ``score``, ``index``, ``into``) -> node, for those that it has."""
        return {kind: name for kind in TAPS if (name := getattr(self, kind))}

    @property
    def where(self) -> Where:
        """The user's line that drops the tokens."""
        return self.tokens.born


@dataclass(frozen=True, slots=True)
class Bound:
    """A softmax that hides dropped keys by a finite number: they vanish only as long as the logits do not spread as far.

    Attributes:
        logits: name of the softmax's input.
        dim: its dim over keys.
        batch: its dim over samples; None where there is one sample.
        queries: its dim over queries, where that is one of tokens too; else None.
        keep: name of the bool ``[B, N]`` node that says which keys live.
        limit: how far apart the living logits of a row may be.
        where: the softmax's place.
    """

    logits: str
    dim: int
    batch: int | None
    queries: int | None
    keep: str
    limit: float
    where: Where


@dataclass(frozen=True, slots=True)
class Trace:
    """One eager run: the outputs and what each site decided.

    Attributes:
        outputs: name -> tensor.
        keep: per site, bool ``[B, N_i]`` on the storage the site sees.
        score: per site, float ``[B, N_i]`` or None.
        index: per site, int64 ``[B, K_i]`` positions stored; None in masked form.
        into: per site, int64 ``[B, N_i]`` rows merged into; None where nothing merges.
    """

    outputs: dict[str, Tensor]
    keep: tuple[Tensor, ...]
    score: tuple[Tensor | None, ...]
    index: tuple[Tensor | None, ...]
    into: tuple[Tensor | None, ...] = ()

    @property
    def taps(self) -> dict[str, Tensor]:
        """The same by the names that an engine's taps have: ``site0.keep``."""
        found = {"keep": self.keep, "score": self.score, "index": self.index, "into": self.into}
        return {f"site{i}.{kind}": tap for kind, taps in found.items() for i, tap in enumerate(taps) if tap is not None}


@dataclass(frozen=True)
class Program:
    """An executable graph with what is known of its token axes.

    Attributes:
        exported: the graph, its weights and its signature.
        stage: how far it has come.
        inputs: what a call takes, in order.
        output_names: name of each output, in order.
        dims: dynamic dim name -> least and greatest size the program takes.
        sites: the prune sites, in program order; empty before ``mark``.
        placements: node name -> the token sets of its dims; empty before ``place``.
        assumptions: what the proof takes for granted, one sentence each.
        bounds: those of them that ``validate`` measures.
        bits: placeholders of inputs ``[B, N]`` that the proof takes to hold 0 and 1, and 1 at position 0.
        history: the passes that ran, as they print.
        report: per pass, lines on what was done and refused, and why.
    """

    exported: ExportedProgram
    stage: Stage
    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    placements: Mapping[str, Placement] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    bounds: tuple[Bound, ...] = ()
    bits: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()
    report: tuple[str, ...] = ()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run in eager torch; inputs and outputs by name."""
        return self.trace(**inputs).outputs

    def trace(self, **inputs: Tensor | np.ndarray) -> Trace:
        """Run in eager torch, on tensors or arrays, and return what each site decided beside the outputs.

        Raises:
            TypeError: an input is missing or unknown.
        """
        values, seen = self._run(inputs, [name for site in self.sites for name in site.taps.values()])

        def pick(attribute: str) -> tuple[Any, ...]:
            return tuple(seen.get(getattr(site, attribute)) for site in self.sites)

        return Trace(values, pick("keep"), pick("score"), pick("index"), pick("into"))

    def values(self, nodes: Collection[str], **inputs: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Run in eager torch and return the values of these nodes, by name.

        Raises:
            TypeError: an input is missing or unknown.
        """
        return self._run(inputs, nodes)[1]

    def _run(self, inputs: Mapping[str, Tensor | np.ndarray], watched: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The outputs by name, and the values of some nodes."""
        names = [spec.name for spec in self.inputs]
        if set(inputs) != set(names):
            raise TypeError(f"inputs are {', '.join(names)}; got {', '.join(inputs) or 'none'}")
        runner = _Runner(self.exported.graph_module, frozenset(watched))
        with torch.no_grad():
            values = runner.run(*self._flat([_tensor(inputs[name]) for name in names]))
        return dict(zip(self.output_names, values, strict=True)), runner.seen

    def _flat(self, user: list[Tensor]) -> list[Any]:
        given = iter(user)
        return [
            self.constant(spec) if spec.kind is not InputKind.USER_INPUT else next(given)
            for spec in self.exported.graph_signature.input_specs
        ]

    def constant(self, spec: Any) -> Tensor:
        """The weight or buffer behind one non-user input of the signature."""
        state, constants = self.exported.state_dict, self.exported.constants
        value = state[spec.target] if spec.target in state else constants[spec.target]
        assert isinstance(value, Tensor)
        return value.detach()

    def constants(self) -> dict[str, Tensor]:
        """Placeholder name -> the weight or buffer it stands for."""
        specs = self.exported.graph_signature.input_specs
        return {s.arg.name: self.constant(s) for s in specs if s.kind is not InputKind.USER_INPUT and hasattr(s.arg, "name")}

    def placeholders(self) -> dict[str, str]:
        """Placeholder name -> the input that it stands for."""
        users = [s.arg.name for s in self.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        return dict(zip(users, (spec.name for spec in self.inputs), strict=True))

    def example(self) -> dict[str, Tensor]:
        """The inputs that the program was traced with, by name."""
        leaves = pytree.tree_leaves(self.exported.example_inputs)
        return dict(zip((spec.name for spec in self.inputs), leaves, strict=True))

    @property
    def gathered(self) -> bool:
        """The model gathers by itself (``ops.gathered``): nothing is to be proved, and the program passes through as it is."""
        return any(True for _ in self.graph.find_nodes(op="call_function", target=GATHERED))

    @property
    def rows(self) -> tuple[Rows, ...]:
        """How many rows each site stores, once compact; empty before."""
        names = ("x", "keep", "pinned", "score", "ladder", "limit", "exact")
        given = [dict(zip(names, node.args, strict=False)) for node in self.graph.find_nodes(op="call_function", target=COMPACT)]
        return tuple(Rows(tuple(one.get("ladder") or ()), one.get("limit", 0), one.get("exact", False)) for one in given)

    @property
    def graph(self) -> fx.Graph:
        """The graph; read it, do not change it."""
        graph: fx.Graph = self.exported.graph
        return graph

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            StageError: no such node.
        """
        found: fx.Node | None = next((n for n in self.graph.nodes if n.name == name), None)
        if found is not None:
            return found
        raise StageError(f"no node {name!r} in the graph", fix="this is a bug: rerun with --dump-ir DIR and report the dump")

    def renamed(self, names: Mapping[str, str]) -> tuple[Site, ...]:
        """The sites, where nodes go by other names: old name -> new name."""
        return tuple(
            replace(site, **{kind: names.get(name, name) for kind, name in site.taps.items()})  # type: ignore[arg-type]  # all are text
            for site in self.sites
        )

    def draft(self) -> fx.GraphModule:
        """A copy of the graph that a pass may change."""
        draft: fx.GraphModule = copy.deepcopy(self.exported.graph_module)
        return draft

    def adopt(self, draft: fx.GraphModule, *, refresh: bool = True, **changes: Any) -> "Program":
        """A new Program around a changed graph: dead nodes go (never what a site decides), metadata is computed again, weights are shared.

        Args:
            draft: a graph from ``draft()``, changed.
            refresh: compute the metadata; without, every new node must have its own.
            changes: other fields of the Program to replace.
        """
        decided = {n for site in changes.get("sites", self.sites) for n in site.taps.values()}
        draft.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or n.name in decided)
        draft.graph.lint()
        draft.recompile()
        if refresh:
            _refresh(draft)
        return replace(self, exported=_rebuild(self.exported, draft), **changes)

    def __str__(self) -> str:
        from tpcompile.text import render  # the text form reads Programs: a cycle of types only

        return render(self)


class _Runner(fx.Interpreter):
    """Runs a graph and keeps the values of a few nodes."""

    def __init__(self, module: fx.GraphModule, watched: frozenset[str]) -> None:
        super().__init__(module)
        self.watched, self.seen = watched, dict[str, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watched:
            self.seen[n.name] = value
        return value


def _refresh(module: fx.GraphModule) -> None:
    """Recompute ``meta["val"]`` of every node by fake propagation; unbacked sizes of dropped nodes go with them."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)
    assert mode is not None
    assert mode.shape_env is not None
    with mode, mode.shape_env.ignore_fresh_unbacked_symbols(), torch.no_grad():
        _Refresher(module).run(*values)
    forget_symbols(module.graph)


def forget_symbols(graph: fx.Graph) -> None:
    """Forget the sizes that an earlier trace over a graph's environment made and left behind: the next trace would look for them."""
    mode = detect_fake_mode([node.meta["val"] for node in graph.nodes if node.op == "placeholder"])
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.pending_fresh_unbacked_symbols.clear()


class _Refresher(fx.Interpreter):
    """Writes each node's fake value back as its metadata. Where op and operands are those of the last time, nothing is computed."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            value = super().run_node(n)
            if n.op != "output":
                n.meta["val"] = value
            return value
        leaves, form = pytree.tree_flatten(self.fetch_args_kwargs_from_env(n))
        *known, operands = n.meta.get("made_from", (None, None, ()))
        old = n.meta.get("val")
        if known != [n.target, form] or not all(a is b or _same_number(a, b) for a, b in zip(operands, leaves, strict=True)):
            value = super().run_node(n)
            n.meta["val"] = old if _same_value(old, value) else value
            n.meta["made_from"] = (n.target, form, leaves)
        return n.meta["val"]


def _same_number(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (int, float, str)) and a == b and repr(a) == repr(b)


def _same_value(a: Any, b: Any) -> bool:
    """Whether a fake value says what another says: the readers of the old one need not be computed again."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    if not (isinstance(a, FakeTensor) and isinstance(b, FakeTensor) and a.fake_mode is b.fake_mode and a.dim() == b.dim()):
        return False
    sizes = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()), strict=True)
    return (a.dtype, a.device) == (b.dtype, b.device) and all(_same_number(x, y) or _same_value(x, y) for x, y in sizes)


def _rebuild(old: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """The same program around another graph; the signature's output names follow the graph's output node."""
    signature = copy.copy(old.graph_signature)
    results = module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    known = dict(enumerate(signature.output_specs))
    signature.output_specs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=r.name), None) if isinstance(r, fx.Node) else known[i]
        for i, r in enumerate(results)
    ]
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=old.state_dict,
        range_constraints=old.range_constraints,
        module_call_graph=_calls(old, len(results)),
        example_inputs=old.example_inputs,
        constants=old.constants,
        verifiers=old.verifiers,
    )


def _calls(old: ExportedProgram, outputs: int) -> list[Any]:
    """The call graph with a flat tuple of outputs, where their number changed."""
    calls = list(old.module_call_graph)
    root = calls[0]
    if root.signature is not None and root.signature.out_spec.num_leaves != outputs:
        flat = pytree.tree_structure(tuple(range(outputs)))
        calls[0] = replace(root, signature=replace(root.signature, out_spec=flat))
    return calls


def where_of(node: fx.Node) -> Where:
    """The user's line and module path of a node: the innermost frame outside libraries, and the deepest module."""
    modules = node.meta.get("nn_module_stack") or {}
    module = ""
    for path, _ in modules.values():
        module = path.removeprefix("captured").removeprefix(".") or module  # the name under which capture holds the model
    return user_frame(node.meta.get("stack_trace") or "", module)


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
