"""``explain MODEL``: what is said of a model that compiles, and of one that is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.export import Dim

from tpcompile import ops
from tpcompile.cli import main
from tpcompile.explanation import STEPS, explain
from tpcompile.flops import evaluate


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["explain", *(str(argument) for argument in arguments)])


def numberless(text: str) -> str:
    """Without the lines of this file, which move."""
    return re.sub(r"(test_explanation\.py):\d+", r"\1:N", text)


class Scale(nn.Module):
    """A linear map without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 500, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x))


class Marked(nn.Module):
    """Tokens whose first channel is not positive are dropped; the first token is read whether dropped or not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scale()])
        self.head = nn.Linear(500, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        keep = x[..., 0] > 0.0
        x = self.blocks[0](ops.prune(x, keep))
        return self.head((x * keep.unsqueeze(-1)).sum(1) + x[:, 0])


class Found(nn.Module):
    """Two masks by which nobody marked a site: the second drops rows, the first is what pools."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x) > 0
        x = self.up(x.masked_fill(~gates[..., 1:], 0.0))
        return (torch.tanh(x) * gates[..., :1]).sum(1)


def example() -> Tensor:
    """Six tokens, of which the third and the fifth live."""
    x = torch.zeros(1, 6, 8) - 1.0
    x[0, [2, 4], 0] = 1.0
    return x


def saved(model: nn.Module, path: Path) -> Path:
    torch.manual_seed(0)
    program = torch.export.export(model.eval(), (example(),), dynamic_shapes={"x": {1: Dim("n", min=2, max=40)}})
    torch.export.save(program, path)
    return path


PAGE = """\
model     exported (ExportedProgram), batch one
method    none: the model's own masks or marks
dims      x_1 2..40
site0     test_explanation.py:N in forward:  x = self.blocks[0](ops.prune(x, keep))
          keeps t1 < t0 by %gt: bool[1, t0] = aten.gt.Scalar(%select, 0.0)   # test_explanation.py:N
          pins the first 1: stored even when dropped, for what reads their position
tokens    t0: 6 in the example
tokens    t1 < t0, from site0: 2 in the example, 3 stored
saves     narrow: 0 results in windows
saves     tally: 0 sums over maps
saves     hoist: 0 products with a smaller side
saves     sink: 0 results on a newer set, 0 left where fetching their rows costs more than it saves
assumes   activations are finite: 0 * x is 0

kFLOPs of the example: with every token (dense), the tokens alive (paper), the rows of the compact program (graph)
by tokens                                           dense        paper        graph
  fixed                                             4.000        4.000        4.000
  t1                                               48.000       16.000       24.000
by layer                                            dense        paper        graph
  blocks.0                                         48.000       16.000       24.000
  head                                              4.000        4.000        4.000
  all                                              52.000       20.000       28.000
"""


def test_the_page_of_a_model(tmp_path: Path) -> None:
    result = call(saved(Marked(), tmp_path / "marked.pt2"))
    assert result.exit_code == 0, result.output
    assert numberless(result.stdout) == PAGE


def test_the_document_of_a_model(tmp_path: Path) -> None:
    document = json.loads(numberless(call(saved(Marked(), tmp_path / "marked.pt2"), "--json").stdout))
    assert document["sites"] == [
        {
            "name": "site0", "at": "test_explanation.py:N in forward:  x = self.blocks[0](ops.prune(x, keep))", "module": "",
            "keep": "gt", "mask": "%gt: bool[1, t0] = aten.gt.Scalar(%select, 0.0)   # test_explanation.py:N", "score": None,
            "keeps": "t1 < t0", "pinned": 1,
        }
    ]  # fmt: skip
    assert document["tokens"] == [{"name": "t0", "alive": 6, "stored": 6}, {"name": "t1", "alive": 2, "stored": 3}]
    assert document["flops"]["paper"] == [[4000, []], [8000, ["t1"]]]
    assert document["flops"]["dense"] == [[4000, []], [8000, ["t0"]]]
    assert document["flops"]["modules"][-1] == {"module": "all", "dense": 52000, "paper": 20000, "graph": 28000}
    assert [line.partition(": ")[0] for line in document["report"]] == ["accepted", "narrow", "tally", "hoist", "sink"]


def test_a_mask_that_was_found_is_told(tmp_path: Path) -> None:
    class Own(Found):
        def forward(self, x: Tensor) -> Tensor:
            keep = (self.gate(x) > 0)[..., 1:]
            return torch.tanh(self.up(x.masked_fill(~keep, 0.0)) * keep).sum(1)

    page = call(saved(Own(), tmp_path / "own.pt2")).stdout
    (tried,) = [row for row in page.splitlines() if row.startswith("tried ")]
    assert tried.startswith("tried     recognised: ")
    assert " drops rows of " in tried


LINE = (
    "refused: bitwise_not at test_explanation.py:N in forward:  x = self.up(x.masked_fill(~gates[..., 1:], 0.0)): UnmaskedFold: "
)
SUM = "aten.sum.dim_IntList combines over tokens that site0 (test_explanation.py:N) dropped, and nothing masks them there"


FIX = (
    "multiply by the keep mask before a sum, or fill with -inf or -1e4 before a softmax or max; "
    "the masked model reads dropped tokens here"
)


def test_a_refused_model_is_told_with_what_was_tried(tmp_path: Path) -> None:
    path = saved(Found(), tmp_path / "found.pt2")
    result = call(path)
    assert result.exit_code == 4
    assert result.stdout == ""
    assert numberless(result.stderr).splitlines() == [
        f"tried     {LINE}{SUM}",
        f"UnmaskedFold: {SUM}",
        "  at      test_explanation.py:N in forward:  return (torch.tanh(x) * gates[..., :1]).sum(1)",
        "  node    %sum_1: f32[1, 8] = aten.sum.dim_IntList(%mul_19, [1])   # test_explanation.py:N",
        "  during  recognise, after canonicalize",
        f"  fix     {FIX}",
    ]
    error = json.loads(numberless(call(path, "--json").stdout))["error"]
    assert (error["class"], error["exit_code"], error["report"]) == ("UnmaskedFold", 4, [f"{LINE}{SUM}"])


def test_a_refusal_stands_in_the_dump(tmp_path: Path) -> None:
    line: list[Any] = ["export", "onnx", "-m", saved(Found(), tmp_path / "found.pt2"), "-o", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(part) for part in (*line, "--dump-ir", tmp_path / "ir")])
    assert result.exit_code == 4, result.output
    rules = numberless((tmp_path / "ir" / "rules.txt").read_text(encoding="utf-8")).splitlines()
    assert rules[:2] == [f"{LINE}{SUM}", f"UnmaskedFold: {SUM}"]
    assert rules[-1].startswith("  fix     multiply by the keep mask")
    assert "tried" not in result.stderr


def test_a_directory_with_its_options(bert_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    thresholds = {"thresholds": [0.0, 0.04, 0.06]}
    found = explain(
        str(bert_folder), method="ltp", parameters=thresholds, batch="ragged", progress=lambda *step: seen.append(step)
    )
    assert seen == [(step, i, len(STEPS)) for i, step in enumerate(STEPS)]
    document = found.to_json()
    assert document["method"]["name"] == "ltp"
    assert (document["batch"], list(document["dims"])) == ("ragged", ["batch", "seq"])
    rows, total = document["flops"]["modules"][:-1], document["flops"]["modules"][-1]
    for kind, sizes in (
        ("paper", found.alive),
        ("graph", found.stored),
        ("dense", dict.fromkeys(found.alive, found.alive["t0"])),
    ):
        assert sum(row[kind] for row in rows) == total[kind] == evaluate(document["flops"][kind], sizes)
    assert [row["module"] for row in rows if row["module"].startswith("body")] == ["body.steps.0", "body.steps.1", "body.steps.2"]
    assert any("living logits" in text for text in document["assumptions"])
    assert len(document["bounds"]) == len([text for text in found.text().splitlines() if text.startswith("measured ")])


def test_what_was_measured_at_capture_is_told(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bound = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            keep = x[..., 0] > 0.0
            x = ops.prune(x, keep) * (2.0 if self.bound > 0.0 else 1.0)
            return (x * keep.unsqueeze(-1)).sum(1)

    found = explain(Gated().eval(), {"x": example()}, dynamic={"x": {1: "n"}})
    assert "bound = 0, its value at capture" in "\n".join(found.to_json()["assumptions"]), found.to_json()["assumptions"]


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["Nothing"], "no error and no model is called 'Nothing'", "pass a model as for `tpcompile export -m`, or 'backends', or one of "),
        (["UnmaskedFolds"], "no error and no model is called 'UnmaskedFolds' (did you mean 'UnmaskedFold'?)", "pass a model as for "),
        (["no/such"], "no directory 'no/such'; if it is a model id, tpcompile does not download", "run: hf download no/such "),
        (["timm/nothing"], "timm has no model 'nothing'", ""),
        (["nothing.pt2"], "no file nothing.pt2", "pass the .pt2 that torch.export.save wrote"),
        (["tpcompile/digits-vit"], "tpcompile/digits-vit is a dense model", "say how to prune it: --method "),
    ],
)  # fmt: skip
def test_what_is_no_model_is_a_usage_error(words: list[str], message: str, fix: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert f"UsageError: {message}" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"  fix     {fix}")
