"""What is measured, as data: a cell is one workload at one FLOPs ratio, on one engine, at one batch size and number of threads."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

ENGINES = ("onnx-fp32", "openvino-fp32", "openvino-bf16")


@dataclass(frozen=True)
class Workload:
    """A model with a stream of inputs.

    Attributes:
        ratios: FLOPs, dense over pruned, that thresholds are chosen for.
        samples: inputs of the stream.
        bounded: samples that static engines are made for, one each.
        passes: warm passes over the stream.
        method: the pruning method.
        sites: layers that prune; empty for all.
        tokens: of every input, where they are all of one length; 0 where each has its own.
        source: what ``tpcompile.models.load`` takes; empty for a model that ``workloads.py`` makes.
        peer: of the model as the library transformers names its shape, for peers that load no other.
    """

    ratios: tuple[float, ...]
    samples: int
    bounded: int
    passes: int
    method: str
    sites: tuple[int, ...] = ()
    tokens: int = 0
    source: str = ""
    peer: Mapping[str, int] | None = None


def _deit(width: int, ratios: tuple[float, ...], samples: int, passes: int, source: str) -> Workload:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64, "num_labels": 1000}
    return Workload(ratios, samples, 4, passes, "cls-attention", (3, 6, 9), 197, source, shape)


WORKLOADS: Mapping[str, Workload] = {
    "minilm-100": Workload((1.7, 2.6, 5.0), 100, 6, 5, "ltp"),
    "minilm-400": Workload((2.6,), 400, 0, 2, "ltp"),
    "bert-128": Workload((2.1, 8.0), 16, 4, 3, "ltp", tokens=128),
    "bert-384": Workload((2.1, 8.0), 10, 4, 2, "ltp", tokens=384),
    "deit-s": _deit(384, (1.53, 2.0), 24, 5, "timm/deit_small_patch16_224"),
    "deit-b": _deit(768, (1.53, 2.0), 12, 3, "timm/deit_base_patch16_224"),
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    workload: str
    ratio: float
    engine: str
    batch: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        """Also the name of its file."""
        return f"{self.workload}_{self.ratio:g}_{self.engine}_b{self.batch}_t{self.threads}"

    @property
    def subject(self) -> str:
        """What is compiled once for all cells that share it."""
        return f"{self.workload}_{self.ratio:g}_{'one' if self.batch == 1 else 'ragged'}"

    @property
    def target(self) -> str:
        """Of the engine."""
        return self.engine.split("-")[0]

    @property
    def precision(self) -> str:
        """Of the engine."""
        return self.engine.split("-")[1]


def matrix() -> tuple[Cell, ...]:
    """Every cell."""
    each = [(name, ratio) for name, one in WORKLOADS.items() for ratio in one.ratios]
    return tuple(Cell(*one, engine, batch, threads) for one, batch, threads, engine in product(each, (1, 8), (1, 2), ENGINES))


def default() -> tuple[Cell, ...]:
    """One sample and one thread throughout; of each workload's most telling ratio also a batch, and two threads."""
    found = [cell for cell in matrix() if (cell.batch, cell.threads) == (1, 1)]
    telling = {"minilm-100": 2.6, "bert-128": 2.1, "deit-s": 1.53, "deit-b": 2.0}
    for workload, ratio in telling.items():
        found += [Cell(workload, ratio, engine, *how) for how in ((8, 1), (1, 2)) for engine in ENGINES]
    return tuple(found)
