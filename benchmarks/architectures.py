"""The architectures of docs/coverage.md, as data: a library's own class with a config and random weights, an input maker, its prefix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.models.library import quiet, timm, transformers

Feed = dict[str, Tensor]


@dataclass(frozen=True)
class Scale:
    """How large a model is built, and how long its inputs are."""

    width: int
    heads: int
    depth: int
    lengths: tuple[int, ...]
    image: int
    patch: int


SMALL = Scale(32, 4, 3, (19, 33, 12), 32, 8)
TINY = Scale(32, 4, 2, (9, 14), 32, 8)
"""For the gate."""
LARGE = Scale(384, 6, 6, (256, 256, 256), 224, 16)
"""For times: the width of DeiT-S, and half its depth."""


@dataclass(frozen=True)
class Row:
    """An architecture.

    Attributes:
        build: (library, scale) -> the library's own model.
        inputs: scale -> a few samples.
        dynamic: input -> dim -> name.
        outputs: names of its outputs that are compiled; none where it returns a tensor.
        prefix: leading tokens that never fall.
        threshold: of the mean attention that a token receives.
        refused: why it cannot be compiled, in one sentence; empty for what must work.
    """

    build: Callable[[Any, Scale], nn.Module]
    inputs: Callable[[Scale], list[Feed]]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("last_hidden_state",)
    prefix: int = 1
    threshold: float = 0.8
    refused: str = ""

    def model(self, scale: Scale = SMALL) -> nn.Module:
        """The model in eval mode, with weights that make attention tell tokens apart."""
        timm()
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model = self.build(transformers(), scale)
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    std = 1.5 * weight.shape[-1] ** -0.5 if "embed" not in name and weight.dim() == 2 else 0.2
                    nn.init.normal_(weight, std=std)
        return Outputs(model, self.outputs).eval()


class Outputs(nn.Module):
    """A library's model as it is, with some of its outputs.

    Attributes:
        model: the library's.
        names: of the outputs that are wanted; empty where the model returns a tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The model's inputs by name to its outputs by name."""
        if not self.names:
            return {"output": self.model(*inputs.values())}
        result = self.model(**inputs)
        return {name: result[name] for name in self.names}


def random() -> torch.Generator:
    """The same numbers at every call."""
    return torch.Generator().manual_seed(1)


def texts(scale: Scale) -> list[Feed]:
    """Random ids of several lengths."""
    generator = random()
    draws = [torch.randint(5, 120, (1, length), generator=generator) for length in scale.lengths]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draws]


def drawn(**shapes: Callable[[Scale], tuple[int, ...]]) -> Callable[[Scale], list[Feed]]:
    """Random numbers of given shapes, three samples."""

    def draw(scale: Scale) -> list[Feed]:
        generator = random()
        return [{name: torch.randn(shape(scale), generator=generator) for name, shape in shapes.items()} for _ in range(3)]

    return draw


def picture(scale: Scale) -> tuple[int, ...]:
    """An image."""
    return 1, 3, scale.image, scale.image


images = drawn(pixel_values=picture)
IDS = {"input_ids": {1: "seq"}, "attention_mask": {1: "seq"}}
VOCABULARY = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def sized(scale: Scale) -> dict[str, Any]:
    """A scale in the words of most configs."""
    return {
        "hidden_size": scale.width, "num_hidden_layers": scale.depth, "num_attention_heads": scale.heads,
        "intermediate_size": 2 * scale.width,
    }  # fmt: skip


def both(scale: Scale) -> dict[str, Any]:
    """A scale in the words of encoder-decoders."""
    encoder = {"encoder_layers": scale.depth, "encoder_attention_heads": scale.heads, "encoder_ffn_dim": 2 * scale.width}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": scale.heads, "decoder_ffn_dim": 2 * scale.width}
    return {"d_model": scale.width, **encoder, **decoder, "decoder_start_token_id": 1}


def longest(scale: Scale) -> dict[str, Any]:
    """A table of positions long enough for every input."""
    return {"max_position_embeddings": 2 * max(scale.lengths)}


def hf(
    name: str, *sizes: Callable[[Scale], Mapping[str, Any]] | Mapping[str, Any], part: str = ""
) -> Callable[[Any, Scale], nn.Module]:
    """A class of transformers by name, built from its own config; or a part of such a model."""

    def build(library: Any, scale: Scale) -> nn.Module:
        given: dict[str, Any] = {}
        for more in sizes:
            given |= more(scale) if callable(more) else more
        kind = getattr(library, name)
        model: nn.Module = kind(kind.config_class(**given))
        return model.get_submodule(part) if part else model

    return build


def of_timm(name: str) -> Callable[[Any, Scale], nn.Module]:
    """A model of timm by name."""

    def build(library: Any, scale: Scale) -> nn.Module:
        sizes = {"img_size": scale.image, "patch_size": scale.patch, "depth": scale.depth}
        model: nn.Module = timm().create_model(name, embed_dim=3 * scale.width // 2, num_heads=3, num_classes=10, **sizes)
        return model

    return build


def text(name: str, **more: Any) -> Row:
    """An encoder of texts."""
    return Row(hf(name, VOCABULARY, sized, longest, more), texts, IDS)


def vision(name: str, prefix: int = 1, outputs: tuple[str, ...] = ("last_hidden_state", "pooler_output"), **more: Any) -> Row:
    """An encoder of images."""
    grid = hf(name, sized, lambda scale: {"image_size": scale.image, "patch_size": scale.patch}, more)
    return Row(grid, images, prefix=prefix, outputs=outputs)


def frames(scale: Scale) -> int:
    """Frames of a spectrogram: two for a token."""
    return 2 * (256 if scale is LARGE else 24)


def patches(scale: Scale) -> int:
    """Patches of an image."""
    count: int = (scale.image // scale.patch) ** 2
    return count


def boxes(scale: Scale) -> dict[str, Any]:
    """A detector over images of the scale's size, its backbone left out."""
    return {**both(scale), "use_pretrained_backbone": False, "num_queries": 5}


ROWS: dict[str, Row] = {
    "BERT": text("BertModel"),
    "RoBERTa": text("RobertaModel"),
    "DistilBERT": Row(
        hf(
            "DistilBertModel",
            VOCABULARY,
            longest,
            lambda s: {"dim": s.width, "n_layers": s.depth, "n_heads": s.heads, "hidden_dim": 2 * s.width},
        ),
        texts,
        IDS,
    ),
    "ALBERT": text("AlbertModel", embedding_size=16),
    "ELECTRA": text("ElectraModel", embedding_size=16),
    "DeBERTa-v2": text(
        "DebertaV2Model",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "MPNet": text("MPNetModel"),
    "ModernBERT": text("ModernBertModel", local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "T5 encoder": Row(
        hf(
            "T5EncoderModel",
            VOCABULARY,
            lambda s: {
                "d_model": s.width,
                "d_kv": s.width // s.heads,
                "d_ff": 2 * s.width,
                "num_layers": s.depth,
                "num_heads": s.heads,
            },
        ),
        texts,
        IDS,
    ),
    "BART encoder": Row(hf("BartModel", VOCABULARY, both, longest, part="encoder"), texts, IDS),
    "Marian encoder": Row(hf("MarianModel", VOCABULARY, both, longest, part="encoder"), texts, IDS),
    "CLIP text": text("CLIPTextModel"),
    "ViT": vision("ViTModel"),
    "DeiT": vision("DeiTModel", prefix=2),
    "DeiT, distilled (timm)": Row(of_timm("deit_tiny_distilled_patch16_224"), images, prefix=2, outputs=()),
    "BEiT": vision("BeitModel", use_relative_position_bias=True),
    "DINOv2 with registers": vision("Dinov2WithRegistersModel", prefix=5, mlp_ratio=2),
    "CLIP vision": vision("CLIPVisionModel"),
    "SigLIP": vision("SiglipVisionModel"),
    "EVA-02 with RoPE (timm)": Row(of_timm("eva02_tiny_patch14_224"), images, outputs=()),
    "ViT-MAE encoder": Row(
        hf("ViTMAEModel", sized, lambda s: {"image_size": s.image, "patch_size": s.patch, "mask_ratio": 0.0}),
        drawn(pixel_values=picture, noise=lambda s: (1, patches(s))),
    ),
    "YOLOS": Row(
        hf("YolosModel", sized, lambda s: {"image_size": [s.image] * 2, "patch_size": s.patch, "num_detection_tokens": 5}),
        images,
    ),
    "DETR encoder": Row(
        hf("DetrModel", boxes, part="encoder"),
        drawn(inputs_embeds=lambda s: (1, patches(s), s.width), spatial_position_embeddings=lambda s: (1, patches(s), s.width)),
    ),
    "Whisper encoder": Row(
        hf(
            "WhisperModel",
            VOCABULARY,
            both,
            lambda s: {"num_mel_bins": 8, "max_source_positions": frames(s) // 2},
            part="encoder",
        ),
        drawn(input_features=lambda s: (1, 8, frames(s))),
    ),
    "Wav2Vec2": Row(
        hf(
            "Wav2Vec2Model",
            sized,
            {
                "conv_dim": [16, 16],
                "conv_stride": [5, 4],
                "conv_kernel": [10, 8],
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 8,
                "num_conv_pos_embedding_groups": 2,
            },
        ),
        drawn(input_values=lambda s: (1, 20 * frames(s))),
    ),
    "AST": Row(
        hf(
            "ASTModel",
            sized,
            lambda s: {"max_length": frames(s), "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 6, "time_stride": 6},
        ),
        drawn(input_values=lambda s: (1, frames(s), 16)),
        outputs=("last_hidden_state", "pooler_output"),
        prefix=2,
    ),
    "Longformer": Row(
        hf(
            "LongformerModel",
            VOCABULARY,
            sized,
            lambda s: {"attention_window": [8] * s.depth, "max_position_embeddings": 4 * max(s.lengths)},
        ),
        texts,
        IDS,
        refused="its forward asks which tokens attend to all others, and branches on the answer",
    ),
    "Swin": Row(
        hf(
            "SwinModel",
            lambda s: {
                "image_size": s.image,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        images,
        refused="attention stays in windows of a grid that every block cuts anew: with tokens gone there is no grid",
    ),
}
"""The architectures, texts first, then images, then sound, then what is refused."""

SAMPLE = ("ModernBERT", "T5 encoder", "EVA-02 with RoPE (timm)", "YOLOS", "AST", "Swin")
"""The rows of the gate, tests/strangers/test_coverage.py: window masks, relative bias, rotary angles, images, sound, a refusal."""
