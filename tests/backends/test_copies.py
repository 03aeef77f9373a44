"""Several sessions of one engine: where inputs go, and that nothing but time depends on it."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tpcompile import api, bundle
from tpcompile.backends import Copier, backend, copier
from tpcompile.backends.base import Shareable
from tpcompile.backends.copies import Copies
from tpcompile.engine import Engine, load
from tpcompile.errors import UsageError
from tpcompile.plan import Wish

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))
THRESHOLDS = {"thresholds": [0.04]}


class Counted(Shareable):
    """A session that knows how often it ran, and whether it was closed."""

    def __init__(self) -> None:
        self.ran, self.closed = 0, False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.ran += 1
        return {"y": next(iter(feeds.values())) + 1}

    def share(self) -> "Counted":
        return Counted()

    def close(self) -> None:
        self.closed = True


def feeds(length: int) -> dict[str, np.ndarray]:
    return {"ids": np.full((1, length), 4), "mask": np.ones((1, length), dtype=np.int64)}


def test_a_shape_goes_where_it_went_and_a_new_one_takes_the_place_longest_unused() -> None:
    copies = Copies([Counted(), Counted()])
    assert [copies.place(feeds(n)) for n in (5, 7, 5, 9, 5, 9, 7)] == [0, 1, 0, 1, 0, 1, 0]


def test_runs_shares_and_closes() -> None:
    inner = [Counted(), Counted()]
    with Copies(inner) as copies:
        assert copies.run(feeds(3))["y"].tolist() == [[5, 5, 5]]
        copies.run(feeds(4))
        other = copies.share()
        other.run(feeds(3))
    assert ([one.ran for one in inner], [one.closed for one in inner]) == ([1, 1], [True, True])


@pytest.fixture(scope="module")
def runtime() -> Copier:
    found = backend("openvino").probe()
    if not found.ok:
        pytest.skip(found.reason)
    return copier("openvino")


@pytest.fixture(scope="module")
def built(runtime: Copier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copies")
    (root / "out").mkdir()
    backend("openvino").build(synthetic.save(root / "source"), root / "out", "fp32")
    return root / "out"


def test_copies_give_what_one_session_gives(runtime: Copier, built: Path) -> None:
    with backend("openvino").open(built) as one, runtime.open_copies(built, 2, threads=1) as several:
        assert isinstance(several, Copies)
        for length in (5, 7, 5, 9, 13, 7):
            given = {"input_ids": np.arange(1, length + 1)[None], "attention_mask": np.ones((1, length), dtype=np.int64)}
            np.testing.assert_array_equal(one.run(given)["logits"], several.run(given)["logits"])


def test_a_bundle_opens_as_many_as_it_was_exported_with(runtime: Copier, short_bert_folder: Path, tmp_path: Path) -> None:
    api.export(short_bert_folder, out=tmp_path / "out", target="openvino", method="ltp", parameters=THRESHOLDS, lengths=(8,), copies=2)
    found = bundle.read(tmp_path / "out")
    assert found.dense is not None
    assert (found.manifest.copies, found.dense.manifest.copies) == (2, 1)
    parity = api.validate(tmp_path / "out", samples=6)
    assert parity.verdict == "PASSED", parity.text()
    with load(tmp_path / "out", threads=1, callers=2) as engine, engine.share() as other:
        assert isinstance(engine._runner.session(), Copies)
        given = {"input_ids": np.full((1, 9), 7), "attention_mask": np.ones((1, 9), dtype=np.int64)}
        for name, value in engine(**given).items():
            np.testing.assert_array_equal(value, other(**given)[name])


def test_copies_are_refused_where_they_help_nobody(short_bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target onnx has no copies"):
        api.export(short_bert_folder, out=tmp_path / "out", method="ltp", parameters=THRESHOLDS, copies=2)
    with pytest.raises(UsageError, match="0 copies"):
        Wish(copies=0)
    with pytest.raises(UsageError, match="stages have no copies"):
        Wish(copies=2, form="staged")
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_asks_an_onnx_engine_for_copies_is_refused(short_bert_folder: Path, tmp_path: Path) -> None:
    api.export(short_bert_folder, out=tmp_path / "out", method="ltp", parameters=THRESHOLDS)
    found = bundle.read(tmp_path / "out")
    odd = bundle.Bundle(found.path, found.manifest.model_copy(update={"copies": 2}))
    with pytest.raises(UsageError, match="target onnx has no copies"):
        Engine(odd)
