"""Every exit code of docs/cli.md by something that really happens: one row each. 130, Ctrl-C, is in test_cli.py."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper
from torch import Tensor, nn

from tpcompile import bundle as bundles
from tpcompile import ops
from tpcompile.cli import main

ROOT = Path(__file__).resolve().parents[2]
Case = Callable[["Desk"], Result]
CASES: dict[int, tuple[Case, str]] = {}


@dataclass(frozen=True)
class Desk:
    """What a case may use: a copy of a sound bundle, labelled texts, an empty folder."""

    bundle: Path
    texts: Path
    folder: Path
    patch: pytest.MonkeyPatch

    def __call__(self, *line: str | Path) -> Result:
        return CliRunner().invoke(main, [str(word) for word in line])

    def change(self, edit: Callable[[onnx.ModelProto], None]) -> None:
        """Another engine in the bundle, sealed again."""
        model = onnx.load(self.bundle / "model.onnx")
        edit(model)
        onnx.save(model, self.bundle / "model.onnx")
        bundles.seal(self.bundle, bundles.read(self.bundle).manifest)


def leaves(code: int, text: str) -> Callable[[Case], Case]:
    """Register the case of an exit code, and a pattern for the last line on stderr, or the first of an error."""

    def register(case: Case) -> Case:
        CASES[code] = case, text
        return case

    return register


@leaves(0, r"PASSED validate \S+: 6 of 6 samples within 1e-05 of the masked reference")
def a_sound_engine(desk: Desk) -> Result:
    return desk("validate", desk.bundle, "--data", desk.texts)


@leaves(1, r"InternalError: this is a bug in tpcompile: ZeroDivisionError: ")
def a_bug(desk: Desk) -> Result:
    desk.patch.setattr("tempfile.tempdir", str(desk.folder))  # where the traceback is kept
    desk.patch.setattr("tpcompile.proof.parity.measure", lambda *_: 1 / 0)
    return desk("validate", desk.bundle, "--data", desk.texts)


@leaves(2, r"UsageError: no output is called 'logits'")
def a_tolerance_for_an_output_that_is_not_there(desk: Desk) -> Result:
    return desk("validate", desk.bundle, "--data", desk.texts, "--atol", "logits:1e-4")


@leaves(3, r"EnvironmentFault: texts need the package 'tokenizers'")
def a_package_that_is_missing(desk: Desk) -> Result:
    desk.patch.setitem(sys.modules, "tokenizers", None)
    return desk("validate", desk.bundle, "--data", desk.texts)


@leaves(4, r"UnmaskedFold: aten.sum.dim_IntList combines over tokens that site0 .* dropped")
def a_model_that_reads_dropped_tokens(desk: Desk) -> Result:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x.norm(dim=-1)
            return ops.prune(x, score > 1.0, score).mean(1)

    torch.export.save(torch.export.export(Mean().eval(), (torch.randn(1, 9, 8),)), desk.folder / "mean.pt2")
    return desk("export", "onnx", "-m", desk.folder / "mean.pt2", "-o", desk.folder / "new")


@leaves(5, r"FAILED validate \S+: \d+ of 6 samples differ; sample \d: .*")
def an_engine_with_another_weight(desk: Desk) -> Result:
    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name.endswith("layer.1.output.dense.weight.T")]
        value = numpy_helper.to_array(tensor).copy()
        value[3, 4] += 1e-3
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    desk.change(edit)
    return desk("validate", desk.bundle, "--data", desk.texts)


@leaves(6, r"FAILED validate \S+: agreement with dense \(cosine\) is 0\.\d+, asked for 1\.0")
def a_pruned_model_that_is_another(desk: Desk) -> Result:
    return desk("validate", desk.bundle, "--data", desk.texts, "--min-agreement", "1")


@leaves(7, r"BuildFailed: ONNX Runtime refused model.onnx: .*Frobnicate")
def an_op_that_the_runtime_does_not_have(desk: Desk) -> Result:
    def edit(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Tanh").op_type = "Frobnicate"

    desk.change(edit)
    return desk("validate", desk.bundle, "--data", desk.texts)


@leaves(8, r"FAILED bench \S+: .*asked for p50<=0\.001ms")
def an_engine_that_is_too_slow(desk: Desk) -> Result:
    return desk("bench", desk.bundle, "--data", desk.texts, "--slo", "p50<=1us")


@leaves(9, r"IntegrityError: model.onnx was changed after export")
def a_file_that_was_edited(desk: Desk) -> Result:
    content = bytearray((desk.bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (desk.bundle / "model.onnx").write_bytes(bytes(content))
    return desk("verify", desk.bundle)


@leaves(10, r"INCONCLUSIVE bench \S+: .*")
def a_target_that_one_sample_cannot_tell(desk: Desk) -> Result:
    return desk("bench", desk.bundle, "--data", desk.texts, "--samples", "1", "--min-speedup", "1.3")


@leaves(11, r"")
def a_bundle_and_another(desk: Desk) -> Result:
    return desk("diff", "--exit-code", desk.bundle, desk.bundle / "dense")


@pytest.fixture
def desk(text_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    rows = [{"text": f"text number {'very ' * i}long", "label": i % 2} for i in range(6)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bundle = Path(copytree(text_bundles["onnx"], tmp_path / "out"))
    return Desk(bundle, tmp_path / "texts.jsonl", tmp_path, monkeypatch)


@pytest.mark.parametrize("code", sorted(CASES))
def test_exit_code(code: int, desk: Desk) -> None:
    case, text = CASES[code]
    result = case(desk)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines() or [""]
    assert re.match(text, lines[-1]) or re.match(text, lines[0]), result.stderr
    if not text.startswith(("PASSED", "FAILED", "INCONCLUSIVE")) and text:
        assert any(line.startswith("  fix     ") for line in lines)


def test_every_code_of_the_manual_has_its_case() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == {*CASES, 130}
