"""``tpcompile export``: a model in, a bundle out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings

BARE_WORD = re.compile(r"[A-Za-z_][\w.-]*")


def parameter(text: str) -> tuple[str, Any]:
    """``name=VALUE`` where VALUE is JSON, or a bare word that stands for a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise click.BadParameter(f"'{text}' is not of the form name=value")
    try:
        return name.strip(), json.loads(value)
    except ValueError as error:
        if BARE_WORD.fullmatch(value):
            return name.strip(), value
        raise click.BadParameter(f"the value of '{name}' is not JSON: {value} (a list: {name}='[0.1, 0.2]')") from error


def ladder(text: str) -> tuple[int, ...]:
    """``16`` or ``32,64,128``; nothing is no ladder."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"'{text}' is no list of sizes, such as 16 or 32,64,128") from error


EXAMPLES = """\b
Examples:
  tpcompile export onnx -m minilm/ --method ltp --param thresholds='[0, 0.002, 0.004]' -o out
  tpcompile export openvino -m minilm/ --recipe recipe.yaml --dtype bf16 --batch ragged -o out
  tpcompile export tensorrt-rtx -m minilm/ --recipe recipe.yaml --dtype fp16 --capability sm86 --capability sm89 --dim seq=4:64:256 -o out
  tpcompile export onnx -m timm/deit_small_patch16_224 --checkpoint deit.safetensors --recipe recipe.yaml -o out
  tpcompile export onnx -m timm/deit_small_patch16_224 --recipe as-vit-deit-s --flops 1.5 --calibrate images/ -o out
"""


def span(text: str) -> tuple[str, tuple[int, int, int]]:
    """``seq=4:64:128``: a dim, and its least, usual and largest size."""
    name, _, sizes = text.partition("=")
    try:
        least, usual, most = (int(size) for size in sizes.split(":"))
    except ValueError as error:
        raise click.BadParameter(f"'{text}' is not of the form name=min:opt:max, such as seq=4:64:128") from error
    return name.strip(), (least, usual, most)


LOWERINGS, FORMS = ("dynamic", "bucketed", "static"), ("single", "staged")
DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8")
LOWERING = "Rows a site stores: what is kept, that rounded up to a bucket, or a constant."
COPIES = "Engines in memory, each for inputs of other lengths; of openvino."
FLOPS = "Dense over pruned, such as 2: one factor on the method's parameters is found at which data costs it. No learning."
BATCH = "one: a sample an inference. ragged: any number, each with its own counts."


MODEL_OPTIONS = (
    click.option(
        "--checkpoint", metavar="F", type=click.Path(path_type=Path), help="Weights for timm/NAME: a .safetensors file."
    ),
    click.option("--method", metavar="M", help="The pruning method, such as ltp."),
    click.option(
        "--param",
        "params",
        multiple=True,
        type=parameter,
        metavar="NAME=JSON",
        help="A parameter of the method; may be repeated.",
    ),
    click.option(
        "--recipe", metavar="FILE", type=click.Path(path_type=Path), help="YAML, or a shipped name: digits-50. --param wins."
    ),
    click.option("--pooling", default="auto", show_default=True, metavar="P", help="Of a bare encoder: auto, mean, cls."),
    click.option("--batch", type=click.Choice(["one", "ragged"]), default="one", show_default=True, help=BATCH),
    click.option(
        "--assume-masked", multiple=True, metavar="SITE", help="Take this site's dropped tokens as masked where unproved."
    ),
)


def model_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is compiled, for every verb that takes a model."""
    for option in reversed(MODEL_OPTIONS):
        verb = option(verb)
    return verb


@click.command(cls=Verb, epilog=EXAMPLES)
@click.argument("target", metavar="onnx|openvino|tensorrt|tensorrt-rtx")
@click.option("-m", "--model", required=True, metavar="MODEL", help="A model directory, timm/NAME, or a .pt2 file.")
@model_options
@click.option("--lowering", type=click.Choice(["auto", *LOWERINGS]), default="auto", show_default=True, help=LOWERING)
@click.option("--form", type=click.Choice(["auto", *FORMS]), default="auto", show_default=True, help="One graph, or a chain.")
@click.option("--buckets", type=ladder, default="", metavar="N,N", help="Of bucketed: 16 for multiples of 16, or 32,64,128.")
@click.option("--flops", type=float, metavar="R", help=FLOPS)
@click.option("--calibrate", metavar="F", help="Data for --flops, and for the counts of static; see --data of validate.")
@click.option("--static-quantile", type=float, default=1.0, show_default=True, metavar="Q", help="The share of it that must fit.")
@click.option(
    "--skip-below",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Leave sites masked that save less of the cost.",
)
@click.option("--tune", is_flag=True, help="Build what lowering and form leave open, and take what is fastest on that data.")
@click.option("--lengths", type=ladder, default="", metavar="N,N", help="Pad inputs to a ladder, where proved to change nothing.")
@click.option("--prime", is_flag=True, help="Carry inputs of that data along, and run them when the engine is loaded.")
@click.option("--copies", type=click.IntRange(1), default=1, show_default=True, metavar="N", help=COPIES)
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Arithmetic of the engine.")
@click.option("--dim", "dims", multiple=True, type=span, metavar="NAME=MIN:OPT:MAX", help="Sizes it must take; may be repeated.")
@click.option(
    "--capability", "capabilities", multiple=True, metavar="SM", help="GPU to build for, such as sm89; may be repeated."
)
@click.option("-o", "--output", "out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The bundle to write.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dump-ir", metavar="DIR", type=click.Path(path_type=Path), help="Write the program after every pass.")
@click.pass_obj
def export(settings: Settings, /, target: str, model: str, **options: Any) -> None:
    """Compile MODEL into a bundle for a target.

    The bundle is written whole or not at all, with the dense baseline, the masked reference and test vectors inside.
    """
    chosen = method_of(options.pop("method"), dict(options.pop("params")), options.pop("recipe"))
    flops = options.pop("flops")
    with settings.work() as progress:
        from tpcompile import api

        bundle = api.export(
            model,
            target=target,
            method=chosen.method,
            parameters=chosen.parameters,
            flops=chosen.flops if flops is None else flops,
            precision=options.pop("dtype"),
            dims=dict(options.pop("dims")),
            progress=progress,
            **options,
        )
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    tried: Any = manifest.measured.get("tune", [])
    document = {
        "bundle": str(bundle.path),
        "target": manifest.target,
        "identity": manifest.identity,
        "bytes": size,
        "lowering": manifest.lowering,
        "form": manifest.form,
        "buckets": list(manifest.buckets),
        "counts": list(manifest.counts),
        "reason": manifest.reason,
        "fitted": None if manifest.fitted is None else manifest.fitted.model_dump(mode="json"),
        "tune": tried,
    }
    settings.emit(document, f"{bundle.path}: {manifest.target} bundle, {len(manifest.sites)} sites, {size / 1e6:.1f} MB")
    sizes = ",".join(map(str, manifest.buckets or manifest.counts))
    settings.say(f"lowering {manifest.lowering}{sizes and f' {sizes}'}, form {manifest.form}: {manifest.reason}")
    if manifest.fitted is not None:
        settings.say(f"fitted, not learned: {manifest.fitted.text()}")
    for one in tried:
        sizes = ",".join(map(str, one["sizes"]))
        how = f"{one['lowering']}{sizes and f' {sizes}'}, {one['form']}"
        settings.say(f"  {how:<24}{one['cold_ms']:>8.0f} ms cold{one['warm_ms']:>8.0f} ms warm")
    if manifest.note:
        settings.say(f"note: {manifest.note}")
    settings.say(f"next: tpcompile validate {bundle.path} && tpcompile bench {bundle.path}")


class Chosen(NamedTuple):
    """What the command line and a recipe say of a method together.

    Attributes:
        method: its name.
        parameters: of it.
        flops: the ratio that they are to be fitted to; None: they are what they are.
    """

    method: str | None
    parameters: dict[str, Any] | None
    flops: float | None = None


def method_of(method: str | None, parameters: dict[str, Any], recipe: Path | None) -> Chosen:
    """Join the recipe and the command line: the line wins for parameters, and may not contradict the method.

    Where the line gives what the recipe's ratio would move, it is taken as it is.
    """
    if recipe is None:
        return Chosen(method, parameters or None)
    from tpcompile.errors import UsageError
    from tpcompile.recipe import Recipe

    found = Recipe.read(recipe)
    if method not in (None, found.method):
        raise UsageError(f"--method {method}, but {recipe} is for {found.method}", fix="drop one of the two")
    return Chosen(found.method, {**found.parameters, **parameters}, found.flops if _is_shape(found.method, parameters) else None)


def say_shape(settings: Settings, chosen: Chosen) -> None:
    """Say of a recipe that names a ratio that a verb that fits nothing took its values as they are."""
    if chosen.flops is not None:
        settings.say(f"the recipe's values are a shape: `export` fits it to FLOPs /{chosen.flops:g} on data")


def _is_shape(method: str, parameters: dict[str, Any]) -> bool:
    """Whether the line leaves a method's dial to the recipe."""
    from tpcompile.models.methods import find_method

    return parameters.keys().isdisjoint(dial.name for dial in find_method(method).dials)
