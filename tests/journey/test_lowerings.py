"""Every lowering in every engine: equal to the masked model, rows as the policy says, whatever is kept."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import ops
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import read, stage
from tpcompile.engine import Engine
from tpcompile.errors import UsageError
from tpcompile.plan import Wish
from tpcompile.rows import Rows
from tpcompile.subject import subject_of

TARGETS = runnable()
LENGTH, WIDTH = 12, 8


class Model(nn.Module):
    """Two sites, attention under a mask behind each, a residual stream and an output at full length; ``drop`` says who falls where."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, drop: Tensor) -> dict[str, Tensor]:
        skip, first = x, drop != 1
        x = ops.prune(x, first, x.sum(-1))
        x = self.inner(self.attend(x, first)) + x
        base, second = x, first & (drop != 2)
        x = ops.prune(x, second, x.sum(-1))
        x = self.outer(self.attend(x, second)) + skip
        weight = second.unsqueeze(-1).to(x.dtype)
        full = ops.restore(ops.restore(x, second, base), first, skip)
        return {"mean": (x * weight).sum(1) / weight.sum(1).clamp(min=1.0), "tokens": self.head(full)}

    def attend(self, x: Tensor, keep: Tensor) -> Tensor:
        p = (x @ x.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), -1e4).softmax(-1) * keep.unsqueeze(2)
        return p @ x


def inputs(*patterns: str, length: int = LENGTH) -> dict[str, Tensor]:
    """A sample a pattern: ``1`` falls at the first site, ``2`` at the second, ``.`` at neither; short patterns repeat."""
    generator = torch.Generator().manual_seed(len(patterns[0]))
    codes = [[int(c.replace(".", "0")) for c in (pattern * length)[:length]] for pattern in patterns]
    return {"x": torch.randn(len(patterns), length, WIDTH, generator=generator), "drop": torch.tensor(codes)}


POLICIES = {"one": {1: "n"}, "ragged": {0: "batch", 1: "n"}, "fixed": {}}


@pytest.fixture(scope="module", params=POLICIES)
def compiled(request: pytest.FixtureRequest) -> tuple[str, Compiled]:
    """The toy for one sample of any length, for batches of them, and for batches of 3 of one length."""
    policy = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model().eval()
    example = inputs(*([".1.2"] if policy == "one" else [".1.2", "..1", ".2"]))
    dynamic = dict.fromkeys(example, POLICIES[policy])
    subject = subject_of(model, example, dynamic, None, None, batch="one" if policy == "one" else "ragged")
    return policy, compile_subject(subject)


@dataclass(frozen=True)
class Case:
    """A lowering, and how many rows it stores at both sites where ``first`` and ``second`` are needed of ``length``."""

    wish: Wish
    rows: tuple[Rows, Rows]


CASES = {
    "dynamic": Case(Wish("dynamic"), (Rows(), Rows())),
    "bucketed": Case(Wish("bucketed", buckets=(4,)), (Rows((4,)),) * 2),
    "ladder": Case(Wish("bucketed", buckets=(3, 7)), (Rows((3, 7)),) * 2),
    "static": Case(
        Wish("static", calibrate=[{k: v.numpy() for k, v in inputs("....11......" if i else ".2").items()} for i in range(2)]),
        (Rows(limit=12), Rows(limit=10)),
    ),
}
PATTERNS = (".", ".1", "1", "2", ".1.2", "..2", "1...", ".11111111111", ".2222222222.")


STAGED = {("onnx", "one", "dynamic"), ("onnx", "fixed", "static"), ("openvino", "ragged", "bucketed")}
"""What is built in stages too: each target, batch policy and lowering once; `benchmarks/lowerings.py` has all of them."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_engine_equals_the_masked_model(compiled: tuple[str, Compiled], name: str, target: str, tmp_path: Path) -> None:
    prove(compiled, CASES[name], target, tmp_path / "out")
    if (target, compiled[0], name) in STAGED:
        wish = replace(CASES[name].wish, form="staged")
        prove(compiled, replace(CASES[name], wish=wish), target, tmp_path / "staged")


def prove(compiled: tuple[str, Compiled], case: Case, target: str, out: Path) -> None:
    """Build, and compare with the masked model."""
    policy, built = compiled
    wish = case.wish if policy != "fixed" else three(case.wish)
    form = "staged" if wish.form == "staged" else "single"
    with stage(out) as folder:
        plan = fill(folder, built, target, wish=wish)
    manifest = read(out).manifest
    assert (plan.lowering, plan.form) == (manifest.lowering, manifest.form) == (case.wish.lowering, form)
    assert manifest.counts == ((12, 10) if plan.lowering == "static" else ())
    assert len([name for name in manifest.files if name.startswith("stage") and Path(name).suffix in (".onnx", ".xml")]) == (
        3 if form == "staged" else 0
    )
    with tpcompile.load(out) as engine:
        for length in (LENGTH,) if policy == "fixed" else (2, 5, 12, 21):
            for group in [PATTERNS[i : i + 3] for i in range(0, 9, 3)] if policy != "one" else [[p] for p in PATTERNS]:
                check(engine, built, case, inputs(*group, length=length))


def three(wish: Wish) -> Wish:
    """The same for a fixed batch of three."""
    given = wish.calibrate
    assert given is None or isinstance(given, list)
    stacked = [{k: np.concatenate([v] * 3) for k, v in one.items()} for one in given] if given else None
    return replace(wish, calibrate=stacked)


def check(engine: Engine, built: Compiled, case: Case, drawn: dict[str, Tensor]) -> None:
    """Outputs, kept sets and stored rows of one batch."""
    assert isinstance(built.subject.model, nn.Module)
    with torch.no_grad():
        want = built.subject.model(**drawn)
    arrays = {name: value.numpy() for name, value in drawn.items()}
    outputs, kept = engine.kept_each(**arrays)
    plain = engine(**arrays)
    firsts, seconds = drawn["drop"] != 1, (drawn["drop"] != 1) & (drawn["drop"] != 2)
    length = drawn["drop"].shape[1]
    if any(sum(one.lost) for one in kept):
        assert case.wish.lowering == "static"
        assert int(firsts.sum(1).max()) > 12 or int(seconds.sum(1).max()) > 10
        return
    for name, value in want.items():
        for got in (outputs[name], plain[name]):
            assert np.abs(got - value.numpy()).max() <= 1e-5 * max(1.0, value.abs().max().item()), name
    for b, one in enumerate(kept):
        np.testing.assert_array_equal(one.masks[0], firsts[b].numpy())
        np.testing.assert_array_equal(one.masks[1], seconds[b].numpy())
    stored = length
    for site, keep in enumerate((firsts, seconds)):
        needed = keep.clone()
        needed[:, 0] = True  # position 0 is always stored
        exact = int(needed.sum(1).max())
        stored = min(stored, case.rows[site].count(exact, stored))
        single = case.wish.lowering == "dynamic" and stored == 2 and exact == 1  # one ONNX graph for one sample may store one row
        assert {one.stored[site] for one in kept} <= ({1, 2} if single else {stored})


@pytest.mark.parametrize("target", TARGETS)
def test_static_counts_what_overflows(compiled: tuple[str, Compiled], target: str, tmp_path: Path) -> None:
    """Calibrated on few tokens: samples that keep more are reported, not judged; the others are exact."""
    policy, built = compiled
    samples = [inputs(*[".11"] * (1 if policy == "one" else 3))] * 2
    with stage(tmp_path / "out") as folder:
        fill(folder, built, target, wish=Wish("static", calibrate=[{k: v.numpy() for k, v in one.items()} for one in samples]))
    assert read(tmp_path / "out").manifest.counts == (4, 4)
    assert read(tmp_path / "out").manifest.reason == "asked for; the largest count of 2 samples of the caller"
    with tpcompile.load(tmp_path / "out") as engine:
        pair = [inputs(*[pattern] * (1 if policy == "one" else 3)) for pattern in (".11", ".")]
        for drawn, lost in zip(pair, ((0, 0), (8, 0)), strict=True):
            outputs, kept = engine.kept_each(**{name: value.numpy() for name, value in drawn.items()})
            assert {one.lost for one in kept} == {lost}
            assert {one.stored for one in kept} == {(4, 4)}
            assert np.isfinite(outputs["mean"]).all()
            for b, one in enumerate(kept):  # the highest scores stay, beside position 0
                score = drawn["x"][b].sum(-1)
                order = sorted(range(1, LENGTH), key=lambda i: -score[i].item())
                if lost[0]:
                    assert set(np.flatnonzero(one.masks[0]).tolist()) == {0, *order[:3]}
    if policy == "one":
        rows: list[dict[str, Any]] = [{k: v.numpy() for k, v in inputs(p).items()} for p in (".11", ".111", ".11111", ".")]
        parity = validated(tmp_path / "out", rows)
        assert (parity.verdict, parity.overflow) == ("PASSED", 1)
        assert parity.reason == (
            "3 of 4 samples within 1e-05 of the masked reference; left out: 1 with more tokens than the constant counts hold"
        )
        assert [record.verdict for record in parity.samples] == ["equal"] * 3 + ["overflow"]
        assert parity.overflow_gap > 1e-3
        assert "1 keep more than the constant counts hold: approximate, off by up to" in parity.text()


def validated(path: Path, rows: list[dict[str, Any]]) -> Any:
    """`validate` on arrays of the caller."""
    from tpcompile.data.samples import Sample
    from tpcompile.engine import open_reference
    from tpcompile.proof.parity import validate

    with tpcompile.load(path) as engine, open_reference(read(path)) as reference:
        static = engine.manifest.lowering == "static"
        return validate(engine, reference.kept_each, None, [Sample("", row) for row in rows], static=static)


def test_tuning_times_what_is_open_and_records_it(compiled: tuple[str, Compiled], tmp_path: Path) -> None:
    """The reason is part of the bundle's identity, the figures are not."""
    policy, built = compiled
    if policy != "one":
        pytest.skip("one batch policy is enough")
    rows = [{k: v.numpy() for k, v in inputs(".1.2", length=length).items()} for length in (9, 14)]
    with stage(tmp_path / "out") as folder:
        plan = fill(folder, built, "onnx", wish=Wish("dynamic", calibrate=rows, tune=True))
    manifest = read(tmp_path / "out").manifest
    assert manifest.reason == plan.reason
    assert plan.reason.startswith("measured: ")
    assert plan.reason.endswith("on 2 samples of the caller")
    tried: Any = manifest.measured["tune"]
    assert [(one["lowering"], one["form"]) for one in tried] == [("dynamic", "single"), ("dynamic", "staged")]
    assert all(one["cold_ms"] > 0 and one["warm_ms"] > 0 for one in tried)
    assert manifest.form == plan.form
    assert not list(tmp_path.glob(".*"))


def test_static_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        tpcompile.export(
            Model().eval(), inputs(".1"), tmp_path / "out", dynamic={name: {1: "n"} for name in ("x", "drop")}, lowering="static"
        )
    assert str(caught.value) == (
        "constant counts are taken from data, and none comes with this model\n"
        "  fix     give real inputs: --calibrate F, a file or folder of tensors; in Python also calibrate=[{name: array, ...}, ...]"
    )
    assert not (tmp_path / "out").exists()
