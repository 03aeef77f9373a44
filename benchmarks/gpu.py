"""Dense against pruned on an NVIDIA GPU, by whatever this machine has: eager torch, torch.compile, AOTInductor, TensorRT, ONNX Runtime.

    python benchmarks/gpu.py                       DeiT-S, DeiT-B, BERT-base at 128 and 512 tokens, batch 1, 8 and 32; writes gpu.json
    python benchmarks/gpu.py --only DeiT-S --batch 1 --minutes 5 -o some.json

Random weights: what is kept follows from scores near 1 / N. Every contender is first compared with the masked model in eager torch;
then all are timed in turns, on inputs that change from call to call. What cannot be had here is in the JSON with its reason. Without a
GPU the script ends with exit code 3.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import models, ops
from tpcompile.backends import backend
from tpcompile.backends.tensorrt.driver import gpus
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import stage
from tpcompile.capture import tracing
from tpcompile.engine import load
from tpcompile.errors import BackendUnavailable, TpcompileError, first_line
from tpcompile.models.library import timm, transformers
from tpcompile.onnx.emit import emit
from tpcompile.plan import Wish
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT
from tpcompile.subject import subject_of

OUT = Path(__file__).resolve().parent / "results" / "gpu.json"
BATCHES, DRAWS, ROUNDS = (1, 8, 32), 4, 12
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape: a random model, its inputs, and the method that prunes it.

    Attributes:
        name: as the JSON has it.
        dense: makes the model.
        draw: a batch of random inputs.
        method: of ``tpcompile.models.prune``.
        thresholds: of the method.
    """

    name: str
    dense: Callable[[], nn.Module]
    draw: Callable[[int, int], Inputs]
    method: str
    thresholds: tuple[float, ...]


def deit(name: str, width: int, heads: int, depth: int = 12, image: int = 224) -> Case:
    """A DeiT whose blocks 4, 7 and 10 drop what the class token looks at less than evenly."""

    def dense() -> nn.Module:
        timm()
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        return VisionTransformer(img_size=image, embed_dim=width, num_heads=heads, depth=depth).eval()

    def draw(batch: int, seed: int) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(seed))}

    even = 1 / ((image // 16) ** 2 + 1)
    return Case(
        name, dense, draw, "cls-attention", tuple(0.98 * even if block % 3 == 0 and block else 0.0 for block in range(depth))
    )


def bert(name: str, tokens: int, width: int = 768, depth: int = 12) -> Case:
    """A BERT under LTP, thresholds rising to an even share of attention."""

    def dense() -> nn.Module:
        library = transformers()
        torch.manual_seed(0)
        config = library.BertConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, intermediate_size=4 * width,
            attn_implementation="sdpa",
        )  # fmt: skip
        module: nn.Module = library.BertForSequenceClassification(config).eval()
        return module

    def draw(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, 30000, (batch, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Case(name, dense, draw, "ltp", tuple(layer / (depth - 1) / tokens for layer in range(depth)))


CASES = (deit("DeiT-S", 384, 6), deit("DeiT-B", 768, 12), bert("BERT-base 128", 128), bert("BERT-base 512", 512))


def require_gpu() -> None:
    """Refuse a machine without a GPU that torch can use.

    Raises:
        BackendUnavailable: with the reason.
    """
    if torch.cuda.is_available():
        return
    here = gpus()
    reason = here.reason or f"this torch ({torch.__version__}) was built without CUDA"
    raise BackendUnavailable(
        f"nothing can be measured: {reason}", fix="run it on a machine with an NVIDIA GPU and a CUDA build of torch"
    )


def _compact(
    x: Tensor, keep: Tensor, pinned: Tensor, score: Tensor | None = None, ladder: Sequence[int] | None = None, limit: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's meaning for the exact lowering in ops that Inductor compiles: ``tpcompile.rows.store``."""
    stored = keep | pinned
    count = stored.sum(1).amax().clamp(min=MIN_COUNT).item()
    torch._check(count >= MIN_COUNT)
    torch._check(count <= x.shape[1])
    index = torch.argsort((~stored).to(torch.int64), dim=1, stable=True)[:, :count]  # type: ignore[misc]  # an unbacked size
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])), torch.gather(keep, 1, index), index


def _take(x: Tensor, index: Tensor, batch: int, dim: int) -> Tensor:
    """``tpcompile.ops.take``."""
    rows = x.movedim((batch, dim), (0, 1))
    rows = rows.expand(index.shape[0], *rows.shape[1:])
    spread = index.reshape(*index.shape, *([1] * (rows.dim() - 2))).expand(*index.shape, *rows.shape[2:])
    return torch.gather(rows, 1, spread).movedim((0, 1), (batch, dim))


def plain(program: Program, device: str) -> ExportedProgram:
    """A compact program in torch's own ops, on a device."""
    from torch.export.passes import move_to_device_pass

    with torch.no_grad(), tracing():
        exported = program.exported.run_decompositions({ops.COMPACT: _compact, ops.TAKE: _take})
    return move_to_device_pass(exported, device)


def packaged(program: Program, device: str, path: Path) -> Run:
    """An AOTInductor package of a compact program, compiled and loaded."""
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(plain(program, device), package_path=str(path))
    )
    return lambda inputs: _first(loaded(inputs=inputs))


def _first(found: Any) -> Tensor:
    """The first output, whatever holds it."""
    if isinstance(found, Tensor):
        return found
    values = list(found.values()) if isinstance(found, Mapping) else list(found)
    first: Tensor = values[0]
    return first


def _module(module: nn.Module, device: str) -> Run:
    there = module.to(device)
    takes_names = not hasattr(module, "patch_embed")
    return lambda inputs: _first(there(**inputs) if takes_names else there(*inputs.values()))


def tensorrt(target: str, compiled: Compiled, folder: Path) -> dict[str, Run]:
    """Pruned and dense fp16 plans, in the form the target takes by itself, through engines: copies from and to the host included."""
    with stage(folder / target) as fresh:
        fill(fresh, compiled, target, "fp16", wish=Wish(dims={"batch": (1, 8, 32)}, profiled=True))

    def run(path: Path) -> Run:
        engine = load(path)
        return lambda inputs: torch.from_numpy(next(iter(engine(**{n: v.cpu().numpy() for n, v in inputs.items()}).values())))

    return {"pruned": run(folder / target), "dense": run(folder / target / "dense")}


def onnxruntime(program: Program, path: Path) -> Run:
    """The emitted graph on ONNX Runtime's CUDA provider.

    Raises:
        BackendUnavailable: this build has none.
    """
    import onnxruntime as runtime

    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise BackendUnavailable("this onnxruntime has no CUDA provider", fix="pip install onnxruntime-gpu")
    emit(program).save(path)
    session = runtime.InferenceSession(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {n: v.cpu().numpy() for n, v in inputs.items()})[0])


def contenders(case: Case, device: str, folder: Path) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Everything that may be had, by name; each is made when it is asked for, so that what fails, fails alone."""
    dense, pruned = case.dense(), models.prune(case.dense(), method=case.method, thresholds=list(case.thresholds))
    example = case.draw(2, 0)
    dynamic = {name: {0: "batch"} for name in example}
    compiled = compile_subject(subject_of(pruned, example, dynamic, None, None, batch="ragged"))
    yield "masked eager", lambda: _module(pruned, device)
    yield "dense eager", lambda: _module(dense, device)
    yield "dense compile", lambda: _module(torch.compile(dense), device)  # type: ignore[arg-type]  # it is a module still
    yield "pruned eager", lambda: _gathered(compiled.compact, device)
    for kind, program in (("dense", compiled.dense), ("pruned", compiled.compact)):
        yield f"{kind} aoti", partial(packaged, program, device, folder / f"{kind}.pt2")
        yield f"{kind} onnxruntime", partial(onnxruntime, program, folder / f"{kind}.onnx")
    for target in ("tensorrt", "tensorrt-rtx"):
        plans = cache(partial(tensorrt, target, compiled, folder))
        for kind in ("dense", "pruned"):
            yield f"{kind} {target}", partial(_of, plans, kind)


def _of(made: Callable[[], dict[str, Run]], kind: str) -> Run:
    return made()[kind]


def _gathered(program: Program, device: str) -> Run:
    module = plain(program, device).module(check_guards=False)  # one sample is refused by guards, and computed well without them
    return lambda inputs: _first(module(inputs=inputs))


def measured(case: Case, batch: int, made: Mapping[str, Run], device: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each contender: how far from the masked model, and its median time in turns with the others."""
    rows: dict[str, dict[str, Any]] = {name: {"case": case.name, "batch": batch, "contender": name} for name in made}
    found: dict[str, dict[str, Any]] = {}
    absent: list[dict[str, Any]] = []
    with torch.no_grad():
        try:
            draws = [{name: value.to(device) for name, value in case.draw(batch, seed).items()} for seed in range(DRAWS)]
            truth = [made["masked eager"](one).cpu() for one in draws]
        except Exception as error:  # a batch beyond the GPU's memory: smaller ones are measured all the same
            why = dict.fromkeys(made, "no reference at this batch") | {"masked eager": _reason(error)}
            return [row | {"absent": why[name]} for name, row in rows.items()]
        for name, run in made.items():
            try:
                gaps = [
                    (run(one).cpu() - want).abs().max() / want.abs().max().clamp(min=1)
                    for one, want in zip(draws, truth, strict=True)
                ]
            except Exception as error:  # such as a batch beyond its range, or beyond the GPU's memory
                absent.append(rows[name] | {"absent": _reason(error)})
                continue
            found[name] = rows[name] | {"off_by": float(max(gaps)) if not name.startswith("dense") else None}
        times: dict[str, list[float]] = {name: [] for name in found}
        for number in range(rounds):
            order = list(found) if number % 2 else list(found)[::-1]
            for name in order:
                times[name].append(_time(made[name], draws[number % DRAWS], device))
    dense = [statistics.median(spent) for name, spent in times.items() if name.startswith("dense")]
    for name, row in found.items():
        middle = statistics.median(times[name])
        row |= {"ms": middle, "fastest_ms": min(times[name]), "against_best_dense": min(dense) / middle if dense else None}
    return [*found.values(), *absent]


def _time(run: Run, inputs: Inputs, device: str) -> float:
    """Milliseconds of one call, from an idle device to its last kernel."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    begin = time.perf_counter()
    run(inputs)
    sync()
    return 1000 * (time.perf_counter() - begin)


def case_rows(case: Case, batches: Sequence[int], device: str, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """Make every contender of a case once, then measure it at every batch; what cannot be made is a row with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Run] = {}
        for name, make in contenders(case, device, Path(folder)):
            begin = time.perf_counter()
            try:
                run = make()
                with torch.no_grad():
                    run({name: value.to(device) for name, value in case.draw(2, 0).items()})  # some compile now
                made[name] = run
            except Exception as error:  # whatever a library raises: the others are measured all the same
                yield {"case": case.name, "contender": name, "absent": _reason(error)}
                continue
            yield {"case": case.name, "contender": name, "made_s": round(time.perf_counter() - begin, 1)}
        if "masked eager" not in made:
            return  # nothing to compare with; its row says why
        for batch in batches:
            yield from measured(case, batch, made, device, rounds)


def _reason(error: Exception) -> str:
    """Our own errors say it in a line; of others the class tells, too."""
    return first_line(error) if isinstance(error, TpcompileError) else f"{type(error).__name__}: {first_line(error)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save after every row; the exit code is 3 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        require_gpu()
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return error.exit_code
    end, rows = time.monotonic() + 60 * options.minutes, []
    head = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
    }
    head |= {"tensorrt": backend("tensorrt").probe().version or "absent"}
    for case in [case for case in CASES if options.only is None or case.name in options.only]:
        for row in case_rows(case, options.batch or BATCHES, "cuda"):
            rows.append(row)
            options.output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), file=sys.stderr, flush=True)
            if time.monotonic() > end:
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
