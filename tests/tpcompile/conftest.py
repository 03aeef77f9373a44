"""What these tests share: the root logger as it was, and tiny engines: a vision transformer of 8 x 8 grey pixels, and a BERT under LTP."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tpcompile import bundle as bundles
from tpcompile.data.images import CONFIG, Preprocessing
from tpcompile.manifest import PatchesInfo
from tpcompile.spec import Patches

if TYPE_CHECKING:
    from tpcompile.build import Compiled

sys.path.insert(0, str(Path(__file__).parent))  # for error_cases.py and bundle_parts.py, which are no tests

GRID = Patches(1, 4, 4)


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """A verb sets up logging for its process; here it must not outlive the test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A bundle of a few bytes, of ``bundle_parts``."""
    from bundle_parts import fill

    with bundles.stage(tmp_path / "out") as folder:
        fill(folder)
    return tmp_path / "out"


def tiny_vit() -> "object":
    """Patches of 2 x 2, a class token, two blocks; each drops the patches whose pixels are dark."""
    import torch
    from torch import Tensor, nn

    from tpcompile import ops

    class Block(nn.Module):
        def __init__(self, bound: float) -> None:
            super().__init__()
            self.bound = bound
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor, keep: Tensor, bright: Tensor) -> tuple[Tensor, Tensor]:
            logits = (self.q(x) @ self.k(x).transpose(1, 2)).masked_fill(~keep[:, None, :], float("-inf"))
            x = x + self.out(logits.softmax(-1) @ self.v(x))
            keep = keep & ((bright > self.bound) | (torch.arange(17) == 0))
            return ops.prune(x, keep, bright), keep

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(1, 16, 2, 2), nn.Linear(16, 10)
            self.cls, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
            self.blocks = nn.ModuleList([Block(-0.5), Block(0.1)])

        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            x = torch.cat([self.cls, self.embed(pixel_values).flatten(2).transpose(1, 2)], 1) + self.place
            means = nn.functional.avg_pool2d(pixel_values, 2).flatten(1)
            bright = nn.functional.pad(means, (1, 0), value=0.0)
            keep = torch.ones_like(bright, dtype=torch.bool)
            for block in self.blocks:
                x, keep = block(x, keep, bright)
            return {"logits": self.head(x[:, 0])}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Vit().eval()


def export_images(out: Path) -> Path:
    """Export the tiny vision transformer, then seal it again with what makes it a bundle of images."""
    import torch

    from tpcompile import api

    plain = api.export(tiny_vit(), {"pixel_values": torch.rand(1, 1, 8, 8)}, out.with_name("plain"))  # type: ignore[arg-type]
    preprocessing = Preprocessing(1, 8, 8, (8, 8), "bicubic", (0.5,), (0.5,))
    with bundles.stage(out) as folder:
        for part in (Path(), Path("dense")):
            (folder / part).mkdir(exist_ok=True)
            for path in (plain.path / part).rglob("*"):
                if path.is_file() and path.name != "tpcompile.json" and (part.parts or "dense" not in path.parts):
                    copy = folder / path.relative_to(plain.path)
                    copy.parent.mkdir(exist_ok=True)
                    copy.write_bytes(path.read_bytes())
            (folder / part / CONFIG).write_text(preprocessing.to_json(), encoding="utf-8")
        for part in ("dense", ""):
            manifest = bundles.read(plain.path / part).manifest
            bundles.seal(folder / part, manifest.model_copy(update={"patches": PatchesInfo.of(GRID)}))
    return out


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny image engine as a bundle; read only."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return export_images(tmp_path_factory.mktemp("images") / "out")


@pytest.fixture(scope="session")
def text_compiled(bert_folder: Path) -> "Compiled":
    """The tiny BERT, whose last two of three layers drop tokens, ready to fill a bundle of any target and form."""
    from tpcompile.build import compile_subject
    from tpcompile.subject import subject_of

    return compile_subject(subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.0, 0.04, 0.06]}))


@pytest.fixture(scope="session")
def text_bundles(text_compiled: "Compiled", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That BERT as a bundle by target. Read only."""
    from tpcompile.backends import runnable
    from tpcompile.build import fill

    found = {}
    for target in runnable():
        found[target] = tmp_path_factory.mktemp("texts") / target
        with bundles.stage(found[target]) as folder:
            fill(folder, text_compiled, target)
    return found


Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """``draw(name, mode, size)``: a picture file whose pixels rise from left to right and from top to bottom."""

    def make(name: str, mode: str = "RGB", size: tuple[int, int] = (12, 9), **options: object) -> Path:
        import numpy as np
        from PIL import Image

        y, x = np.mgrid[: size[1], : size[0]]
        pixels = (255 * (x + y) / max(1, size[0] + size[1] - 2)).astype(np.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path, **options)  # type: ignore[arg-type]
        return path

    return make
