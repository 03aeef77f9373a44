"""What is to be compiled: a pruned model with its dense twin, example inputs, and where they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import models
from tpcompile.capture import Dynamic
from tpcompile.errors import ModelError, UsageError, first_line
from tpcompile.manifest import MethodInfo, ModelInfo
from tpcompile.models.checkpoint import digest, read_json

EXAMPLE_LENGTH = 16
"""Tokens in the example input of a model directory: the length is dynamic, so any small one serves."""


@dataclass(frozen=True)
class Subject:
    """A model ready for capture.

    Attributes:
        model: pruned, masked form.
        dense: the unpruned model, or None: then the captured program with every keep true serves.
        inputs: example tensors by name.
        dynamic: input -> dim -> name.
        ranges: dim name -> least and greatest size.
        values: input -> least and greatest value.
        info: for the manifest.
        method: for the manifest.
        assets: files to carry along.
    """

    model: nn.Module | ExportedProgram
    dense: nn.Module | None
    inputs: Mapping[str, Tensor]
    dynamic: Dynamic
    ranges: Mapping[str, tuple[int, int]]
    info: ModelInfo
    method: MethodInfo | None = None
    values: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    assets: tuple[Path, ...] = ()


def subject_of(
    model: nn.Module | ExportedProgram | str | Path,
    inputs: Mapping[str, Tensor] | None,
    dynamic: Dynamic | None,
    method: str | None,
    parameters: Mapping[str, Any] | None,
    pooling: str = "auto",
    dense: nn.Module | None = None,
) -> Subject:
    """Bring a module, an ExportedProgram, a ``.pt2`` file or a model directory to one form.

    Raises:
        UsageError: arguments that do not belong together.
        ModelError: unusable files, or weights that are not finite.
    """
    if isinstance(model, (str, Path)) and Path(model).suffix == ".pt2":
        model = _read_pt2(Path(model))
    if isinstance(model, (str, Path)):
        return _from_directory(model, method, dict(parameters or {}), pooling)
    if method is not None and isinstance(model, nn.Module):
        model = models.prune(model, method, **dict(parameters or {}))
    elif method is not None:
        raise UsageError(
            "a traced program cannot be pruned by name", fix="prune the module first: tpcompile.models.prune(model, method=...)"
        )
    if inputs is None:
        raise UsageError("a module needs example inputs", fix="pass inputs={'input_ids': tensor, ...}")
    twin = dense if dense is not None else model.dense if isinstance(model, models.Pruned) else None
    method_info = MethodInfo(name=model.method, parameters=model.method_parameters) if isinstance(model, models.Pruned) else None
    return Subject(model, twin, dict(inputs), dynamic or {}, {}, _info(model), method_info)


def _from_directory(source: str | Path, method: str | None, parameters: dict[str, Any], pooling: str) -> Subject:
    loaded = models.load(source, pooling=pooling)
    name = method or (loaded.imported[0] if loaded.imported else None)
    if name is None:
        raise UsageError(f"{source} is a dense model", fix=f"say how to prune it: --method {'|'.join(models.METHODS)}")
    pruned = models.prune(loaded.model, name, **loaded.parameters(name, parameters))
    vocabulary = _vocabulary(loaded.model)
    ids = (torch.arange(EXAMPLE_LENGTH) * 7 + 3) % vocabulary
    inputs = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, EXAMPLE_LENGTH, dtype=torch.int64)}
    info = ModelInfo(id=_name(Path(source)), family=loaded.family, architecture=loaded.architecture, sha256=loaded.weights_sha256)
    return Subject(
        model=pruned,
        dense=loaded.model,
        inputs=inputs,
        dynamic={name: {1: "seq"} for name in inputs},
        ranges={"seq": (2, loaded.max_length)},
        info=info,
        method=MethodInfo(name=pruned.method, parameters=pruned.method_parameters),
        values={"input_ids": (0, vocabulary - 1), "attention_mask": (0, 1)},
        assets=loaded.assets,
    )


def _name(folder: Path) -> str:
    """What the config calls the model, else the folder's name."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    stated = config.get("_name_or_path")
    return stated if isinstance(stated, str) and stated and not Path(stated).is_absolute() else folder.resolve().name


def _vocabulary(model: nn.Module) -> int:
    """Rows of the word embedding: the first table the model owns."""
    return max(m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding) and "word" in n)


def _info(model: nn.Module | ExportedProgram) -> ModelInfo:
    if isinstance(model, ExportedProgram):
        return ModelInfo(id="exported", family="", architecture="ExportedProgram", sha256=digest(model.state_dict))
    bad = next(
        (name for name, value in model.state_dict().items() if value.is_floating_point() and not torch.isfinite(value).all()),
        None,
    )
    if bad is not None:
        raise ModelError(f"weight {bad} holds NaN or infinity", fix="load a sound checkpoint")
    if isinstance(model, models.Pruned):
        return ModelInfo(
            id=model.parts.architecture,
            family=model.family,
            architecture=model.parts.architecture,
            sha256=digest(model.dense.state_dict()),
        )
    name = type(model).__name__
    return ModelInfo(id=name, family="", architecture=name, sha256=digest(model.state_dict()))


def _read_pt2(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise UsageError(f"no file {path}", fix="pass the .pt2 that torch.export.save wrote")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{path.name} is not a torch.export program: {first_line(error)}", fix="save it again with torch.export.save"
        ) from error
