"""Six of the architectures of docs/coverage.md, one of each kind, as the library has them: masked, then gathered; or refused."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompile
from tpcompile.errors import TpcompileError

HERE = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
RESULTS = HERE.parent / "results" / "coverage.json"


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


@pytest.mark.parametrize("name", [name for name in TABLE.SAMPLE if not TABLE.ROWS[name].refused])
@torch.no_grad()
def test_an_architecture_is_gathered_as_it_is_masked(name: str) -> None:
    row, masked = imposed(name)
    compact = tpcompile.lower(masked)
    assert len(compact.sites) >= TABLE.TINY.depth
    for feed in row.inputs(TABLE.TINY):
        want, got = masked(**feed), compact.trace(**feed)
        assert not got.keep[-1].all(), "nothing falls"
        for output, value in want.items():
            bound = 1e-5 * max(1.0, value.double().abs().max().item())
            torch.testing.assert_close(got.outputs[output], value, rtol=0, atol=bound)


@pytest.mark.parametrize("name", [name for name in TABLE.SAMPLE if TABLE.ROWS[name].refused])
def test_what_the_table_says_is_refused_is_refused(name: str) -> None:
    with pytest.raises(TpcompileError) as caught:
        tpcompile.lower(imposed(name)[1])
    assert type(caught.value).__name__ in json.loads(RESULTS.read_text(encoding="utf-8"))[name]["message"]


def imposed(name: str) -> tuple[Any, Any]:
    """A row of the table, and its masked program."""
    row = TABLE.ROWS[name]
    example = row.inputs(TABLE.TINY)[0]
    return row, tpcompile.impose(row.model(TABLE.TINY), example, dynamic=row.dynamic, threshold=row.threshold, prefix=row.prefix)
