"""Methods that gather by themselves, in eager torch: what they keep when nothing is to go, batches, hand-made numbers, refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models.methods.predictor import ATTRIBUTE, Predictor
from tpcompile.models.methods.tome import Pairs, TomeParameters, schedule
from tpcompile.models.methods.zero_tprune import Pruning, Stage, ZeroTpruneParameters

Tiny = Callable[..., Any]
KEEP_ALL: dict[str, dict[str, Any]] = {
    "evit": {"base_keep_rate": 1.0, "drop_loc": [1]},
    "tome": {"r": 0},
    "dynamicvit": {"prune_loc": [0, 2], "keep_ratio": 1.0},
    "tps": {"prune_loc": [0, 2], "keep_ratio": [1.0, 1.0]},
    "ltmp": {"merge_thresholds": [1.0] * 3, "prune_thresholds": [0.0] * 3},
    "zero_tprune": {"stages": [{"block": 1, "iterations": 3, "similar": 0.0, "keep": 1.0}]},
    "jmp": {"locations": [1], "keep_rate": 1.0},
}
SOME: dict[str, dict[str, Any]] = {
    "evit": {"base_keep_rate": 0.5, "drop_loc": [0, 2]},
    "tome": {"r": [3, 0, 20]},
    "dynamicvit": {"prune_loc": [0, 2], "keep_ratio": 0.6},
    "tps": {"prune_loc": [0, 2], "keep_ratio": 0.6, "temperature": 2.0},
    "ats": {"ats_blocks": [0, 2]},
    "ltmp": {"merge_thresholds": [0.7] * 3, "prune_thresholds": [0.03] * 3},
    "zero_tprune": {"stages": [{"block": 0, "iterations": 5, "similar": 0.3, "keep": 0.7}]},
    "jmp": {"locations": [0, 2], "keep_rate": 0.5, "choice": "token"},
}


@pytest.fixture
def model(tiny_vit: Tiny) -> nn.Module:
    """A small vision transformer with predictors."""
    found: nn.Module = tiny_vit()
    found.add_module(ATTRIBUTE, nn.ModuleList(Predictor(24) for _ in range(2)).eval())
    return found


@pytest.mark.parametrize("method", KEEP_ALL)
@torch.no_grad()
def test_nothing_goes(method: str, model: nn.Module, images: Tensor) -> None:
    pruned = models.prune(model, method, **KEEP_ALL[method])
    torch.testing.assert_close(pruned(images)["logits"], model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SOME)
@torch.no_grad()
def test_batch_mates_do_not_matter(method: str, model: nn.Module, images: Tensor) -> None:
    pruned = models.prune(model, method, **SOME[method])
    alone = torch.cat([pruned(image)["logits"] for image in images.split(1)])
    torch.testing.assert_close(pruned(images)["logits"], alone, rtol=0, atol=1e-5)
    assert float((alone - model(images)).abs().max()) > 1e-4


@torch.no_grad()
def test_jmp_that_drops_is_evit_without_fusion(model: nn.Module, images: Tensor) -> None:
    drops = models.prune(model, "jmp", locations=[0, 2], keep_rate=0.5, tau=1.0)
    evit = models.prune(model, "evit", drop_loc=[0, 2], base_keep_rate=0.5, fuse_token=False)
    torch.testing.assert_close(drops(images)["logits"], evit(images)["logits"], rtol=0, atol=1e-6)
    merges = models.prune(model, "jmp", locations=[0, 2], keep_rate=0.5, tau=1.0, merge_where="dissimilar")
    assert float((merges(images)["logits"] - evit(images)["logits"]).abs().max()) > 1e-4


def test_tome_merges_by_size() -> None:
    """Positions 2 and 4 merge into 1 and 1: (2 x 30 + 1 x 20 + 3 x 40) / 6."""
    x = torch.tensor([[[10.0], [30.0], [20.0], [5.0], [40.0]]])
    size = torch.tensor([[[1.0], [2.0], [1.0], [1.0], [3.0]]])
    pairs = Pairs(torch.tensor([[0]]), torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
    rows, sizes = pairs.merge(x, size)
    assert rows.flatten().tolist() == [10.0, pytest.approx(200 / 6), 5.0]
    assert sizes.flatten().tolist() == [1.0, 6.0, 1.0]
    assert pairs.stored(x).tolist() == [[0, 1, 3]]
    assert pairs.into(x).tolist() == [[0, 1, 1, 3, 1]]


def test_tome_schedule() -> None:
    assert schedule(TomeParameters(r=4), 3) == [4, 4, 4]
    assert schedule(TomeParameters(r=4, inflect=1.0), 3) == [0, 4, 8]
    assert schedule(TomeParameters(r=[1, 2]), 2) == [1, 2]


def test_zero_tprune_ranks_by_votes() -> None:
    """One head of three tokens against numpy; a second head whose scores all lie together is filtered out."""
    votes = np.array([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]], dtype=np.float32)
    attention = torch.tensor(np.stack([votes, np.full((3, 3), 1 / 3, dtype=np.float32)]))[None]
    options = ZeroTpruneParameters(stages=[Stage(block=0, iterations=2)], v_min=0.01, v_max=5.0, cls_boost=True)
    layer = Pruning(nn.Identity(), 1, options.stages[0], options)  # type: ignore[arg-type]  # its block is not called
    start = np.array([np.sqrt(3), 1, 1]) / (2 + np.sqrt(3)) * 3
    expected = start @ votes @ votes
    got = layer.rank(attention, 2, torch.ones(1, 3, dtype=torch.bool))[0]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("evit", {"drop_loc": [3]}, "drop_loc is [3], the model has blocks 0 to 2"),
    ("evit", {"base_keep_rate": 0.0}, "base_keep_rate = 0.0: input should be greater than 0"),
    ("evit", {"base_keep_rate": 1.5}, "base_keep_rate = 1.5: input should be less than or equal to 1"),
    ("tome", {"r": [1, 2]}, "r has 2 values, the model has 3 blocks"),
    ("tome", {"r": [1, 2, 3], "inflect": 0.5}, "inflect bends one r"),
    ("dynamicvit", {"prune_loc": [0, 1, 2]}, "prune_loc names 3 blocks, the checkpoint has 2 predictors"),
    ("dynamicvit", {"prune_loc": [0, 1], "keep_ratio": [0.5]}, "keep_ratio has 1 values, prune_loc 2"),
    ("tps", {"prune_loc": [1, 0]}, "prune_loc is [1, 0], the model has blocks 0 to 2"),
    ("tps", {"prune_loc": [0, 1], "temperature": 0}, "temperature = 0: input should be greater than 0"),
    ("ltmp", {}, "merge_thresholds or prune_thresholds is required"),
    ("ltmp", {"merge_thresholds": [0.5]}, "merge_thresholds has 1 values, the model has 3 blocks"),
    ("ltmp", {"prune_thresholds": [0.5, 2.0, 0.0]}, "prune_thresholds[1] = 2.0: input should be less than or equal to 1"),
    ("ats", {"ats_blocks": [0, 3]}, "ats_blocks is [0, 3], the model has blocks 0 to 2"),
    ("zero_tprune", {"stages": []}, "stages = []: list should have at least 1 item"),
    ("zero_tprune", {"stages": [{"block": 4, "iterations": 1}]}, "stages.block is [4], the model has blocks 0 to 2"),
    (
        "zero_tprune",
        {"stages": [{"block": 1, "iterations": 1, "kep": 1}]},
        "parameter stages[0].kep: extra inputs are not permitted",
    ),
    ("jmp", {"locations": [5]}, "locations is [5], the model has blocks 0 to 2"),
]


@pytest.mark.parametrize(("method", "parameters", "message"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_parameters(method: str, parameters: dict[str, Any], message: str, model: nn.Module) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(model, method, **parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", SOME)
def test_refused_models(method: str, tiny: Tiny, tiny_vit: Tiny) -> None:
    if method not in ("tome", "zero_tprune"):  # these are carried over to texts
        with pytest.raises(UsageError, match=f"{method} is a method for images, and BertForSequenceClassification takes input_ids"):
            models.prune(tiny("bert", head=True), method, **SOME[method])
    with pytest.raises(UsageError, match="brings no dropped row back"):
        models.prune(tiny_vit(global_pool="", num_classes=0), method, **SOME[method])


@pytest.mark.parametrize("method", ["evit", "ats", "jmp"])
def test_refused_without_a_cls_token(method: str, tiny_vit: Tiny) -> None:
    with pytest.raises(UsageError, match="by a CLS token, and this VisionTransformer has none"):
        models.prune(tiny_vit(class_token=False, global_pool="avg"), method, **SOME[method])


def test_refused_without_predictors(tiny_vit: Tiny) -> None:
    with pytest.raises(UsageError, match="dynamicvit needs its trained predictors"):
        models.prune(tiny_vit(), "dynamicvit", prune_loc=[0, 1])
