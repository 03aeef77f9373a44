"""What ``load`` runs, so that the shapes to come are no longer new."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from tpcompile import api, bundle
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.engine import load
from tpcompile.errors import InputError
from tpcompile.manifest import Manifest, TensorInfo
from tpcompile.plan import Wish
from tpcompile.prime import sweep
from tpcompile.program import Program
from tpcompile.recipe import Recipe
from tpcompile.subject import subject_of

SPEC = tuple(TensorInfo(name=name, dtype="int64", shape=(1, "seq")) for name in ("input_ids", "attention_mask"))


def feed(length: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.full((1, length), 7), "attention_mask": np.ones((1, length), dtype=np.int64)}


def manifest(**fields: object) -> Manifest:
    plain = {"target": "openvino", "role": "pruned", "model": {"id": "", "family": "", "architecture": "", "sha256": ""}}
    return Manifest.model_validate(
        {**plain, "inputs": SPEC, "outputs": (), "dims": {"seq": (2, 512)}, "padding": "attention_mask", **fields}
    )


@pytest.mark.parametrize(
    ("lengths", "wish", "swept"),
    [
        ((5, 6, 12), {}, [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2]),
        ((5, 6, 12), {"lengths": (8,), "buckets": (8,)}, [12, 8]),
        ((12, 12), {"buckets": (4, 8)}, [12, 8, 4]),  # inputs of one length: counts alone differ
        ((12, 12), {}, [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2]),
    ],
)
def test_where_ops_run_over_one_count_one_input_shows_every_shape(
    text_compiled: Compiled, tmp_path: Path, lengths: tuple[int, ...], wish: dict[str, Any], swept: list[int]
) -> None:
    with bundle.stage(tmp_path / "out") as folder:
        fill(folder, text_compiled, "openvino", wish=Wish(prime=True, calibrate=[feed(n) for n in lengths], **wish))
    found = bundle.read(tmp_path / "out")
    assert (found.manifest.primed, found.manifest.swept) == (1, tuple(swept))
    assert "sink{square=True}" in found.manifest.pipeline
    assert found.dense is not None
    assert (found.dense.manifest.primed, found.dense.manifest.swept) == (0, ())
    parity = api.validate(tmp_path / "out", samples=4)
    assert parity.verdict == "PASSED", parity.text()


def test_an_input_of_another_model_is_not_cut(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(text_bundles["openvino"], out)
    made = bundle.read(out).manifest.model_copy(update={"swept": (4, 2), "primed": 1})
    for strange in ({"x": np.ones(3)}, {"input_ids": np.ones(3), "attention_mask": np.ones(3)}):
        bundle.write_vectors(out / bundle.PRIMERS, [bundle.Vector(strange, {}, ())])
        bundle.seal(out, made)
        with pytest.raises(InputError):
            load(out)


@pytest.mark.parametrize(
    "fields",
    [
        {"lengths": (32,)},  # a cut to 5 would run at 32, and show no count of 5
        {"lengths": (8,), "buckets": (4, 8)},
        {"dims": {"seq": (8, 512)}},  # counts go below what inputs may have
        {"dims": {"seq": (2, 512), "batch": (1, 8)}},
        {"copies": 2},
    ],
)
def test_no_input_is_cut_where_cuts_would_not_show_the_counts(text_compiled: Compiled, fields: dict[str, Any]) -> None:
    assert sweep(text_compiled.square, manifest(), [feed(5), feed(12)]) is not None
    assert sweep(text_compiled.square, manifest(**fields), [feed(5), feed(12)]) is None


def test_a_number_of_samples_is_no_number_of_tokens() -> None:
    program: Any = SimpleNamespace(trace=lambda **inputs: SimpleNamespace(keep=[torch.ones(12, 12)]))
    inputs = (TensorInfo(name="x", dtype="float32", shape=("n", 12)),)
    for policy, cut in (("one", True), ("ragged", False)):
        told = manifest(inputs=inputs, dims={"n": (2, 64)}, batch=policy)
        assert (sweep(program, told, [{"x": np.ones((12, 12), np.float32)}]) is not None) == cut


@pytest.mark.parametrize(("tokens", "cut"), [(300, True), (301, False), (75, False), (0, False)])
def test_only_a_size_that_is_a_number_of_tokens_is_swept(tokens: int, cut: bool) -> None:
    keep = [torch.ones(1, tokens)] if tokens else []  # with a token of its own in front, behind a convolution, without sites
    program: Any = SimpleNamespace(trace=lambda **inputs: SimpleNamespace(keep=keep))
    assert (sweep(program, manifest(), [feed(9), feed(300)]) is not None) == cut


def test_every_small_size_is_shown_and_of_large_ones_some() -> None:
    program: Any = SimpleNamespace(trace=lambda **inputs: SimpleNamespace(keep=[torch.ones(1, 500)]))
    found = sweep(program, manifest(), [feed(500)])
    assert found is not None
    sizes = found[1]
    assert len(sizes) == 256
    assert sizes[0] == 500
    assert sizes[-127:] == tuple(range(128, 1, -1))
    assert list(sizes) == sorted({*sizes}, reverse=True)


@pytest.fixture(scope="module")
def digits() -> Compiled:
    recipe = Recipe.read(Path("digits-50"))
    return compile_subject(subject_of("tpcompile/digits-vit", None, None, recipe.method, recipe.parameters, batch="ragged"))


def counts(program: Program, node: fx.Node) -> set[int]:
    """The token sets that an op reads and gives."""
    placed = [program.placements[one.name] for one in (node, *node.all_input_nodes) if one.name in program.placements]
    return {level for placement in placed for level in placement.dims.values()}


def test_no_op_of_a_whole_model_runs_over_two_counts(digits: Compiled, text_compiled: Compiled) -> None:
    def mixed(program: Program) -> set[str]:
        return {str(n.target) for n in program.graph.nodes if n.op == "call_function" and len(counts(program, n)) > 1}

    assert mixed(digits.compact) >= {"aten.matmul.default", "aten.softmax.int"}
    assert mixed(digits.square) == mixed(text_compiled.square) == set()


def test_a_batch_of_images_is_not_cut(digits: Compiled, tmp_path: Path) -> None:
    with bundle.stage(tmp_path / "out") as folder:
        fill(folder, digits, "openvino", wish=Wish(prime=True))
    found = bundle.read(tmp_path / "out").manifest
    assert found.dims.keys() == {"batch"}
    assert (found.swept, found.primed > 0) == ((), True)
