"""Passes as values, and the pipeline around them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import StageError, UnmaskedFold, UsageError
from tpcompile.passes import (
    DEFAULT,
    PASSES,
    Canonicalize,
    Cleanup,
    Compact,
    Dump,
    GraphPass,
    Mark,
    Pipeline,
    Recognise,
    Sink,
    pipeline,
)
from tpcompile.program import Program, Stage


class Pool(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).sum(1)


class Unmasked(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.prune(x, keep).sum(1)


@dataclass(frozen=True)
class Nothing(GraphPass):
    """Changes nothing, or forgets its promise."""

    name: ClassVar[str] = "nothing"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.MARKED
    depth: int = 1

    def run(self, program: Program) -> Program:
        return program


def test_a_pass_prints_its_changed_options() -> None:
    assert [str(Nothing()), str(Nothing(depth=2)), str(Canonicalize())] == ["nothing", "nothing{depth=2}", "canonicalize"]


def test_a_pass_checks_the_stage(toy: Callable[..., Program]) -> None:
    with pytest.raises(StageError) as caught:
        Compact()(toy(Pool()))
    assert (
        str(caught.value)
        == "compact takes a placed program, this one is captured\n  fix     run the passes in the pipeline's order"
    )


def test_a_pipeline_must_chain() -> None:
    with pytest.raises(StageError) as caught:
        Pipeline((Canonicalize(), Compact()))
    assert str(caught.value) == "canonicalize gives captured, compact takes placed\n  fix     reorder the passes"


def test_a_pipeline_prints_and_parses() -> None:
    text = "canonicalize,recognise,mark,place,narrow,tally,hoist,sink,compact,cleanup"
    assert str(DEFAULT) == text
    assert Pipeline.parse(text, PASSES) == DEFAULT
    assert Pipeline.parse(" canonicalize, recognise, mark ", PASSES) == Pipeline((Canonicalize(), Recognise(), Mark()))
    ragged = pipeline("ragged", ("site0", "site2"))
    assert str(ragged) == (
        "canonicalize,recognise{batch=ragged},mark{batch=ragged},place{assume_masked=site0+site2},narrow,tally,hoist,sink,compact,cleanup"
    )
    assert Pipeline.parse(str(ragged), PASSES) == ragged
    assert Pipeline.parse("sink{tokens=64,keep=0.5}", PASSES) == Pipeline((Sink(tokens=64, keep=0.5),))
    for square in (False, True):
        assert Pipeline.parse(f"sink{{square={square}}}", PASSES) == Pipeline((Sink(square=square),))
    for bad in ("tokens=many", "square=no"):
        with pytest.raises(UsageError, match="bad option"):
            Pipeline.parse(f"sink{{{bad}}}", PASSES)
    with pytest.raises(UsageError, match="unknown option"):
        Pipeline.parse("mark{colour=red}", PASSES)
    with pytest.raises(UsageError) as caught:
        Pipeline.parse("canonicalize,fold", PASSES)
    assert (
        str(caught.value) == "unknown pass: fold\n"
        "  fix     passes are canonicalize, recognise, mark, place, narrow, tally, hoist, sink, compact, cleanup, impose, skip, lower"
    )


def test_the_history_is_the_pipeline(toy: Callable[..., Program]) -> None:
    program = DEFAULT(toy(Pool()))
    assert ",".join(program.history) == str(DEFAULT)
    assert program.stage is Stage.COMPACT


def test_every_stage_is_verified(toy: Callable[..., Program]) -> None:
    with pytest.raises(StageError, match="verifier of stage marked: no prune site") as caught:
        Pipeline((Canonicalize(), Nothing()))(toy(Pool()))
    assert caught.value.during == "nothing, after canonicalize"


def test_the_hook_sees_every_step(toy: Callable[..., Program]) -> None:
    seen: list[tuple[str, Stage, Stage]] = []
    DEFAULT(toy(Pool()), lambda step, before, after, seconds: seen.append((step.name, before.stage, after.stage)))
    assert [name for name, _, _ in seen] == [step.name for step in DEFAULT.passes]
    assert [after for _, _, after in seen] == [step.gives for step in DEFAULT.passes]


def test_dump_writes_every_step(toy: Callable[..., Program], tmp_path: Path) -> None:
    program = DEFAULT(toy(Pool()), Dump(tmp_path / "ir"))
    steps = [f"{number:02d}-{step.name}" for number, step in enumerate(DEFAULT.passes, 1)]
    expected = ["00-captured.txt", *(f"{step}.{kind}" for step in steps for kind in ("diff", "txt")), "rules.txt"]
    assert sorted(p.name for p in (tmp_path / "ir").iterdir()) == sorted(expected)
    assert (tmp_path / "ir" / f"{steps[-1]}.txt").read_text() == f"{program}\n"
    diff = (tmp_path / "ir" / f"{steps[-2]}.diff").read_text()
    assert "-%prune: f32[1, t1, 4] = tpcompile.prune.default(%inputs_x, %inputs_keep)" in diff
    rules = (tmp_path / "ir" / "rules.txt").read_text().splitlines()
    assert rules[0].startswith("accepted: site0 at test_base.py:")
    assert rules[-1] == "assumed: activations are finite: 0 * x is 0"


def test_a_refusal_leaves_the_dump_of_the_steps_before(toy: Callable[..., Program], tmp_path: Path) -> None:
    with pytest.raises(UnmaskedFold):
        DEFAULT(toy(Unmasked()), Dump(tmp_path))
    assert (tmp_path / "03-mark.txt").is_file()
    assert not (tmp_path / "04-place.txt").exists()


def test_a_pass_without_run_says_so(toy: Callable[..., Program]) -> None:
    @dataclass(frozen=True)
    class Empty(GraphPass):
        name: ClassVar[str] = "empty"
        takes: ClassVar[Stage] = Stage.CAPTURED
        gives: ClassVar[Stage] = Stage.CAPTURED

    with pytest.raises(StageError, match="pass empty does not implement run"):
        Empty()(toy(Pool()))
    assert Cleanup() == Cleanup()
