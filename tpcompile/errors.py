"""Every error tpcompile raises on purpose, as one tree.

::

    TpcompileError                      1   internal
    ├── UsageError                      2   wrong argument, unknown name, existing output
    │   └── InputError                  2   an input the engine cannot take: empty, too long, wrong dtype
    ├── EnvironmentFault                3   missing package, full disk, wrong version
    │   └── BackendUnavailable          3   a backend's runtime cannot be imported
    ├── ModelError                      4   the model's files are corrupt or hold NaN
    ├── CaptureError                    4   torch.export could not trace the model
    ├── MarkError                       4   a prune site is not formed as the compiler needs it
    ├── AxisError                       4   token axes could not be followed, or not proved
    │   ├── UnknownOp                       no axis rule
    │   ├── RigidAxis                       a position or a count is read on a pruned axis
    │   ├── UnmaskedFold                    a fold reads dropped tokens
    │   ├── RevivedToken                    a dropped token could come back
    │   ├── TokenMismatch                   two unrelated token axes meet
    │   └── NotDeterministic                a random op, or a buffer that changes
    ├── StageError                      1   a verifier failed: a bug of ours
    ├── EmitError                       1   the compact program has no ONNX form
    ├── ParityError                     5   engine and masked reference differ
    ├── AccuracyError                   6   pruned is too far from dense on data
    ├── BuildFailed                     7   a backend refused the graph
    ├── TargetMissed                    8   an SLO or a speed-up was not met
    ├── IntegrityError                  9   a bundle's files do not match its manifest
    └── Inconclusive                   10   too noisy, or too few samples, for a verdict

Each class says in its docstring *cause*, *example* and *fix*; its ``exit_code`` is the exit code of the command line.
An error ends with the next step: pass ``fix``.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Where:
    """A place in the user's code.

    Attributes:
        file: path as Python reports it; empty when unknown.
        line: 1-based line, 0 when unknown.
        source: the text of that line, stripped.
        module: dotted module path inside the model, such as ``encoder.layer.3``.
        function: name of the function that holds the line.
    """

    file: str = ""
    line: int = 0
    source: str = ""
    module: str = ""
    function: str = ""

    def __str__(self) -> str:
        """``vit.py:88 in forward:  pos = keep.cumsum(1)   module blocks.3``, leaving out what is unknown."""
        if not self.file:
            return f"module {self.module}" if self.module else "(no user line)"
        text = self.short
        if self.function:
            text += f" in {self.function}"
        if self.source:
            text += f":  {self.source}"
        if self.module:
            text += f"   module {self.module}"
        return text

    @property
    def short(self) -> str:
        """``vit.py:88``: the file's own name and the line."""
        return f"{self.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{self.line}" if self.file else "?"


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message; its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class TpcompileError(Exception):
    """The root of every deliberate error.

    ``report`` holds a line per mask that was tried for a prune site, where the passes came as far before they refused.

    Cause: raised only through a subclass, or for a state that should be impossible.
    Example: ``except tpcompile.TpcompileError as error: sys.exit(error.exit_code)``.
    Fix: read the last line of the message; it is the next step.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        fix: str = "",
        where: Where | None = None,
        node: str = "",
        during: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.where = where
        self.node = node
        self.during = during
        self.report: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The message, then one indented line each for *at*, *node*, *during* and *fix*, where known."""
        rows = [("at", str(self.where) if self.where else ""), ("node", self.node)]
        rows += [("during", self.during), ("fix", self.fix)]
        return "\n".join([self.message, *(f"  {name:<7} {text}" for name, text in rows if text)])


class UsageError(TpcompileError):
    """The call itself is wrong.

    Cause: an unknown method, parameter, target or option; a list of the wrong length; an output that exists.
    Example: ``tpcompile.models.prune(model, method="ltq")``.
    Fix: the message lists what is accepted.
    """

    exit_code = 2


class InputError(UsageError):
    """An input the engine cannot take.

    Cause: empty text, a sequence longer than the model's position table, a missing name, a wrong dtype or rank.
    Example: ``engine(input_ids=ids)`` without the ``attention_mask`` the model reads.
    Fix: compare with ``tpcompile inspect DIR``; truncate long texts.
    """


class EnvironmentFault(TpcompileError):
    """The machine cannot do it.

    Cause: a package is missing or too old, the disk is full, a folder cannot be written.
    Example: a bundle whose ``schema_version`` is that of a newer tpcompile.
    Fix: the message names the package with its install line, or the space needed; see ``tpcompile doctor``.
    """

    exit_code = 3


class BackendUnavailable(EnvironmentFault):
    """A backend's runtime cannot be used here.

    Cause: its Python package is missing, or its own probe failed.
    Example: ``tpcompile export openvino -m model -o out`` where openvino is not installed.
    Fix: install the extra the message names, such as ``pip install 'tpcompile[openvino]'``.
    """


class ModelError(TpcompileError):
    """The model's files cannot be used.

    Cause: a truncated or corrupt file, NaN or infinite weights, an architecture no family names, a pickle.
    Example: ``tpcompile export onnx -m model --method ltp -o out`` where the model's weights hold NaN.
    Fix: download or save the model again (safetensors); `docs/add-a-method.md` says how to name a new family's parts.
    """

    exit_code = 4


class CaptureError(TpcompileError):
    """``torch.export`` could not trace the model.

    Cause: Python control flow on tensor values, a dynamic size used as a constant, an example input that does not fit, an op without
    a fake kernel.
    Example: ``if scores.mean() > 0.5:`` in a forward.
    Fix: write the branch with ``torch.where``, sizes with ``x.shape``; ``-v`` shows torch's own error below ours.
    """

    exit_code = 4


class MarkError(TpcompileError):
    """A prune site is not formed as the compiler needs it.

    Cause: no ``tpcompile::prune`` in the captured graph, a keep mask that is not bool ``[B, N]``, hidden states that are not ``[B, N, C]``.
    Example: ``ops.prune(x, keep.float())``.
    Fix: pass hidden states ``[B, N, C]`` and a bool keep mask ``[B, N]`` of the same token axis.
    """

    exit_code = 4


class AxisError(TpcompileError):
    """A token axis could not be followed, or a step on it could not be proved.

    Cause: see the subclasses; each is one of the soundness conditions.
    Example: a sum over tokens that no mask covers.
    Fix: mask before the fold, or keep the tokens it reads.
    """

    exit_code = 4


class UnknownOp(AxisError):
    """No axis rule for this op, and one of its inputs runs over tokens.

    Cause: an op the compiler has never met, on a token axis.
    Example: ``torch.fft.rfft(x, dim=1)`` on hidden states.
    Fix: add a rule with its sample (docs/add-an-op.md), or move the op off the token axis.
    """


class RigidAxis(AxisError):
    """An op reads a position or a count on a pruned token axis, and the position cannot be pinned.

    Cause: ``x[:, -1]``, ``cumsum``, a convolution or a LayerNorm over tokens after a prune site; a token-level output.
    Example: ``x.cumsum(1)`` of hidden states behind a site.
    Fix: read position 0 (it can be pinned), compute before the first site, or pool with the keep mask.
    """


class UnmaskedFold(AxisError):
    """A fold over tokens reads values that dropped tokens still hold.

    Cause: a sum, mean, max, softmax or matmul over a pruned token axis without a mask that is neutral there.
    Example: ``x.mean(1)`` after pruning: the masked model averages dropped tokens too, a gathered engine cannot.
    Fix: multiply by the keep mask (sum), or fill with -inf or -1e4 (softmax, max) before the fold.
    """


class RevivedToken(AxisError):
    """A token dropped at one site could be kept by a later one.

    Cause: a keep mask that is not contained in the earlier one.
    Example: ``keep2 = score2 > t`` where dropped tokens still get a score.
    Fix: write ``keep2 = keep1 & (score2 > t)``, or make the score of a dropped token fail the comparison.
    """


class TokenMismatch(AxisError):
    """Two unrelated token axes meet in one op.

    Cause: tensors over two different sequences are combined along the same axis, or two sites prune the same tokens apart.
    Example: ``ops.prune(words, seen)`` beside ``ops.prune(patches, lit)`` in one model.
    Fix: give both the same sequence, or prune only one of them.
    """


class NotDeterministic(AxisError):
    """The program draws random numbers or changes a buffer.

    Cause: training mode, Gumbel noise, dropout kept on, running statistics.
    Example: ``F.gumbel_softmax(logits)`` in the forward of an eval model.
    Fix: call ``model.eval()``; replace sampling by its deterministic form.
    """


class StageError(TpcompileError):
    """A stage's verifier failed.

    Cause: a bug in tpcompile: a pass broke what it promised.
    Example: a ``prune`` node left after ``compact``.
    Fix: rerun with ``--dump-ir DIR`` and report the dump.
    """


class EmitError(TpcompileError):
    """The compact program could not be written as ONNX.

    Cause: an op that torch.onnx cannot translate, or a graph that fails the ONNX checker.
    Example: a ``torch.library.custom_op`` of the model's own, which ONNX has no word for.
    Fix: write that line with torch's own ops, or keep the op out of the model.
    """


class ParityError(TpcompileError):
    """The engine and the masked reference differ by more than the law allows.

    Cause: reduced precision, a runtime's fast math, or a miscompilation.
    Example: ``tpcompile verify out`` with another runtime than it was exported with; ``tpcompile validate out --atol 1e-7``.
    Fix: look at the worst sample in reports/validate.json; in float32 please report it with the bundle.
    """

    exit_code = 5


class AccuracyError(TpcompileError):
    """The pruned model is further from the dense one than allowed.

    Cause: thresholds that drop too much for this data.
    Example: ``tpcompile validate out --min-agreement 1``.
    Fix: lower the thresholds, or learn them on the task.
    """

    exit_code = 6


class BuildFailed(TpcompileError):
    """A backend refused the graph.

    Cause: an op or a shape the runtime's compiler does not take.
    Example: a ``model.onnx`` that was cut short while it was copied.
    Fix: the message ends with the runtime's own; export again, or try another target.
    """

    exit_code = 7


class TargetMissed(TpcompileError):
    """A latency target was measured and missed.

    Cause: ``--slo`` or ``--min-speedup`` asks for more than this machine gave.
    Example: ``tpcompile bench out --slo p50<=1us``.
    Fix: see the table: cold or warm, which lengths; prune more, or relax the target.
    """

    exit_code = 8


class IntegrityError(TpcompileError):
    """A bundle is not what its manifest says.

    Cause: a file is missing, truncated, changed, or lies outside the bundle.
    Example: ``model.onnx`` was edited after export.
    Fix: export again; never edit a bundle in place.
    """

    exit_code = 9


class Inconclusive(TpcompileError):
    """The measurement cannot support a verdict.

    Cause: too few samples, or too much noise on the machine.
    Example: ``tpcompile bench out --min-speedup 1.3 --samples 1``.
    Fix: more data, a quieter machine, or a lower confidence.
    """

    exit_code = 10
