"""What is to be compiled: a pruned model with its dense twin, example inputs, and where they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tpcompile import models
from tpcompile.capture import Dynamic
from tpcompile.errors import ModelError, UsageError, first_line
from tpcompile.inputs import Takes
from tpcompile.manifest import FittedInfo, MethodInfo, ModelInfo
from tpcompile.models.checkpoint import digest
from tpcompile.models.families.speech import SpeechParts
from tpcompile.models.families.vit import VitParts
from tpcompile.program import Program
from tpcompile.spec import Patches, TensorSpec

LARGEST_BATCH = 512
"""Greatest size of a ragged batch."""


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
        documents: name -> content of files to write beside them.
        patches: which part of an image each token is; None for text and for a module of the caller's own.
        note: what a reader of a report must know about the weights.
        batch: ``one``, or ``ragged``: any number of samples, each keeping its own count.
        assume_masked: sites whose dropped tokens the caller says are masked.
        skip_below: sites that save less than this share of the cost are left masked.
        fitted: how the method's parameters came to their values, where they were fitted to a FLOPs ratio.
    """

    model: nn.Module | ExportedProgram | Program
    dense: nn.Module | None
    inputs: Mapping[str, Tensor]
    dynamic: Dynamic
    ranges: Mapping[str, tuple[int, int]]
    info: ModelInfo
    method: MethodInfo | None = None
    values: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    assets: tuple[Path, ...] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    patches: Patches | None = None
    note: str = ""
    batch: str = "one"
    assume_masked: tuple[str, ...] = ()
    skip_below: float = 0.0
    fitted: FittedInfo | None = None

    @property
    def pruned(self) -> models.Pruned:
        """The model, where one of our methods prunes it.

        Raises:
            UsageError: it prunes by itself.
        """
        if not isinstance(self.model, models.Pruned):
            raise UsageError(
                "the model drops tokens by itself: no parameter of ours moves how many",
                fix="leave the FLOPs ratio out, or pass a dense model and a method",
            )
        return self.model

    @property
    def takes(self) -> Takes:
        """What the model takes, as far as its example and its source say."""
        specs = tuple(
            TensorSpec(
                name,
                str(value.dtype).removeprefix("torch."),
                tuple(self.dynamic.get(name, {}).get(dim, size) for dim, size in enumerate(value.shape)),
            )
            for name, value in self.inputs.items()
        )
        return Takes(specs, self.ranges, self.values)

    def carry(self, folder: Path) -> None:
        """Put the tokenizer, preprocessing and config files into a folder."""
        for asset in self.assets:
            copyfile(asset, folder / asset.name)
        for name, content in self.documents.items():
            (folder / name).write_text(content, encoding="utf-8")

    def turned(self, factor: float) -> "Subject":
        """The same with the method's dial turned; see ``tpcompile.models.Pruned.turned``."""
        model = self.pruned.turned(factor)
        return replace(self, model=model, method=MethodInfo(name=model.method, parameters=model.method_parameters))


def subject_of(
    model: nn.Module | ExportedProgram | Program | str | Path,
    inputs: Mapping[str, Tensor] | None,
    dynamic: Dynamic | None,
    method: str | None,
    parameters: Mapping[str, Any] | None,
    pooling: str = "auto",
    dense: nn.Module | None = None,
    batch: str = "one",
    checkpoint: Path | None = None,
) -> Subject:
    """Bring a module, an ExportedProgram, a ``.pt2`` file, or a source that `tpcompile.models.load` takes, to one form.

    Args:
        model: what is to be compiled.
        inputs: example tensors by name, for a module; a traced program may hold its own.
        dynamic: input -> dim -> name, for a module; its batch is the caller's to declare. A traced program knows its dynamic dims, and
            without a name they are called by the first input that has them: ``x_1``.
        method: pruning method for a dense model.
        parameters: the method's.
        pooling: see `tpcompile.models.load`.
        dense: the unpruned twin of a module.
        batch: ``one``, or ``ragged``: the first dim of every input of a loaded source is dynamic and named ``batch``.
        checkpoint: see `tpcompile.models.load`.

    Raises:
        UsageError: arguments that do not belong together.
        ModelError: unusable files, or weights that are not finite.
    """
    if batch not in ("one", "ragged"):
        raise UsageError(f"unknown batch policy {batch!r}", fix="use one or ragged")
    if isinstance(model, (str, Path)) and Path(model).suffix == ".pt2":
        model = read_pt2(Path(model))
    if isinstance(model, (str, Path)):
        return _from_source(
            model, models.load(model, pooling=pooling, checkpoint=checkpoint), method, dict(parameters or {}), batch
        )
    if checkpoint is not None:
        raise UsageError("a module has weights of its own: a checkpoint has no place", fix="leave the checkpoint out")
    if method is not None and isinstance(model, nn.Module):
        model = models.prune(model, method, **dict(parameters or {}))
    elif method is not None:
        raise UsageError(
            "a traced program cannot be pruned by name", fix="prune the module first: tpcompile.models.prune(model, method=...)"
        )
    if isinstance(model, Program):
        inputs = inputs or model.example()
    if isinstance(model, ExportedProgram):
        inputs, dynamic = inputs or _example(model), dynamic or _dynamic(model)
    if not inputs:
        raise UsageError("a module needs example inputs", fix="pass inputs={'input_ids': tensor, ...}")
    twin = dense if dense is not None else model.dense if isinstance(model, models.Pruned) else None
    method_info = MethodInfo(name=model.method, parameters=model.method_parameters) if isinstance(model, models.Pruned) else None
    patches = _patches(model) if isinstance(model, models.Pruned) else None
    return Subject(model, twin, dict(inputs), dynamic or {}, {}, _info(model), method_info, patches=patches, batch=batch)


def _patches(model: models.Pruned) -> Patches | None:
    """Which part of an image, or of a spectrogram, each token of a pruned model is."""
    return Patches(model.parts.prefix, *model.parts.grid) if isinstance(model.parts, (VitParts, SpeechParts)) else None


def _from_source(
    source: str | Path, loaded: models.Source, method: str | None, parameters: dict[str, Any], batch: str
) -> Subject:
    name = method or (loaded.imported[0] if loaded.imported else None)
    if name is None:
        raise UsageError(f"{source} is a dense model", fix=f"say how to prune it: --method {'|'.join(models.METHODS)}")
    pruned = models.prune(loaded.model, name, **loaded.parameters(name, parameters))
    ragged = batch == "ragged"
    return Subject(
        model=pruned,
        dense=loaded.model,
        inputs=_two(loaded.example) if ragged else dict(loaded.example),
        dynamic={one: {**({0: "batch"} if ragged else {}), **loaded.dynamic.get(one, {})} for one in loaded.example},
        ranges={**loaded.ranges, **({"batch": (1, LARGEST_BATCH)} if ragged else {})},
        info=ModelInfo(id=loaded.name, family=loaded.family, architecture=loaded.architecture, sha256=loaded.weights_sha256),
        method=MethodInfo(name=pruned.method, parameters=pruned.method_parameters),
        values=loaded.values,
        assets=loaded.assets,
        documents=loaded.documents,
        patches=loaded.patches,
        note=loaded.note,
        batch=batch,
    )


def _two(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two samples from one: the second one's values in reverse, and the last quarter of its attention mask 0."""
    second = {name: value.flip(-1) for name, value in example.items()}
    if "attention_mask" in second:
        mask = second["attention_mask"].clone()
        mask[:, mask.shape[1] * 3 // 4 :] = 0
        second["attention_mask"] = mask
    return {name: torch.cat([value, second[name]]) for name, value in example.items()}


def _info(model: nn.Module | ExportedProgram | Program) -> ModelInfo:
    if isinstance(model, Program):
        model = model.exported
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


def _placeholders(exported: ExportedProgram) -> dict[str, Any]:
    """Input name -> its traced value."""
    names = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names}


def _example(exported: ExportedProgram) -> dict[str, Tensor]:
    """The inputs that a program was traced with, where it holds them."""
    return dict(zip(_placeholders(exported), pytree.tree_leaves(exported.example_inputs or ()), strict=False))


def _dynamic(exported: ExportedProgram) -> Dynamic:
    """The dims of a traced program that are dynamic: those of one size have one name."""
    names: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for name, value in _placeholders(exported).items():
        for dim, size in enumerate(getattr(value, "shape", ())):
            if not isinstance(size, int):
                found.setdefault(name, {})[dim] = names.setdefault(str(size), f"{name}_{dim}")
    return found


def read_pt2(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file.

    Raises:
        UsageError: there is none.
        ModelError: it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"no file {path}", fix="pass the .pt2 that torch.export.save wrote")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{path.name} is not a torch.export program: {first_line(error)}", fix="save it again with torch.export.save"
        ) from error
