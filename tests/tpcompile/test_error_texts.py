"""Every class of error, provoked for real, by its complete text."""

import inspect
import re
from pathlib import Path
from shutil import copytree

import pytest
import torch
from click.testing import Result
from error_cases import ABSTRACT, CASES, CLASSES, THRESHOLDS, VERDICTS, Case, Desk, says, shown

import tpcompile
from tpcompile import bundle as bundles
from tpcompile import errors
from tpcompile.backends import backend
from tpcompile.bundle import Vector
from tpcompile.errors import TpcompileError

# --- what happens to a bundle; what happens to a model is in error_cases.py -----------------------------------------------------


@says(
    errors.ParityError,
    "FAILED verify TMP/out: 1 of 1 vectors differ; vector 0: pooler_output needs a tolerance of X, allowed is X",
    VERDICTS,
)
def other_outputs(desk: Desk) -> object:
    """The recorded outputs are those of another runtime: what an exchanged library looks like to the replay."""
    found = bundles.read(desk.bundle)
    vectors = [Vector(v.inputs, {name: value + 0.25 for name, value in v.outputs.items()}, v.kept) for v in found.vectors()]
    with bundles.stage(desk.bundle, force=True) as folder:
        copytree(found.path, folder, dirs_exist_ok=True)
        bundles.write_vectors(folder / "vectors" / "vectors.safetensors", vectors)
        bundles.seal(folder, found.manifest)
    return desk("tpcompile verify out")


@says(
    errors.AccuracyError,
    "FAILED validate TMP/out: agreement with dense (cosine) is X, asked for 1.0",
    VERDICTS,
)
def disagrees(desk: Desk) -> object:
    return desk("tpcompile validate out --min-agreement 1 --data texts.txt")


@says(
    errors.TargetMissed,
    "FAILED bench TMP/out: cold p50 between X and X ms, asked for p50<=0.001ms; warm p50 between X and X ms, asked for "
    "p50<=0.001ms",
    VERDICTS,
)
def too_slow(desk: Desk) -> object:
    return desk("tpcompile bench out --slo p50<=1us --data texts.txt")


@says(
    errors.Inconclusive,
    "INCONCLUSIVE bench TMP/out: cold speed-up X (X to inf), asked for 1.3; too few samples to bound it: 1; warm "
    "speed-up X (X to inf), asked for 1.3; too few samples to bound it: 1",
    VERDICTS,
)
def one_sample(desk: Desk) -> object:
    return desk("tpcompile bench out --min-speedup 1.3 --samples 1 --data texts.txt")


@says(
    errors.BuildFailed,
    "ONNX Runtime refused model.onnx: Error parsing message with type 'onnx.ModelProto': Wire format was corrupt\n"
    "  fix     export again; if it stays, try target openvino",
)
def cut_short(desk: Desk) -> object:
    path = desk.folder / "model.onnx"
    path.write_bytes((desk.bundle / "model.onnx").read_bytes()[:1000])
    return backend("onnx").build(path, desk.folder / "out", "fp32")


@says(
    errors.IntegrityError,
    "model.onnx was changed after export\n  fix     export again; never edit a bundle in place",
)
def edited(desk: Desk) -> object:
    model = desk.bundle / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(bytes(content))
    return tpcompile.load(desk.bundle)


# --- the tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "out"
    return tpcompile.export(bert_folder, out=out, method="ltp", parameters=THRESHOLDS).path


@pytest.fixture
def desk(bert_folder: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    torch.manual_seed(0)
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {'very ' * i}long" for i in range(10)), encoding="utf-8")
    return Desk(tmp_path, copytree(bert_folder, tmp_path / "model"), copytree(sound, tmp_path / "out"), monkeypatch)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_the_text_of_an_error(kind: type[TpcompileError], desk: Desk) -> None:
    case, text = CASES[kind]
    found = called(case, desk)
    if isinstance(found, Result):
        assert found.exit_code == kind.exit_code, found.output
    said = (
        found.stderr.partition("FAILED verify")[0].rstrip() if isinstance(found, Result) else f"{type(found).__name__}: {found}"
    )
    assert shown(said, desk) == f"{kind.__name__}: {text}"


def called(case: Case, desk: Desk) -> object:
    """What a case gives: a run of the command line, or its error."""
    try:
        return case(desk)
    except TpcompileError as error:
        return error


@pytest.mark.parametrize("kind", VERDICTS, ids=lambda kind: kind.__name__)
def test_the_last_line_of_a_gate(kind: type[TpcompileError], desk: Desk) -> None:
    case, text = VERDICTS[kind]
    result = case(desk)
    assert isinstance(result, Result)
    assert result.exit_code == kind.exit_code, result.output
    assert re.sub(r"\d+\.(\d{2}|\d{4}|\de-\d\d)\b", "X", shown(result.stderr.splitlines()[-1], desk)) == text


def test_every_class_has_its_text() -> None:
    """A new class of error must bring a case that provokes it."""
    assert set(CLASSES) == CASES.keys() | VERDICTS.keys() | ABSTRACT
    assert not CASES.keys() & VERDICTS.keys()


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in ABSTRACT], ids=lambda kind: kind.__name__)
def test_the_example_of_a_class_is_what_its_case_does(kind: type[TpcompileError]) -> None:
    """The first code in the docstring's Example stands in the case that provokes the class."""
    example = re.search(r"Example: [^`]*``([^`]+)``", inspect.getdoc(kind) or "")
    assert example is not None
    source = " ".join(inspect.getsource({**CASES, **VERDICTS}[kind][0]).split())
    assert example[1].rstrip(")").replace('"', "") in source.replace('"', "")
