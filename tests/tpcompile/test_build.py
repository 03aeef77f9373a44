"""What building does once, however many targets are built: times are not asserted, how often the slow steps run is."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import bundle as bundles
from tpcompile import ops
from tpcompile.build import compile_subject, fill
from tpcompile.subject import subject_of


class Model(nn.Module):
    """One site, then attention that masks what fell."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        score = x.sum(-1)
        keep = (score > 0) | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep, score)
        logits = (self.query(x) @ x.transpose(1, 2)).masked_fill(~keep[:, None, :], float("-inf"))
        return (logits.softmax(-1) @ self.value(x))[:, 0]


def test_every_graph_is_traced_written_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        run = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            ran[what] += 1
            return run(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(torch.export, "export", "traced")
    count(ExportedProgram, "run_decompositions", "traced again")
    count(torch.onnx, "export", "written")
    count(onnx.checker, "check_model", "checked")
    inputs = {"x": torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))}
    compiled = compile_subject(subject_of(Model().eval(), inputs, None, None, None))
    assert ran == {"traced": 1, "traced again": 1}  # the dense twin comes from the same trace
    for target in ("onnx", "openvino"):
        with bundles.stage(tmp_path / target) as folder:
            fill(folder, compiled, target)
    assert ran == {"traced": 1, "traced again": 1, "written": 3, "checked": 3}  # engine, dense, reference
