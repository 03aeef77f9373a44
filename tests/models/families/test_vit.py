from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import InputError, ModelError
from tpcompile.models.families import find

TinyVit = Callable[..., Any]
OFF = [0.0] * 3
SMALL = [1e-5] * 3

VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "no cls, average": {"class_token": False, "global_pool": "avg"},
    "cls, average": {"global_pool": "avg"},
    "cls, average with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "registers without cls, average": {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "no_embed_class": True},
    "average, norm before": {"global_pool": "avg", "fc_norm": False},
    "layer scale": {"init_values": 0.3},
    "norms on query and key": {"qk_norm": True},
    "norm inside the attention": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "positions for patches only": {"no_embed_class": True},
    "norm in front": {"pre_norm": True},
    "no position table": {"pos_embed": "none"},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "dropout and stochastic depth": {"drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3},
    "patch dropout": {"patch_drop_rate": 0.5},
}
OUTPUTS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "classifier": ({}, "logits", (2, 5)),
    "pooled": ({"num_classes": 0}, "pooler_output", (2, 24)),
    "average": ({"num_classes": 0, "global_pool": "avg"}, "pooler_output", (2, 24)),
    "distilled, pooled": ({"num_classes": 0, "distilled": True}, "pooler_output", (2, 24)),
    "features": ({"num_classes": 0, "global_pool": ""}, "last_hidden_state", (2, 13, 24)),
    "a class per token": ({"global_pool": ""}, "logits", (2, 13, 5)),
}


@pytest.mark.parametrize("thresholds", [OFF, SMALL], ids=["off", "small"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_without_drops_it_is_the_library(name: str, thresholds: list[float], tiny_vit: TinyVit, images: Tensor) -> None:
    model = tiny_vit(**VARIANTS[name])
    expected = model(images)
    pruned = models.prune(model, "ltp", thresholds=thresholds)
    torch.testing.assert_close(pruned(images), {"logits": expected}, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned(pixel_values=images), pruned.dense(pixel_values=images), rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", OUTPUTS)
@torch.no_grad()
def test_outputs_have_one_name_per_kind(name: str, tiny_vit: TinyVit, images: Tensor) -> None:
    options, output, shape = OUTPUTS[name]
    model = tiny_vit(**options)
    pruned = models.prune(model, "ltp", thresholds=SMALL)
    got = pruned(images)
    assert {key: tuple(value.shape) for key, value in got.items()} == {output: shape}
    torch.testing.assert_close(got[output], model(images), rtol=1e-5, atol=1e-5)
    assert list(pruned.dense(images)) == [output]
    assert pruned.parts.token_level == (len(shape) == 3)


@pytest.mark.parametrize(
    ("options", "prefix", "cls"),
    [
        ({}, 1, True),
        ({"distilled": True}, 2, True),
        ({"reg_tokens": 3}, 4, True),
        ({"class_token": False, "reg_tokens": 3, "global_pool": "avg"}, 3, False),
        ({"class_token": False, "global_pool": "avg"}, 0, False),
    ],
)
def test_prefix_counts_what_is_no_patch(options: dict[str, Any], prefix: int, cls: bool, tiny_vit: TinyVit) -> None:
    parts: Any = find(tiny_vit(**options))
    assert (parts.prefix, parts.cls, parts.inputs, parts.family) == (prefix, cls, ("pixel_values",), "vit")
    assert (parts.image, parts.grid) == ((3, 16, 12), (4, 3))


@torch.no_grad()
def test_the_mean_is_over_alive_patches(tiny_vit: TinyVit) -> None:
    for options, expected in (({"reg_tokens": 1}, [3, 5]), ({"reg_tokens": 1, "pool_include_prefix": True}, [0, 3, 5])):
        model = tiny_vit(global_pool="avg", fc_norm=False, num_classes=0, **options)
        x = torch.randn(1, 14, 24)
        alive = torch.zeros(1, 14, dtype=torch.bool)
        alive[0, [0, 3, 5]] = True
        got = find(model).head(x, alive)["pooler_output"]
        torch.testing.assert_close(got, model.norm(x)[:, expected].mean(1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_no_alive_patch_gives_zeros_not_nan(tiny_vit: TinyVit) -> None:
    model = tiny_vit(global_pool="avg", fc_norm=False, num_classes=0)
    got = find(model).head(torch.randn(1, 13, 24), torch.zeros(1, 13, dtype=torch.bool))
    assert torch.equal(got["pooler_output"], torch.zeros(1, 24))


def test_modules_are_shared_and_the_wrapper_is_found_again(tiny_vit: TinyVit) -> None:
    model = tiny_vit()
    pruned = models.prune(model, "ltp", thresholds=OFF)
    assert {id(weight) for weight in pruned.parameters()} == {id(weight) for weight in model.parameters()}
    assert models.prune(pruned.dense, "ltp", thresholds=OFF).dense is pruned.dense


class Mine(nn.Module):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.blocks[1], "attn", Mine()), r"blocks\.1\.attn is .*Mine, not the library's own module"),
        (lambda m: m.blocks.__setitem__(2, Mine()), r"blocks\.2 is .*Mine, not the library's own module"),
        (lambda m: setattr(m.blocks[0], "drop_path2", Mine()), r"blocks\.0\.drop_path2 is .*Mine"),
        (lambda m: setattr(m.blocks[0].attn, "attn_drop", Mine()), r"blocks\.0\.attn\.attn_drop is .*Mine"),
        (lambda m: setattr(m, "blocks", Mine()), r"^blocks is .*Mine"),
        (lambda m: setattr(m.blocks[0].attn, "gate", nn.Linear(24, 24)), r"blocks\.0\.attn is gated"),
    ],
)
def test_a_part_the_user_replaced_is_refused(change: Callable[[Any], None], message: str, tiny_vit: TinyVit) -> None:
    model = tiny_vit()
    change(model)
    with pytest.raises(ModelError, match=message) as caught:
        find(model)
    assert caught.value.fix


def test_other_blocks_and_attentions_of_timm_are_refused(tiny_vit: TinyVit) -> None:
    from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock

    with pytest.raises(ModelError, match=r"blocks\.0 is timm\.models\.vision_transformer\.ResPostBlock"):
        find(tiny_vit(block_fn=ResPostBlock, init_values=0.1))
    with pytest.raises(ModelError, match=r"blocks\.0 is timm\.models\.vision_transformer\.ParallelThingsBlock"):
        find(tiny_vit(block_fn=ParallelThingsBlock))
    with pytest.raises(ModelError, match=r"blocks\.0\.attn is timm\.layers\.diff_attention\.DiffAttention"):
        find(tiny_vit(attn_layer="diff", embed_dim=24, num_heads=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "map"}, "global_pool='map' pools by an attention of its own"),
        ({"global_pool": "max"}, "global_pool='max' takes a maximum over all patches"),
        ({"global_pool": "avgmax"}, "global_pool='avgmax' takes a maximum over all patches"),
        ({"dynamic_img_size": True}, "dynamic_img_size resamples the positions"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_a_reason(options: dict[str, Any], message: str, tiny_vit: TinyVit) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        find(tiny_vit(**options))
    assert caught.value.fix.startswith("build the model with")


def test_a_subclass_is_another_model(tiny_vit: TinyVit) -> None:
    model = tiny_vit()
    model.__class__ = type("Custom", (type(model),), {"__module__": __name__})
    with pytest.raises(ModelError, match="no family names the parts of") as caught:
        find(model)
    assert "a VisionTransformer as timm builds it" in caught.value.fix


def test_an_image_of_another_size_is_refused(tiny_vit: TinyVit, images: Tensor) -> None:
    pruned = models.prune(tiny_vit(), "ltp", thresholds=OFF)
    with pytest.raises(InputError, match=r"pixel_values is \[2, 3, 16, 8\], the model takes \[batch, 3, 16, 12\]"):
        pruned(images[..., :8])
    with pytest.raises(InputError, match="pixel_values is missing"):
        pruned()
    with pytest.raises(InputError, match="the model takes no input_ids"):
        pruned(images, input_ids=images)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"global_pool": "avg", "class_token": False}, {"global_pool": ""}])
@torch.no_grad()
def test_exports_without_a_slice_of_the_tokens(ragged: bool, options: dict[str, Any], tiny_vit: TinyVit, images: Tensor) -> None:
    from tpcompile.capture import capture

    pruned = models.prune(tiny_vit(**options), "ltp", thresholds=[0.05, 0.0, 0.08], protect="prefix")
    dynamic = {"pixel_values": {0: "batch"}} if ragged else {}
    given = images if ragged else images[:1]
    program = capture(pruned, {"pixel_values": given}, dynamic, {"batch": (1, 512)} if ragged else None)
    slices = [n for n in program.graph.nodes if n.target is torch.ops.aten.slice.Tensor and n.args[1:2] != (0,)]
    assert not slices
    images = torch.cat([given, given.flip(-1), given * 2]) if ragged else given.flip(-1)
    got = program(pixel_values=images)
    torch.testing.assert_close(got, pruned(images), rtol=1e-5, atol=1e-5)
