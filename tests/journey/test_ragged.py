"""Batches through every engine: each sample equals its own run, whatever stands beside it."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings

import tpcompile
from tpcompile import bundle as bundles
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.cli import main
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample, batches, collate, split
from tpcompile.engine import Engine
from tpcompile.subject import subject_of

TARGETS = runnable()
THRESHOLDS = [0.004, 0.004, 0.005, 0.006, 0.0, 0.008]
LAW = 1e-5


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Real weights: the package's own directory."""
    from tpcompile.demo import model_folder

    return model_folder()


@pytest.fixture(scope="module")
def compiled(minilm: Path) -> Compiled:
    """MiniLM under LTP, batch and length dynamic in one engine."""
    return compile_subject(subject_of(minilm, None, None, "ltp", {"thresholds": THRESHOLDS}, batch="ragged"))


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest, compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ragged") / request.param
    with bundles.stage(out) as folder:
        fill(folder, compiled, request.param)
    return out


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with tpcompile.load(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts(bundle: Path) -> list[Sample]:
    """Real texts of very different lengths: the shortest, the longest, and some between."""
    rows = sorted(load_data("docstrings:report", bundle, 256, 60), key=lambda row: row.length)
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, 8)]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= LAW * max(1.0, float(np.abs(want).max()))


def test_each_sample_equals_its_own_run(engine: Engine, texts: list[Sample]) -> None:
    assert len({row.length for row in texts}) >= 6
    outputs, kept = engine.kept_each(**collate(texts))
    for row, got, sites in zip(texts, split(outputs, texts, engine.manifest.along), kept, strict=True):
        alone, own = engine.kept(**row.inputs)
        close(got["sentence_embedding"], alone["sentence_embedding"])
        for mask, single, stored in zip(sites.masks, own.masks, sites.stored, strict=True):
            assert not mask[row.length :].any()  # padding never lives
            np.testing.assert_array_equal(mask[: row.length], single)
            assert stored == max(max(k.counts[sites.stored.index(stored)] for k in kept), 1)
    assert len({k.counts for k in kept}) > 4
    assert any(k.counts[-1] < k.stored[-1] for k in kept)  # some rows are fillers


@given(order=st.lists(st.integers(0, 7), min_size=1, max_size=6))
@settings(
    max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_mix(engine: Engine, texts: list[Sample], order: list[int]) -> None:
    group = [texts[i] for i in order]
    outputs = engine(**collate(group))["sentence_embedding"]
    for b, row in enumerate(group):
        close(outputs[b : b + 1], engine(**row.inputs)["sentence_embedding"])


def test_many_samples_come_back_in_order(engine: Engine, texts: list[Sample]) -> None:
    for row, outputs in zip(texts, engine.each(texts, 3), strict=True):
        close(outputs["sentence_embedding"], engine(**row.inputs)["sentence_embedding"])


def test_validate_runs_batches(bundle: Path) -> None:
    parity = tpcompile.validate(bundle, data="docstrings:report", samples=12, batch=5)
    assert parity.verdict == "PASSED"
    assert [record.tokens for record in parity.samples] == [row.length for row in load_data("docstrings:report", bundle, 256, 12)]
    assert len({record.stored for record in parity.samples[:5]}) == 1  # one storage a batch
    assert len({record.stored for record in parity.samples}) > 1
    assert command("verify", bundle).exit_code == 0
    timed = command("bench", bundle, "--data", "docstrings:report", "--samples", 6, "--batch-size", 3, "--repeats", 2)
    assert timed.exit_code == 0
    assert "over 2 samples" in timed.output


def test_one_sample_bundles_take_no_batch(bert_folder: Path, tmp_path: Path) -> None:
    tpcompile.export(bert_folder, out=tmp_path / "out", method="ltp", parameters={"thresholds": [0.0, 0.05, 0.06]})
    refused = command("validate", tmp_path / "out", "--batch-size", 4)
    assert refused.exit_code == 2
    assert "takes one sample an inference" in refused.output
    assert "export with --batch ragged, or leave --batch-size out" in refused.output


def test_batches_keep_every_sample(texts: list[Sample]) -> None:
    by_length = list(batches(texts, 3, by_length=True))
    assert sorted(i for group in by_length for i in group) == list(range(8))
    assert [len(group) for group in by_length] == [3, 3, 2]
