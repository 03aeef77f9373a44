import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpcompile import models
from tpcompile.errors import ModelError, UsageError

Tiny = Callable[..., Any]
GATES = {"token_z": torch.tensor([[0.9, 0.4, 0.0], [1.0, 0.0, 0.2]]), "pruner_z": torch.tensor([0.7, 0.0])}


def _write(folder: Path, model: Any, gates: dict[str, Any] | None, **more: Tensor) -> Path:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(weights | more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    if gates is not None:
        torch.save(gates, folder / "zs.pt")
    return folder


@torch.no_grad()
def test_directory_is_recognised_and_read(tmp_path: Path, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    model = tiny("bert", head=True)
    source = models.load(_write(tmp_path, model, GATES, **{"layer_transformation.weight": torch.zeros(2)}))
    assert source.imported == ("top", {"token_z": [[1, 1, 0], [1, 0, 1]], "pruner_z": [1, 0]})
    logits = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(source.model(*padded)["logits"], logits, rtol=0, atol=1e-5)
    pruned = models.prune(source.model, "top", **source.parameters("top", {}))
    assert [step.gates is not None for step in pruned.body.steps] == [False, True, False]


def test_the_pickled_gates_are_never_read(tmp_path: Path, tiny: Tiny) -> None:
    _write(tmp_path, tiny("bert", head=True), None)
    (tmp_path / "l0_module.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ModelError) as caught:
        models.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has its gates in l0_module.pt only, a pickled object, which tpcompile does not read\n"
        "  fix     save them beside it with the official code: torch.save({'token_z': ..., 'pruner_z': ...}, 'zs.pt')"
    )
    torch.save({"token_z": [1]}, tmp_path / "zs.pt")
    with pytest.raises(ModelError, match=r"zs\.pt is not a flat dict of weights"):
        models.load(tmp_path)
    (tmp_path / "zs.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ModelError, match=r"zs\.pt is corrupt, or holds more than weights, which tpcompile does not unpickle"):
        models.load(tmp_path)


FIX = "\n  fix     pass zs.pt as the official code saved it: token_z [locations, bins] and pruner_z [locations]"


@pytest.mark.parametrize(
    ("gates", "text"),
    [
        ({"token_z": torch.ones(2, 3)}, "zs.pt lacks pruner_z"),
        (GATES | {"head_z": torch.ones(2)}, "zs.pt holds head_z"),
        ({"token_z": torch.ones(2, 3), "pruner_z": torch.ones(3)}, "zs.pt: token_z has shape [2, 3], pruner_z [3]"),
    ],
)
def test_other_gates_are_refused(gates: dict[str, Tensor], text: str, tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ModelError) as caught:
        models.load(_write(tmp_path, tiny("bert", head=True), gates))
    assert str(caught.value) == text + FIX


def test_more_locations_than_layers(tmp_path: Path, tiny: Tiny) -> None:
    gates = {"token_z": torch.ones(3, 2), "pruner_z": torch.ones(3)}
    source = models.load(_write(tmp_path, tiny("bert", head=True), gates))
    with pytest.raises(UsageError) as caught:
        models.prune(source.model, "top", **source.parameters("top", {}))
    assert str(caught.value) == (
        "token_prune_loc is [0, 1, 2], the model has blocks 0 to 2\n  fix     give rising block numbers from 1 to 2"
    )


def test_a_missing_weight(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("bert", head=True)
    del model.bert.encoder.layer[1].output.dense
    with pytest.raises(ModelError, match=r"weights are missing for bert\.encoder\.layer\.1\.output\.dense\.weight"):
        models.load(_write(tmp_path, model, GATES))
