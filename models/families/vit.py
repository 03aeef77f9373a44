"""Vision transformers of timm: `VisionTransformer` (ViT, DeiT, DeiT-3, AugReg, DINO, ...) and `VisionTransformerDistilled`.

Pre-LayerNorm encoders over patches, with any of: CLS, distillation and register tokens, average pooling, LayerScale, norms on
query and key. A model is recognised by the exact classes of the modules whose own ``forward`` is bypassed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import InputError, ModelError

PLAIN = ("timm.models.vision_transformer", "VisionTransformer")
DISTILLED = ("timm.models.deit", "VisionTransformerDistilled")
BLOCK = ("timm.models.vision_transformer", "Block")
ATTENTION = ("timm.layers.attention", "Attention")
DROP_PATH = ("timm.layers.drop", "DropPath")
DROPOUT = ("torch.nn.modules.dropout", "Dropout")
IDENTITY = ("torch.nn.modules.linear", "Identity")
SEQUENTIAL = ("torch.nn.modules.container", "Sequential")


class Images(nn.Module):
    """A timm model as it is; its output tensor becomes a dict with one entry.

    Attributes:
        model: the library's module.
        output: name of its output: ``logits``, ``pooler_output`` or ``last_hidden_state``.
    """

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.train(model.training)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """``pixel_values: float32 [B, C, H, W]``."""
        return {self.output: self.model(pixel_values)}


@dataclass(frozen=True, slots=True)
class VitBlock:
    """One block's own modules. Dropout and stochastic depth are left out: both are the identity in eval mode."""

    block: Any

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        heads: int = self.block.attn.num_heads
        return heads

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return float(self.block.attn.scale)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x: [B, N, C]`` to query, key and value, each ``[B, H, N, D]``, behind the block's first norm."""
        attn = self.block.attn
        batch, tokens, _ = x.shape
        packed = attn.qkv(self.block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        return attn.q_norm(packed[0]), attn.k_norm(packed[1]), packed[2]

    def attention_output(self, context: Tensor, x: Tensor) -> Tensor:
        """``x + scale(project(context))``, all ``[B, N, C]``."""
        attn = self.block.attn
        y: Tensor = x + self.block.ls1(attn.proj(attn.norm(context)))
        return y

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + scale(mlp(norm(x)))``, all ``[B, N, C]``."""
        y: Tensor = x + self.block.ls2(self.block.mlp(self.block.norm2(x)))
        return y


@dataclass(frozen=True, slots=True)
class VitParts:
    """A model of the family by its parts; see `tpcompile.models.families.base.Parts`."""

    architecture: str
    dense: Images
    model: Any
    blocks: tuple[VitBlock, ...]
    finish: Callable[[Tensor, Tensor], Tensor]

    @property
    def family(self) -> str:
        """``vit`` for every member of the family."""
        return "vit"

    @property
    def inputs(self) -> tuple[str, ...]:
        """One image input."""
        return ("pixel_values",)

    @property
    def prefix(self) -> int:
        """Number of CLS, distillation and register tokens."""
        prefix: int = self.model.num_prefix_tokens
        return prefix

    @property
    def cls(self) -> bool:
        """The first token is a CLS token."""
        return self.model.cls_token is not None

    @property
    def token_level(self) -> bool:
        """The outputs have one row per token."""
        return type(self.model).__name__ == PLAIN[1] and not self.model.global_pool

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        height, width = self.model.patch_embed.img_size
        return self.model.in_chans, height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        rows, columns = self.model.patch_embed.grid_size
        return rows, columns

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``pixel_values: float32 [B, C, H, W]`` to ``x: [B, N, C]`` and ``alive: bool [B, N]``, all True.

        Raises:
            InputError: an image of another size.
        """
        pixels = inputs["pixel_values"]
        if tuple(pixels.shape[1:]) != self.image:
            raise InputError(
                f"pixel_values is {list(pixels.shape)}, the model takes [batch, {', '.join(map(str, self.image))}]",
                fix="resize the images, or build the model for another img_size",
            )
        x: Tensor = self.model.norm_pre(self.model.patch_drop(self.model._pos_embed(self.model.patch_embed(pixels))))
        return x, torch.ones_like(x.select(2, 0), dtype=torch.bool)

    def head(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` to the output by name."""
        return {self.dense.output: self.finish(self.model.norm(x), alive)}


def parts(model: nn.Module) -> VitParts | None:
    """Name the parts of a vision transformer of timm; None for a model of another family.

    Args:
        model: a library model, or an `Images` around one.

    Raises:
        ModelError: a known model with a part that the user replaced, or with an option that cannot be carried.
    """
    inner: Any = model.model if isinstance(model, Images) else model
    kind = _kind(inner)
    if kind not in (PLAIN, DISTILLED):
        return None
    _check_model(inner, distilled=kind == DISTILLED)
    blocks = tuple(_block(block, f"blocks.{i}") for i, block in enumerate(inner.blocks))
    pooled = kind == DISTILLED or inner.global_pool
    name = "logits" if inner.num_classes else "pooler_output" if pooled else "last_hidden_state"
    dense = model if isinstance(model, Images) else Images(inner, name)
    return VitParts(kind[1], dense, inner, blocks, _finish(inner, distilled=kind == DISTILLED))


def _kind(module: nn.Module) -> tuple[str, str]:
    """Where a module's class is defined, and its name."""
    return type(module).__module__, type(module).__qualname__


def _check_model(model: Any, distilled: bool) -> None:
    """Refuse what cannot be carried.

    Raises:
        ModelError: saying which option or part.
    """
    if _kind(model.blocks) != SEQUENTIAL:
        raise _replaced("blocks", model.blocks)
    if model.attn_pool is not None:
        raise ModelError(
            f"global_pool={model.global_pool!r} pools by an attention of its own over all tokens",
            fix="build the model with global_pool 'token', 'avg' or ''",
        )
    if not distilled and model.global_pool not in ("", "token", "avg"):
        raise ModelError(
            f"global_pool={model.global_pool!r} takes a maximum over all patches, dropped ones too",
            fix="build the model with global_pool 'token', 'avg' or ''",
        )
    if model.dynamic_img_size:
        raise ModelError(
            "dynamic_img_size resamples the positions for every image size, and the number of tokens must be known",
            fix="build the model with dynamic_img_size=False and the img_size you need",
        )


def _block(block: Any, path: str) -> VitBlock:
    """Check that the parts whose own ``forward`` is bypassed are the library's, and carry nothing we would leave out.

    Raises:
        ModelError: naming the part.
    """
    for part, module, kinds in _bypassed(block):
        if _kind(module) not in kinds:
            raise _replaced(f"{path}.{part}".rstrip("."), module)
    if block.attn.gate is not None:
        raise ModelError(f"{path}.attn is gated, which tpcompile does not carry", fix="build the model with gated=False")
    return VitBlock(block)


def _bypassed(block: Any) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, str], ...]]]:
    """Name, module and accepted classes, outermost first."""
    yield "", block, (BLOCK,)
    yield "attn", block.attn, (ATTENTION,)
    for name in ("attn_drop", "proj_drop"):
        yield f"attn.{name}", getattr(block.attn, name), (DROPOUT, IDENTITY)
    for name in ("drop_path1", "drop_path2"):
        yield name, getattr(block, name), (DROP_PATH, IDENTITY)


def _replaced(path: str, module: nn.Module) -> ModelError:
    home, name = _kind(module)
    return ModelError(
        f"{path} is {home}.{name}, not the library's own module",
        fix="pass the model as timm builds it, with Block and Attention; this part's own forward would not be called",
    )


def _finish(model: Any, distilled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """What follows the last norm: (``x: [B, N, C]``, ``alive: bool [B, N]``) to the output."""

    def both(x: Tensor, alive: Tensor) -> Tensor:
        y: Tensor = (model.head(model.head_drop(x[:, 0])) + model.head_dist(model.head_drop(x[:, 1]))) / 2
        return y

    def one(x: Tensor, alive: Tensor) -> Tensor:
        pooled = x[:, 0] if model.global_pool == "token" else mean(x, alive) if model.global_pool == "avg" else x
        y: Tensor = model.head(model.head_drop(model.fc_norm(pooled)))
        return y

    def mean(x: Tensor, alive: Tensor) -> Tensor:
        # No slice of the token axis: a compacted axis has no fixed positions, a mask is gathered with it.
        if model.num_prefix_tokens and not model.pool_include_prefix:
            patches = torch.arange(x.shape[1], device=x.device) >= model.num_prefix_tokens
            alive = torch.logical_and(alive, patches)
        weight = alive.to(x.dtype).unsqueeze(-1)
        return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)

    return both if distilled else one
