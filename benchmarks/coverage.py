"""The table of architectures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.models.library import timm, transformers

SAMPLES = 3
TEXT = {"vocab_size": 120, "max_position_embeddings": 64}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SEQ2SEQ = {
    "vocab_size": 120, "d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
PIXELS = {"image_size": 32, "patch_size": 8}
LENGTHS = (19, 33, 12)


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randint(5, 120, (1, n), generator=generator) for n in LENGTHS]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draws]


def drawn(name: str, *shape: int) -> Callable[[], list[dict[str, Tensor]]]:
    def draw() -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [{name: torch.randn(*shape, generator=generator)} for _ in range(SAMPLES)]
    return draw


images = drawn("pixel_values", 1, 3, 32, 32)
AHEAD = {"input_ids": {1: "seq"}, "attention_mask": {1: "seq"}}


@dataclass(frozen=True)
class Row:
    """An architecture.

    Attributes:
        build: the library's own class with a tiny config.
        inputs: a few samples.
        dynamic: input -> dim -> name.
        outputs: names of its outputs that are compiled.
        prefix: leading tokens that never fall.
        threshold: of the mean attention that a token receives.
    """

    build: Callable[[Any], nn.Module]
    inputs: Callable[[], list[dict[str, Tensor]]]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("last_hidden_state",)
    prefix: int = 1
    threshold: float = 0.8

    def model(self) -> nn.Module:
        transformers(), timm()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build(transformers())
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5 if "embed" not in name and weight.dim()<3 else 0.2)
        return Outputs(model.eval(), self.inputs()[0], self.outputs)


class Outputs(nn.Module):
    """A library's model as it is, with some of its outputs.  The names of the inputs are the model's own."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.train(model.training)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        result = self.model(**inputs)
        if isinstance(result, Tensor):
            return {"output": result}
        return {name: result[name] for name in self.outputs}


class Timm(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.inner(pixel_values)


def hf(name: str, config: str, sizes: Mapping[str, Any], part: str = "") -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        kind = getattr(library, name, None)
        made = kind(getattr(library, config)(**sizes))
        return made.get_submodule(part) if part else made
    return build


def tm(name: str, **sizes: Any) -> Callable[[Any], nn.Module]:
    return lambda library: Timm(timm().create_model(name, **sizes))


def text(name: str, prefix: int = 1, threshold: float = 0.8, config: str = "", part: str = "", **more: Any) -> Row:
    return Row(hf(name, config or name.replace("Model", "Config"), {**TEXT, **SIZES, **more}, part), texts, AHEAD, prefix=prefix, threshold=threshold)


def vision(name: str, prefix: int = 1, outputs: tuple[str, ...] = ("last_hidden_state",), **more: Any) -> Row:
    return Row(hf(name, name.replace("Model", "Config"), {**PIXELS, **SIZES, **more}), images, prefix=prefix, outputs=outputs)


ROWS: dict[str, Row] = {
    "bert": text("BertModel"),
    "roberta": text("RobertaModel"),
    "distilbert": Row(hf("DistilBertModel", "DistilBertConfig", {"vocab_size": 120, "max_position_embeddings": 64, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}), texts, AHEAD),
    "albert": text("AlbertModel", embedding_size=16),
    "electra": text("ElectraModel", embedding_size=16),
    "deberta-v2": text("DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False),
    "mpnet": text("MPNetModel"),
    "modernbert": text("ModernBertModel", pad_token_id=0, local_attention=8, global_attn_every_n_layers=2, num_hidden_layers=4),
    "t5": Row(hf("T5EncoderModel", "T5Config", {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}), texts, AHEAD),
    "bart": Row(hf("BartModel", "BartConfig", SEQ2SEQ, "encoder"), texts, AHEAD),
    "marian": Row(hf("MarianModel", "MarianConfig", {**SEQ2SEQ, "decoder_start_token_id": 0}, "encoder"), texts, AHEAD),
    "longformer": text("LongformerModel", attention_window=[8, 8, 8], max_position_embeddings=128),
    "clip-text": text("CLIPTextModel", config="CLIPTextConfig", projection_dim=32, eos_token_id=2),
    "vit": vision("ViTModel", outputs=("last_hidden_state", "pooler_output")),
    "deit": vision("DeiTModel", prefix=2),
    "deit-distilled": Row(tm("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3), images, prefix=2),
    "beit": vision("BeitModel", use_relative_position_bias=True),
    "dinov2-reg": vision("Dinov2WithRegistersModel", prefix=5, mlp_ratio=2),
    "clip-vision": vision("CLIPVisionModel", outputs=("last_hidden_state", "pooler_output")),
    "siglip": vision("SiglipVisionModel", outputs=("last_hidden_state", "pooler_output")),
    "eva": Row(tm("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3), images),
    "whisper": Row(hf("WhisperModel", "WhisperConfig", {"vocab_size": 120, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, "encoder"), drawn("input_features", 1, 8, 48)),
    "wav2vec2": Row(hf("Wav2Vec2Model", "Wav2Vec2Config", {**SIZES, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}), drawn("input_values", 1, 640)),
    "ast": Row(hf("ASTModel", "ASTConfig", {**SIZES, "max_length": 48, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 6, "time_stride": 6}), drawn("input_values", 1, 48, 16), prefix=2, outputs=("last_hidden_state", "pooler_output")),
    "yolos": vision("YolosModel", prefix=5, num_detection_tokens=4, image_size=[32, 32]),
    "vit-mae": vision("ViTMAEModel", decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32, mask_ratio=0.0),
    "swin": Row(hf("SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}), images),
}
