"""What building does once, however many targets are built: times are not asserted, how often the slow steps run is."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import build, ops
from tpcompile import bundle as bundles
from tpcompile.backends import Extent
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.calibration import grouped
from tpcompile.data.samples import Sample
from tpcompile.plan import LADDERS, Plan, Wish
from tpcompile.subject import subject_of
from tpcompile.tune import Trial


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
    assert ran == {"traced": 1, "traced again": 1, "written": 4, "checked": 4}  # two engines, dense, reference


def test_what_is_timed_has_the_copies_of_what_is_exported(
    text_compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, str, bool, int]] = []

    def tune(plans: list[Plan], make: Callable[[Plan, Path], None], folder: Path, feeds: object) -> list[Trial]:
        for number, plan in enumerate(plans):
            (folder / str(number)).mkdir()
            make(plan, folder / str(number))
            found = bundles.read(folder / str(number)).manifest
            timed.append((found.lowering, found.form, plan.square, found.copies))
        return [Trial(plan, 1.0, 1.0, 0.0) for plan in plans]

    monkeypatch.setattr(build, "_engine", lambda *given: ((), ()))
    monkeypatch.setattr(build, "tune", tune)
    row = Sample("", {"input_ids": np.full((1, 5), 7), "attention_mask": np.ones((1, 5), np.int64)})
    wish, extent = Wish(tune=True, copies=3), Extent({"seq": (2, 12, 48)})
    build._plan(tmp_path / "out", text_compiled, "openvino", "fp32", lambda step: None, wish, lambda: ("some", [row]), extent, ())
    ladders = [("bucketed", "single", True, 3)] * len(LADDERS)
    assert timed == [("dynamic", "single", True, 3), *ladders, ("dynamic", "single", False, 3)]


def test_what_load_runs_is_not_what_is_timed(text_compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    timed: list[list[int]] = []

    def lengths(feeds: Any) -> list[int]:
        return [feed["input_ids"].shape[1] for feed in feeds]

    monkeypatch.setattr(build, "trial", lambda *given: made.append(lengths(given[-1])))
    monkeypatch.setattr(build, "tune", lambda plans, make, folder, feeds: make(plans[0], folder) or timed.append(lengths(feeds)) or [
        Trial(plan, 1.0, 1.0, 0.0) for plan in plans
    ])  # fmt: skip
    rows = [Sample("", {"input_ids": np.full((1, n), 7), "attention_mask": np.ones((1, n), np.int64)}) for n in (5, 6, 7, 8, 9)]
    extent, say = Extent({"seq": (2, 12, 48)}), lambda step: None
    for shown in (grouped(rows, "one"), grouped(rows[:1], "one"), []):
        wish = Wish(tune=True, prime=bool(shown))
        build._plan(tmp_path / "out", text_compiled, "openvino", "fp32", say, wish, lambda: ("some", rows), extent, shown)
    assert made == [[5, 7, 9], [5], []]
    assert timed == [[6, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("wish", "precision", "text"),
    [
        (Wish("static", tune=True), "fp32", "tuning times real inputs"),
        (Wish("static", prime=True), "int8", "constant counts are taken from data"),
        (Wish(prime=True), "int8", "8-bit ranges are taken from data"),
        (Wish(prime=True), "fp32", "priming runs real inputs"),
        (Wish(profiled=True), "fp32", "usual counts are taken from data"),
    ],
)
def test_a_refusal_for_want_of_data_says_what_asked(wish: Wish, precision: str, text: str) -> None:
    assert build.needed(wish, precision) == text


def test_a_dump_shows_the_program_that_openvino_gets(bert_folder: Path, tmp_path: Path) -> None:
    compiled = compile_subject(subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.0, 0.04, 0.06]}), tmp_path)
    before = {path.name for path in tmp_path.glob("*.txt")}
    text = str(compiled.square)
    made = sorted({path.name for path in tmp_path.glob("*.txt")} - before)
    assert made == ["11-sink.txt", "12-compact.txt", "13-cleanup.txt"]
    assert (tmp_path / made[-1]).read_text() == text + "\n"
