"""Engines broken on purpose: ``validate`` catches every one, and ``bisect`` names the layer, the stage or the pass."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import tpcompile
from tpcompile import bundle as bundles
from tpcompile import chain
from tpcompile.compare.findings import Bisection
from tpcompile.passes import GraphPass, Pipeline, pipeline
from tpcompile.program import Program, Stage

LTP = {"thresholds": [0.0, 0.04, 0.06]}
LAYER = "dense.model.encoder.layer.1.output.dense"
TEXTS = ["tokens come and go", "one", "the rest is silence, he said", "a quick brown fox jumps", "over the lazy dog"]
FORMS = ("single", "staged")
Change = Callable[[NDArray[Any]], None]


@pytest.fixture(scope="module")
def sound(bert_folder: Path, text_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("sound") / "staged"
    tpcompile.export(bert_folder, out=out, method="ltp", parameters=LTP, form="staged")
    return {"single": text_bundles["onnx"], "staged": out}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def edit(source: Path, out: Path, change: Callable[[onnx.ModelProto], bool]) -> Path:
    """A sealed copy of a bundle whose engine is another; ``change`` says whether it found what it changes in a graph."""
    shutil.copytree(source, out)
    paths = sorted(path for path in out.glob("*.onnx"))
    found = 0
    for path in paths:
        model = onnx.load(path)
        if change(model):
            found += 1
            onnx.save(model, path)
    assert found == 1
    bundles.seal(out, bundles.read(out).manifest)
    return out


def weight(name: str, change: Change) -> Callable[[onnx.ModelProto], bool]:
    """Changes one weight."""

    def planted(model: onnx.ModelProto) -> bool:
        for tensor in model.graph.initializer:
            if tensor.name.removeprefix("captured.") == name:
                value = numpy_helper.to_array(tensor).copy()
                change(value)
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
                return True
        return False

    return planted


def one_number(value: NDArray[Any]) -> None:
    value[3, 4] += 1e-3


def higher(value: NDArray[Any]) -> None:
    value += 0.02


def caught(bundle: Path, texts: Path) -> Bisection:
    """``validate`` fails with exit code 5, and so does ``bisect``, which names a culprit."""
    parity = tpcompile.validate(bundle, data=texts, float64=0)
    assert (parity.verdict, parity.exit_code) == ("FAILED", 5), parity.text()
    found = tpcompile.bisect(bundle, data=texts, out=bundle.with_name("part"))
    assert (found.verdict, found.exit_code) == ("FAILED", 5), found.reason
    assert (bundle.with_name("part") / "repro.py").is_file()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_one_weight_changed_by_a_thousandth(form: str, sound: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    found = caught(edit(sound[form], tmp_path / "out", weight(f"{LAYER}.weight.T", one_number)), texts)
    assert found.culprit is not None
    assert (found.culprit.module, found.culprit.step) == (LAYER, "stage1" if form == "staged" else "")
    assert found.culprit.weights == (f"{LAYER}.weight.T float32[64, 32]: by up to 0.001",)
    assert found.others == ()


@pytest.mark.parametrize("form", FORMS)
def test_one_threshold_moved(form: str, sound: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    found = caught(edit(sound[form], tmp_path / "out", weight("body.steps.1.threshold", higher)), texts)
    assert found.culprit is not None
    assert (found.culprit.module, found.culprit.inputs) == ("body.steps.1", ("site0.score",))
    assert [step.verdict for step in found.steps] == ([] if form == "single" else ["differs", "differs", "differs"])


def test_a_wrong_gather_order(sound: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Rows of the first site in reverse, where hidden states are gathered; its index, and the mask, are in order."""

    def reverse(model: onnx.ModelProto) -> bool:
        graph = model.graph
        index = next(node.output[0] for node in graph.node if node.op_type == "Squeeze" and node.input[0] == "site0.index")
        at = next(i for i, node in enumerate(graph.node) if node.op_type == "Gather" and list(node.input)[1:] == [index]
                  and node.input[0] != "site0.keep")  # fmt: skip
        names = {"starts": [-1], "ends": [-(2**62)], "axes": [0], "steps": [-1]}
        graph.initializer.extend(numpy_helper.from_array(np.array(value), f"order.{name}") for name, value in names.items())
        graph.node.insert(at, helper.make_node("Slice", [index, *(f"order.{name}" for name in names)], ["reversed"]))
        graph.node[at + 1].input[1] = "reversed"
        return True

    found = caught(edit(sound["single"], tmp_path / "out", reverse), texts)
    assert found.culprit is not None
    assert found.culprit.module == "body.steps.1"
    assert {"Slice", "Gather"} <= set(found.culprit.ops)


def test_a_wrong_gather_order_between_stages(
    sound: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own gather is at fault: no file is changed."""
    right = chain.GATHERS["take"]
    monkeypatch.setitem(chain.GATHERS, "take", lambda numbers, x, index: right(numbers, x, index[:, ::-1]))  # type: ignore[arg-type]
    found = caught(Path(shutil.copytree(sound["staged"], tmp_path / "out")), texts)
    assert found.culprit is not None
    assert (found.mode, found.culprit.step) == ("stage", "stage1")
    assert "take" in found.culprit.ops
    assert [(step.name, step.verdict) for step in found.steps][:2] == [("stage0", "equal"), ("stage1", "differs")]
    assert "stage     stage1" in found.text()


@dataclass(frozen=True)
class Disorder(GraphPass):
    """Only for tests: reverses the rows that the first ``compact`` stores."""

    name: ClassVar[str] = "disorder"
    takes: ClassVar[Stage] = Stage.COMPACT
    gives: ClassVar[Stage] = Stage.COMPACT

    def run(self, program: Program) -> Program:
        draft = program.draft()
        compact = next(node for node in draft.graph.nodes if node.target is torch.ops.tpcompile.compact.default)
        (rows, *_) = [user for user in compact.users if user.args[1] == 0]
        with draft.graph.inserting_after(rows):
            flipped = draft.graph.call_function(torch.ops.aten.flip.default, (rows, [1]))
        rows.replace_all_uses_with(flipped, delete_user_cb=lambda user: user is not flipped)
        return program.adopt(draft)


def test_a_pass_that_gathers_in_a_wrong_order(bert_folder: Path, texts: Path) -> None:
    steps = Pipeline((*pipeline().passes, Disorder()))
    found = tpcompile.bisect(bert_folder, method="ltp", parameters=LTP, passes=steps, data=texts)
    assert (found.mode, found.exit_code) == ("pass", 5)
    assert found.culprit is not None
    assert found.culprit.step == "disorder"
