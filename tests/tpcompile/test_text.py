import re

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.passes import Canonicalize, Mark, Pipeline, Place
from tpcompile.text import line


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.fc(ops.prune(x, keep)) * keep.unsqueeze(-1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        values, _ = self.part(x, keep).sum(1).sort(-1)
        return values, keep.sum(1)


def test_a_program_reads_line_by_line() -> None:
    inputs = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool)}
    program = capture(Model().eval(), inputs, {name: {1: "n"} for name in inputs})
    placed = Pipeline((Canonicalize(), Mark(), Place()))(program)
    assert_expected_inline(
        re.sub(r"py:\d+", "py:00", str(placed)),
        """\
program @ placed
tokens t1 < t0   site0  test_text.py:00  part
input %inputs_x: f32[1, t0, 4]
input %inputs_keep: bool[1, t0]
%prune: f32[1, t1, 4] = tpcompile.prune.default(%inputs_x, %inputs_keep)   # part test_text.py:00
%linear: f32[1, t1, 4] = aten.linear.default(%prune, %p_captured_part_fc_weight)   # part.fc test_text.py:00
%unsqueeze: bool[1, t1, 1] = aten.unsqueeze.default(%inputs_keep, -1)   # part test_text.py:00
%mul_7: f32[1, t1, 4] = aten.mul.Tensor(%linear, %unsqueeze)   # part test_text.py:00
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_7, [1])   # test_text.py:00
%sort: tuple = aten.sort.default(%sum_1)   # test_text.py:00
%getitem: f32[1, 4] = getitem(%sort, 0)   # test_text.py:00
%sum_2: i64[1] = aten.sum.dim_IntList(%inputs_keep, [1])   # test_text.py:00
return (%getitem, %sum_2)""",
    )
    assert line(program.graph.output_node()).startswith("return (%getitem, %")
