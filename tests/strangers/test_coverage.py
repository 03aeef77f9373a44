"""Six of the architectures of docs/coverage.md, one of each kind, as the library has them: masked, then gathered."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompile

HERE = Path(__file__).parents[2] / "benchmarks" / "architectures.py"


def load() -> Any:
    """The table of architectures."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("architectures", HERE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = load()


@pytest.mark.parametrize("name", TABLE.SAMPLE)
@torch.no_grad()
def test_an_architecture_is_gathered_as_it_is_masked(name: str) -> None:
    row = TABLE.ROWS[name]
    feeds = row.inputs(TABLE.SMALL)
    masked = tpcompile.impose(row.model(), feeds[0], dynamic=row.dynamic, threshold=row.threshold, prefix=row.prefix)
    compact = tpcompile.lower(masked)
    assert len(compact.sites) >= TABLE.SMALL.depth
    for feed in feeds:
        want, got = masked(**feed), compact.trace(**feed)
        assert not got.keep[-1].all(), "nothing falls"
        for output, value in want.items():
            bound = 1e-5 * max(1.0, value.double().abs().max().item())
            torch.testing.assert_close(got.outputs[output], value, rtol=0, atol=bound)
