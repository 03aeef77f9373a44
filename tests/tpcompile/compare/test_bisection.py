"""Faults planted in one pass, and in one layer's weights of an exported engine, are found and named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import tpcompile
from tpcompile import bundle as bundles
from tpcompile.backends import backend
from tpcompile.backends.base import Session
from tpcompile.compare import bisection
from tpcompile.compare.graphview import read_graph
from tpcompile.compare.watch import Side, engine_side
from tpcompile.errors import IntegrityError, UnmaskedFold, UsageError
from tpcompile.passes import Pipeline, pipeline
from tpcompile.passes.base import GraphPass
from tpcompile.program import Program, Stage

LTP: dict[str, Any] = {"method": "ltp", "parameters": {"thresholds": [0.0, 0.04, 0.06]}}
LAYER = "dense.model.encoder.layer.1.intermediate.dense"
TEXTS = [
    "plain words",
    "tokens come and go",
    "one",
    "the rest is silence, he said",
    "a quick brown fox jumps",
    "over the lazy dog",
]
"""Only one of them has a q."""

Change = Callable[[NDArray[Any]], None]
Plant = Callable[..., Path]


@pytest.fixture
def bundle(text_bundles: dict[str, Path]) -> Path:
    return text_bundles["onnx"]


@pytest.fixture(scope="module")
def ragged(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "ragged"
    tpcompile.export(bert_folder, out=out, batch="ragged", **LTP)
    return out


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """``plant(bundle, weight, change)``: a sealed copy whose engine has another weight; its reference is as it was."""

    def make(source: Path, weight: str, change: Change) -> Path:
        out = tmp_path / "planted"
        shutil.copytree(source, out)
        model = onnx.load(out / "model.onnx")
        (tensor,) = [one for one in model.graph.initializer if one.name.removeprefix("captured.") == weight]
        value = numpy_helper.to_array(tensor).copy()
        change(value)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        onnx.save(model, out / "model.onnx")
        bundles.seal(out, bundles.read(out).manifest)
        return out

    return make


def one_number(value: NDArray[Any]) -> None:
    value[3, 4] += 0.1


def texts(folder: Path, rows: Sequence[str] = TEXTS) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


# --- by layer ---------------------------------------------------------------------------------------------------------------


def test_a_sound_bundle(bundle: Path) -> None:
    found = tpcompile.bisect(bundle)
    assert (found.mode, found.verdict, found.exit_code, found.culprit) == ("layer", "PASSED", 0, None)
    assert len({note.tokens for note in found.samples}) >= 4
    assert {note.verdict for note in found.samples} == {"equal"}


def test_a_fault_in_one_layers_weights(bundle: Path, plant: Plant, tmp_path: Path) -> None:
    out = tmp_path / "part"
    found = tpcompile.bisect(plant(bundle, f"{LAYER}.weight.T", one_number), out=out)
    assert (found.mode, found.verdict, found.exit_code) == ("layer", "FAILED", 5)
    assert found.culprit is not None
    assert (found.culprit.value, found.culprit.module) == ("linear_10", LAYER)
    assert found.culprit.inputs == ("layer_norm_3",)
    assert found.culprit.ops == ("Gemm",)
    assert found.culprit.weights == (f"{LAYER}.weight.T float32[32, 64]: by up to 0.1",)
    assert found.culprit.max_abs > 0.01
    assert found.others == ()
    assert found.compared > 80
    assert LAYER in found.text()
    assert LAYER in found.reason
    json.dumps(found.to_json(), allow_nan=False)
    shown = repro(out)
    assert shown == pytest.approx(found.culprit.max_abs, rel=1e-4)
    assert onnx.load(out / "engine.onnx").graph.output[0].name == "linear_10"


def repro(out: Path) -> float:
    """What the script in a written folder says: the largest difference."""
    done = subprocess.run([sys.executable, "repro.py"], cwd=out, capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit(" ", 1)[1])


def test_a_fault_that_one_sample_of_several_shows(bundle: Path, plant: Plant, tmp_path: Path) -> None:
    def letter(value: NDArray[Any]) -> None:
        value[4 + "abcdefghijklmnopqrstuvwxyz".index("q")] += np.linspace(-1, 1, 32, dtype=np.float32)

    planted = plant(bundle, "dense.model.embeddings.word_embeddings.weight", letter)
    found = tpcompile.bisect(planted, data=texts(tmp_path))
    assert sum(note.verdict == "differs" for note in found.samples) == 1
    assert found.culprit is not None
    assert (found.culprit.value, found.culprit.module) == ("embedding", "dense.model.embeddings.word_embeddings")
    assert found.samples[found.culprit.sample].text == "a quick brown fox jumps"
    assert found.culprit.inputs == ()
    rest = [text for text in TEXTS if "q" not in text]
    assert tpcompile.bisect(planted, data=texts(tmp_path, rest)).exit_code == 0


def test_a_fault_in_a_threshold(bundle: Path, plant: Plant) -> None:
    def higher(value: NDArray[Any]) -> None:
        value += 0.02

    found = tpcompile.bisect(plant(bundle, "body.steps.1.threshold", higher))
    assert found.culprit is not None
    assert (found.culprit.value, found.culprit.module, found.culprit.inputs) == ("ge", "body.steps.1", ("site0.score",))
    assert found.culprit.weights == ("body.steps.1.threshold float32[]: by up to 0.02",)
    assert found.others == ()
    assert "site0 keeps other tokens" in found.reason


def test_a_fault_in_a_ragged_batch(ragged: Path, plant: Plant, tmp_path: Path) -> None:
    assert tpcompile.bisect(ragged, batch_size=3).exit_code == 0
    planted = plant(ragged, "dense.model.encoder.layer.2.attention.output.dense.weight.T", one_number)
    found = tpcompile.bisect(planted, out=tmp_path / "part")
    assert found.culprit is not None
    assert found.culprit.module == "dense.model.encoder.layer.2.attention.output.dense"
    assert repro(tmp_path / "part") == pytest.approx(found.culprit.max_abs, rel=1e-4)


def test_a_fault_in_an_openvino_engine(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    if "openvino" not in text_bundles:
        pytest.skip(backend("openvino").probe().reason)
    out = tmp_path / "out"
    shutil.copytree(text_bundles["openvino"], out)
    assert tpcompile.bisect(out).exit_code == 0
    weights = read_graph(out / "openvino_taps.xml").weights.values()
    (weight,) = [one for one in weights if one.name.startswith("linear_10 MatMul")]
    content, old = (out / "openvino_model.bin").read_bytes(), weight.read().tobytes()
    assert content.count(old) == 1
    (out / "openvino_model.bin").write_bytes(content.replace(old, (weight.read() * 2).tobytes()))
    bundles.seal(out, bundles.read(out).manifest)
    found = tpcompile.bisect(out, out=tmp_path / "part")
    assert found.culprit is not None
    assert (found.culprit.value, found.culprit.module) == ("linear_10", LAYER)
    assert found.culprit.where  # OpenVINO's files do not say it; the reference does
    assert not (tmp_path / "part" / "engine.onnx").exists()
    assert repro(tmp_path / "part") == pytest.approx(found.culprit.max_abs, rel=1e-4)


def test_against_another_bundle(bundle: Path, plant: Plant, tmp_path: Path) -> None:
    planted = plant(bundle, f"{LAYER}.weight.T", one_number)
    found = tpcompile.bisect(planted, against=bundle)
    assert found.culprit is not None
    assert (found.against, found.culprit.module, found.culprit.inputs) == (str(bundle), LAYER, ("layer_norm_3",))
    with pytest.raises(UsageError, match="has other inputs than"):
        tpcompile.bisect(bundle, against=image_like(bundle, tmp_path))


def image_like(bundle: Path, folder: Path) -> Path:
    """A bundle that takes something else."""
    out = folder / "other"
    shutil.copytree(bundle, out)
    manifest = bundles.read(out).manifest
    bundles.seal(out, manifest.model_copy(update={"inputs": manifest.inputs[:1]}))
    return out


def test_a_fault_that_vanishes_when_watched(bundle: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a runtime's fusion: the plain engine is wrong, the one with inner values as outputs is right."""
    sound, wrong = bundle, plant(bundle, f"{LAYER}.weight.T", one_number)

    def shy(_: bundles.Bundle) -> Side:
        good, bad = (engine_side(bundles.read(path)) for path in (sound, wrong))

        def open_(names: Sequence[str]) -> Session:
            return (good if set(names) - set(good.taps) else bad).open(names)

        return replace(bad, open=open_)

    monkeypatch.setattr(bisection, "engine_side", shy)
    found = tpcompile.bisect(wrong)
    assert (found.verdict, found.exit_code, found.culprit) == ("INCONCLUSIVE", 7, None)
    assert "agrees as soon as its inner values are watched" in found.reason


def test_an_engine_without_names(bundle: Path, plant: Plant) -> None:
    out = plant(bundle, f"{LAYER}.weight.T", one_number)
    model = onnx.load(out / "model.onnx")
    keep = (
        {output.name for output in model.graph.output}
        | {i.name for i in model.graph.initializer}
        | {i.name for i in model.graph.input}
    )
    names = {name: f"val_{i}" for i, name in enumerate(name for node in model.graph.node for name in node.output)}
    names = {old: new for old, new in names.items() if old not in keep and not old.startswith("site")}
    offset = {i.name: f"weight.{n}" for n, i in enumerate(model.graph.initializer)}
    for node in model.graph.node:
        node.input[:] = [names.get(name, offset.get(name, name)) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for weight in model.graph.initializer:
        weight.name = offset[weight.name]
    del model.graph.value_info[:]
    onnx.save(model, out / "model.onnx")
    bundles.seal(out, bundles.read(out).manifest)
    found = tpcompile.bisect(out)
    assert (found.verdict, found.exit_code) == ("INCONCLUSIVE", 7)
    assert "no inner value has a name that both sides know" in found.reason


def test_an_engine_that_cannot_be_watched(bundle: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcompile.compare.watch.ENGINES", {})
    assert tpcompile.bisect(bundle).exit_code == 0
    found = tpcompile.bisect(plant(bundle, f"{LAYER}.weight.T", one_number))
    assert (found.verdict, found.exit_code) == ("INCONCLUSIVE", 7)
    assert found.reason.endswith(", and the inner values of an engine for onnx, form single, cannot be seen")


def test_a_fault_in_an_engine_for_images(image_bundle: Path, plant: Plant) -> None:
    """A fixed number of tokens, and sites without a threshold of their own."""
    sound = tpcompile.bisect(image_bundle)
    assert sound.exit_code == 0, sound.reason
    assert {note.tokens for note in sound.samples} == {17}
    found = tpcompile.bisect(plant(image_bundle, "blocks.1.out.weight.T", one_number))
    assert found.culprit is not None
    assert found.culprit.module == "blocks.1.out"
    assert (found.exit_code, found.others) == (5, ())


def test_refusals(bundle: Path, tmp_path: Path) -> None:
    for arguments, text in [
        ({"mode": "pass"}, "a bundle holds no module"),
        ({"mode": "network"}, "unknown mode 'network'"),
        ({"method": "ltp"}, "a bundle needs none"),
        ({"batch_size": 2}, "takes one sample an inference"),
        ({"out": tmp_path}, "exists"),
        ({"data": texts(tmp_path, ["long " * 40])}, "the engine takes 64"),
    ]:
        with pytest.raises(UsageError, match=text):
            tpcompile.bisect(bundle, **arguments)  # type: ignore[arg-type]  # some are wrong on purpose
    with pytest.raises(UsageError, match="layers are compared in a bundle's engine"):
        tpcompile.bisect(torch.nn.Identity(), mode="layer")
    shutil.copytree(bundle, tmp_path / "changed")
    with (tmp_path / "changed" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError):
        tpcompile.bisect(tmp_path / "changed")


# --- by pass ----------------------------------------------------------------------------------------------------------------

aten = torch.ops.aten


@dataclass(frozen=True)
class Planted(GraphPass):
    """Only for tests: a pass with a fault.

    ``mask`` forgets the mask of the last softmax, ``weight`` scales a layer's weight, ``crash`` leaves a program that does not run.
    """

    name: ClassVar[str] = "planted"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.PLACED
    fault: str = "mask"

    def run(self, program: Program) -> Program:
        if self.fault == "weight":
            return self._scaled(program)
        draft = program.draft()
        softmax = [node for node in draft.graph.nodes if node.target is aten.softmax.int][-1]
        if self.fault == "mask":
            softmax.replace_input_with(softmax.args[0], softmax.args[0].args[0])
        else:
            softmax.args = (softmax.args[0], 7)
        return program.adopt(draft, refresh=False)

    def _scaled(self, program: Program) -> Program:
        state = dict(program.exported.state_dict)
        name = f"captured.{LAYER}.weight"
        exported = program.adopt(program.draft()).exported
        exported._state_dict = {**state, name: state[name] * 1.1}
        return replace(program, exported=exported)


def passes(fault: str = "", at: int = 4, batch: str = "one") -> Pipeline:
    steps = list(pipeline(batch).passes)
    return Pipeline((*steps[:at], *([Planted(fault)] if fault else []), *steps[at:]))


def test_sound_passes(bert_folder: Path) -> None:
    found = tpcompile.bisect(bert_folder, **LTP)
    assert (found.mode, found.verdict, found.exit_code) == ("pass", "PASSED", 0)
    assert [step.name for step in found.steps] == ["capture", *map(str, pipeline().passes), "emit"]
    assert len({note.tokens for note in found.samples}) >= 4


@pytest.mark.parametrize("batch", ["one", "ragged"])
def test_a_fault_in_one_pass(batch: str, bert_folder: Path) -> None:
    found = tpcompile.bisect(bert_folder, batch=batch, passes=passes("mask", batch=batch), **LTP)
    assert (found.mode, found.verdict, found.exit_code) == ("pass", "FAILED", 5)
    assert [step.verdict for step in found.steps] == ["equal"] * 5 + ["differs"]
    assert found.culprit is not None
    assert (found.culprit.step, found.culprit.value, found.culprit.module) == (
        "planted",
        "softmax_2",
        "body.steps.2",
    )
    assert found.culprit.where.startswith("masked.py:")
    assert found.reason.startswith("planted: ")
    assert "pass      planted" in found.text()


def test_a_pass_that_scales_a_weight(bert_folder: Path) -> None:
    found = tpcompile.bisect(bert_folder, passes=passes("weight"), **LTP)
    assert found.culprit is not None
    assert (found.culprit.step, found.culprit.module) == ("planted{fault=weight}", LAYER)
    assert found.culprit.weights[0].startswith(f"{LAYER}.weight float32[64, 32]: by up to ")


def test_a_pass_whose_program_does_not_run(bert_folder: Path) -> None:
    found = tpcompile.bisect(bert_folder, passes=passes("crash"), **LTP)
    assert (found.exit_code, found.steps[-1].name) == (5, "planted{fault=crash}")
    assert found.steps[-1].error.startswith("Dimension out of range")
    assert "does not run: Dimension out of range" in found.text()


def test_a_refused_model_is_refused() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = x.norm(dim=-1)
            return tpcompile.ops.prune(x, score > 1.0, score).mean(1)

    with pytest.raises(UnmaskedFold) as caught:
        tpcompile.bisect(Mean().eval(), {"x": torch.randn(1, 9, 8)}, dynamic={"x": {1: "seq"}})
    assert caught.value.during == "place"
