"""The pass contract and the pipeline: a pass is a frozen value, ``Program -> Program``, and states which stage it takes and gives."""

import difflib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import fx

from tpcompile.errors import StageError, TpcompileError, UsageError, first_line
from tpcompile.passes.verify import verify
from tpcompile.program import Program, Stage


@dataclass(frozen=True)
class GraphPass:
    """One rewriting step. Its fields are its options; it prints as ``name{option=value}``.

    ``masked``: it works on masked form only, and a program that gathers by itself passes through.
    """

    name: ClassVar[str]
    takes: ClassVar[Stage]
    gives: ClassVar[Stage]
    masked: ClassVar[bool] = False

    def run(self, program: Program) -> Program:
        """The rewritten program; the stage and the history are set by the caller."""
        raise StageError(f"pass {self.name} does not implement run", fix="define run(program) in the pass")

    def __call__(self, program: Program) -> Program:
        """Check the stage, run, and record the step."""
        if program.stage is not self.takes:
            raise StageError(
                f"{self.name} takes a {self.takes.name.lower()} program, this one is {program.stage.name.lower()}",
                fix="run the passes in the pipeline's order",
            )
        through = self.masked and program.gathered
        return replace(program if through else self.run(program), stage=self.gives, history=(*program.history, str(self)))

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        options = ",".join(f"{k}={v}" for k, v in changed.items())
        return f"{self.name}{{{options}}}" if options else self.name


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                stack.append(operand)
    return found


def share(program: Program) -> Program:
    """Compute equal expressions once, see `unite`; what a site names is then the one that is left."""
    draft = program.draft()
    gone = unite(draft.graph)
    return program.adopt(draft, refresh=not program.gathered, sites=program.renamed(gone)) if gone else program


def unite(graph: fx.Graph) -> dict[str, str]:
    """Compute equal expressions once: name of each that is gone -> name of the one that is left.

    Equal are ops of equal arguments, where 1, 1.0 and True differ, and 0.0 from -0.0.
    """
    first, found = dict[Any, fx.Node](), dict[str, str]()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        earlier = first.setdefault((node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items())))), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            found[node.name] = earlier.name
    return found


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


STEP = re.compile(r"(\w+)(?:\{([^{}]*=[^{}]*)\})?")
"""``name`` or ``name{option=value,...}``."""

Hook = Callable[[GraphPass, Program, Program, float], None]
"""Called after each pass with the pass, the program before and after, and the seconds it took."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run; construction checks that the stages chain.

    Attributes:
        passes: the steps.
    """

    passes: tuple[GraphPass, ...]

    def __post_init__(self) -> None:
        for before, after in zip(self.passes, self.passes[1:], strict=False):
            if before.gives is not after.takes:
                raise StageError(
                    f"{before.name} gives {before.gives.name.lower()}, {after.name} takes {after.takes.name.lower()}",
                    fix="reorder the passes",
                )

    def __call__(self, program: Program, hook: Hook | None = None) -> Program:
        """Run every pass, verifying the stage it promises after each.

        Raises:
            TpcompileError: from a pass, with ``during`` naming the pass and those before it, and ``report`` the candidates.
        """
        verify(program)
        for index, step in enumerate(self.passes):
            begin, before = time.perf_counter(), program
            try:
                program = step(program)
                verify(program)
            except TpcompileError as error:
                earlier = ", ".join(p.name for p in self.passes[:index])
                error.during = error.during or f"{step.name}" + (f", after {earlier}" if earlier else "")
                error.report = error.report or program.report
                raise
            except Exception as error:
                raise StageError(
                    f"pass {step.name} failed: {first_line(error)}",
                    fix="this is a bug: rerun with --dump-ir DIR and report the dump",
                ) from error
            if hook is not None:
                hook(step, before, program, time.perf_counter() - begin)
        return program

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str, known: Mapping[str, type[GraphPass]]) -> "Pipeline":
        """Read ``"canonicalize,recognise,mark{batch=ragged},place,compact,cleanup"`` back.

        Raises:
            UsageError: an unknown pass or option.
        """
        found = [STEP.fullmatch(step.strip()) for step in re.split(r",(?![^{]*})", text)]
        steps = [(match[1], dict(pair.split("=", 1) for pair in (match[2] or "").split(",") if pair)) for match in found if match]
        unknown = [name for name, _ in steps if name not in known]
        if unknown or not all(found):
            raise UsageError(f"unknown pass: {', '.join(unknown) or text}", fix=f"passes are {', '.join(known)}")
        try:
            return cls(tuple(known[name](**_typed(known[name], options)) for name, options in steps))
        except (TypeError, ValueError) as error:
            what = "unknown" if isinstance(error, TypeError) else "bad"
            raise UsageError(f"{what} option: {error}", fix="`tpcompile passes show NAME` lists the options of a pass") from error


def _typed(kind: type[GraphPass], options: Mapping[str, str]) -> dict[str, Any]:
    """Options of a pass from text, each of its default's type."""
    kinds: dict[str, Callable[[str], Any]] = {f.name: _truth if isinstance(f.default, bool) else type(f.default) for f in fields(kind)}
    return {name: kinds.get(name, str)(value) for name, value in options.items()}


def _truth(text: str) -> bool:
    """What ``str`` makes of a bool, back."""
    if text not in ("True", "False"):
        raise ValueError(f"{text} is neither True nor False")
    return text == "True"


class Dump:
    """A hook that writes ``00-captured.txt``, ``01-canonicalize.txt``, ... with a ``.diff`` against the step before, and ``rules.txt``.

    As a context it also puts a refusal, and what was tried until then, into ``rules.txt``.

    Args:
        folder: where to; created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot dump to {folder}: {error.strerror}", fix="give a folder that can be made") from error

    def __call__(self, step: GraphPass, before: Program, after: Program, seconds: float) -> None:
        """Write one step."""
        old, new = str(before), str(after)
        if self.step == 0:
            self._write("00-captured.txt", old)
        self.step += 1
        name = f"{self.step:02d}-{step.name}"
        self._write(f"{name}.txt", new)
        self._write(
            f"{name}.diff", "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "before", name, lineterm="", n=1))
        )
        self._write("rules.txt", "\n".join([*after.report, *(f"assumed: {a}" for a in after.assumptions)]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, TpcompileError):
            self._write("rules.txt", "\n".join([*error.report, f"{type(error).__name__}: {error}"]))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text + "\n", encoding="utf-8")
