"""Every class of error, provoked for real, with its complete text; test_error_texts.py runs them."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import tpcompile
from tpcompile import errors, ops
from tpcompile.cli import main
from tpcompile.errors import TpcompileError
from tpcompile.models import METHODS
from tpcompile.passes import Canonicalize, GraphPass, Mark, Pipeline, Place
from tpcompile.program import Program, Stage

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TpcompileError)]
THRESHOLDS = {"thresholds": [0.0, 0.04, 0.06]}
"""For the tiny BERT's three layers: a text of some 20 tokens loses a part at the second and third."""


@dataclass(frozen=True)
class Desk:
    """What a case may use: an empty folder, the tiny BERT's directory, and a copy of its bundle for ONNX Runtime."""

    folder: Path
    model: Path
    bundle: Path
    patch: pytest.MonkeyPatch

    def __call__(self, line: str) -> Result:
        """Run a command line as it stands in a docstring: ``model`` and ``out`` are paths here."""
        paths = {"model": self.model, "out": self.bundle, "texts.txt": self.folder / "texts.txt", "new": self.folder / "new"}
        words = [str(paths.get(word, word)) for word in line.split()]
        return CliRunner().invoke(main, words[1:])


Case = Callable[[Desk], object]
CASES: dict[type[TpcompileError], tuple[Case, str]] = {}
VERDICTS: dict[type[TpcompileError], tuple[Case, str]] = {}
"""Classes that end a gate with their exit code and a reason; nothing is raised."""
ABSTRACT = {errors.TpcompileError, errors.AxisError}
"""Raised through their subclasses only."""


def says(
    kind: type[TpcompileError], text: str, table: dict[type[TpcompileError], tuple[Case, str]] = CASES
) -> Callable[[Case], Case]:
    """Register a case with the text it must give: in it TMP is the case's folder, N a line of this file, n a symbol."""

    def register(case: Case) -> Case:
        table[kind] = case, text
        return case

    return register


def shown(text: str, desk: Desk) -> str:
    """A text without what changes from run to run."""
    text = text.replace(str(desk.folder), "TMP").replace(str(desk.bundle), "out")
    return re.sub(r"\bs\d+\b", "n", re.sub(r"(error_cases\.py):\d+", r"\1:N", text))


def lower(model: nn.Module, **inputs: Tensor) -> Program:
    """Compile a model over 12 tokens of 16 channels, their number dynamic."""
    given = inputs or {"x": torch.randn(1, 12, 16)}
    dims = {name: {1: f"{name}_n"} for name in given}
    return tpcompile.lower(model.eval(), given, dynamic=dims)


class Scored(nn.Module):
    """Drops the tokens whose score is not above 0; what is done behind the site is a subclass's ``rest``."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        keep = self.score(x).squeeze(-1) > 0.0
        return self.rest(ops.prune(x, keep), keep)

    def rest(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x * keep.unsqueeze(-1)).sum(1)


# --- the cases ----------------------------------------------------------------------------------------------------------------


@says(
    errors.UsageError,
    "unknown method 'ltq' (did you mean 'ltp'?)\n  fix     use one of: " + ", ".join(METHODS),
)
def unknown_method(desk: Desk) -> object:
    model = nn.Linear(2, 2).eval()
    return tpcompile.models.prune(model, method="ltq")


@says(
    errors.InputError,
    "missing input: attention_mask\n  fix     this engine takes exactly: input_ids, attention_mask",
)
def missing_input(desk: Desk) -> object:
    ids = np.ones((1, 4), dtype=np.int64)
    with tpcompile.load(desk.bundle) as engine:
        return engine(input_ids=ids)


@says(
    errors.EnvironmentFault,
    "TMP/out has schema version 2; this tpcompile reads 1\n  fix     pip install -U tpcompile",
)
def newer_bundle(desk: Desk) -> object:
    manifest = desk.bundle / "tpcompile.json"
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["schema_version"] = 2
    manifest.write_text(json.dumps(document), encoding="utf-8")
    return tpcompile.load(desk.bundle)


@says(
    errors.BackendUnavailable,
    "openvino cannot be used: import of openvino halted; None in sys.modules\n  fix     pip install 'tpcompile[openvino]'",
)
def no_openvino(desk: Desk) -> object:
    desk.patch.setitem(sys.modules, "openvino", None)
    return desk("tpcompile export openvino -m model -o out --force")


@says(
    errors.ModelError,
    "weight encoder.layer.1.output.dense.weight holds 1 NaN or infinite of 2048 values\n  fix     train or save the model again",
)
def not_a_number(desk: Desk) -> object:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(desk.model / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
    save_file(tensors, desk.model / "model.safetensors")
    return desk("tpcompile export onnx -m model --method ltp -o out --force")


@says(
    errors.CaptureError,
    "torch.export could not trace Branch: Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)). "
    " (Size-like symbols: none)\n"
    "  at      error_cases.py:N in rest:  if scores.mean() > 0.5:\n"
    "  during  capture\n"
    "  fix     write it without a tensor's value in Python: torch.where for a branch, a mask for boolean indexing; -v "
    "shows torch's own error",
)
def branch(desk: Desk) -> object:
    class Branch(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            scores = self.score(x)
            if scores.mean() > 0.5:
                return x.sum(1)
            return x.mean(1)

    return lower(Branch())


@says(
    errors.MarkError,
    "prune takes hidden states [B, N, C] and a bool mask [B, N]; it got rank 3 and float32 rank 2\n"
    "  at      error_cases.py:N in forward:  return ops.prune(x, keep.float()).sum(1)\n"
    "  node    %prune: f32[1, n, 16] = tpcompile.prune.default(%inputs_x, %_to_copy)   # error_cases.py:N\n"
    "  during  mark, after canonicalize, recognise\n"
    "  fix     reshape the hidden states to [B, N, C] and pass the keep mask as bool [B, N]",
)
def float_mask(desk: Desk) -> object:
    class FloatMask(Scored):
        def forward(self, x: Tensor) -> Tensor:
            keep = self.score(x).squeeze(-1) > 0.0
            return ops.prune(x, keep.float()).sum(1)

    return lower(FloatMask())


@says(
    errors.UnknownOp,
    "no axis rule for aten.fft_rfft.default, and its input runs over pruned tokens\n"
    "  at      error_cases.py:N in rest:  return torch.fft.rfft(x, dim=1).abs().sum(1)\n"
    "  node    %fft_rfft: torch.complex64[1, ((n//2))+1, 16] = aten.fft_rfft.default(%prune, None, 1)   # error_cases.py:N\n"
    "  during  place, after canonicalize, recognise, mark\n"
    "  fix     add a rule with its sample (docs/add-an-op.md), or move the op before the first site",
)
def transform(desk: Desk) -> object:
    class Transform(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            return torch.fft.rfft(x, dim=1).abs().sum(1)

    return lower(Transform())


@says(
    errors.RigidAxis,
    "aten.cumsum.default reads positions or the count of tokens, and t1 has lost some\n"
    "  at      error_cases.py:N in rest:  x = x.cumsum(1)\n"
    "  node    %cumsum: f32[1, n, 16] = aten.cumsum.default(%prune, 1)   # error_cases.py:N\n"
    "  during  place, after canonicalize, recognise, mark\n"
    "  fix     compute it before the first site, read position 0, or pool with the keep mask",
)
def positions(desk: Desk) -> object:
    class Positions(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            x = x.cumsum(1)
            return (x * keep.unsqueeze(-1)).sum(1)

    return lower(Positions())


@says(
    errors.UnmaskedFold,
    "aten.sum.dim_IntList combines over tokens that site0 (error_cases.py:N) dropped, and nothing masks them there\n"
    "  at      error_cases.py:N in rest:  return x.mean(1)\n"
    "  node    %sum_dim_int_list: f32[1, 16] = aten.sum.dim_IntList(%prune, [1], False, dtype=torch.float32)   # "
    "error_cases.py:N\n"
    "  during  place, after canonicalize, recognise, mark\n"
    "  fix     multiply by the keep mask before a sum, or fill with -inf or -1e4 before a softmax or max; the masked "
    "model reads dropped tokens here",
)
def mean(desk: Desk) -> object:
    class Mean(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            return x.mean(1)

    return lower(Mean())


@says(
    errors.RevivedToken,
    "a token dropped at site0 (error_cases.py:N) could be kept here again\n"
    "  at      error_cases.py:N in rest:  return (ops.prune(x, keep2) * (keep & keep2).unsqueeze(-1)).sum(1)\n"
    "  node    %prune_1: f32[1, n, 16] = tpcompile.prune.default(%prune, %gt_1)   # error_cases.py:N\n"
    "  during  place, after canonicalize, recognise, mark\n"
    "  fix     write keep = earlier_keep & (score >= threshold)",
)
def revived(desk: Desk) -> object:
    class Revived(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            score2, t = self.score(x).squeeze(-1), 0.5
            keep2 = score2 > t
            return (ops.prune(x, keep2) * (keep & keep2).unsqueeze(-1)).sum(1)

    return lower(Revived())


@says(
    errors.TokenMismatch,
    "sites prune two unrelated token axes\n"
    "  at      error_cases.py:N in forward:  return first + (ops.prune(patches, lit) * lit.unsqueeze(-1)).sum(1)\n"
    "  node    %prune_1: f32[1, n, 16] = tpcompile.prune.default(%inputs_patches, %gt_1)   # error_cases.py:N\n"
    "  during  place, after canonicalize, recognise, mark\n"
    "  fix     prune one sequence per program; export the encoders apart",
)
def two_sequences(desk: Desk) -> object:
    class Both(Scored):
        def forward(self, words: Tensor, patches: Tensor) -> Tensor:
            seen, lit = self.score(words).squeeze(-1) > 0.0, self.score(patches).squeeze(-1) > 0.0
            first = (ops.prune(words, seen) * seen.unsqueeze(-1)).sum(1)
            return first + (ops.prune(patches, lit) * lit.unsqueeze(-1)).sum(1)

    return lower(Both(), words=torch.randn(1, 12, 16), patches=torch.randn(1, 9, 16))


@says(
    errors.NotDeterministic,
    "aten.exponential.default draws random numbers: masked and gathered runs would differ\n"
    "  at      error_cases.py:N in rest:  return super().rest(x * F.gumbel_softmax(logits), keep)\n"
    "  node    %exponential: f32[1, n, 1] = aten.exponential.default(%full_like_default)   # error_cases.py:N\n"
    "  during  canonicalize\n"
    "  fix     call model.eval(), or replace sampling by its deterministic form",
)
def gumbel(desk: Desk) -> object:
    class Gumbel(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            logits = self.score(x)
            return super().rest(x * F.gumbel_softmax(logits), keep)

    return lower(Gumbel())


@dataclass(frozen=True)
class Forgetful(GraphPass):
    """Says that it compacted, and did nothing."""

    name: ClassVar[str] = "forgetful"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.COMPACT

    def run(self, program: Program) -> Program:
        return program


@says(
    errors.StageError,
    "verifier of stage compact: a prune node is left\n"
    "  at      error_cases.py:N in forward:  return self.rest(ops.prune(x, keep), keep)\n"
    "  node    %prune: f32[1, n, 16] = tpcompile.prune.default(%inputs_x, %gt)   # error_cases.py:N\n"
    "  during  forgetful, after canonicalize, mark, place\n"
    "  fix     this is a bug: rerun with --dump-ir DIR and report the dump",
)
def forgotten(desk: Desk) -> object:
    """A ``prune`` node is left."""
    from tpcompile.capture import capture

    captured = capture(Scored().eval(), {"x": torch.randn(1, 12, 16)}, {"x": {1: "seq"}})
    return Pipeline((Canonicalize(), Mark(), Place(), Forgetful()))(captured)


@torch.library.custom_op("error_texts::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """An op that ONNX has no word for."""
    return x.clone()


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@says(
    errors.EmitError,
    "torch.onnx could not translate the program: No ONNX function found for <OpOverload(op='error_texts.twist', "
    "overload='default')>. Failure message: No decompositions registered for the real-valued input\n"
    "  at      error_cases.py:N in rest:  return twist(super().rest(x, keep))\n"
    "  node    %twist: f32[1, 16] = error_texts.twist.default(%sum_1)   # error_cases.py:N\n"
    "  during  emit\n"
    "  fix     write that line with torch's own ops, or keep the op out of the model; -v shows torch.onnx's own error",
)
def no_translation(desk: Desk) -> object:
    """The model calls a ``torch.library.custom_op`` behind its last site."""

    class Twisted(Scored):
        def rest(self, x: Tensor, keep: Tensor) -> Tensor:
            return twist(super().rest(x, keep))

    return tpcompile.export(Twisted().eval(), {"x": torch.randn(1, 12, 16)}, desk.folder / "new")
