"""The samples a bundle is judged and timed on: what the user gives, else what comes with it; and what inputs for it are made like."""

from pathlib import Path

from tpcompile.bundle import Bundle
from tpcompile.data.images import CONFIG
from tpcompile.data.load import load_data
from tpcompile.data.probes import Wants, apart
from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.manifest import Manifest


def samples_of(found: Bundle, data: str | Path | None, limit: int | None, default: str, truncate: bool) -> list[Sample]:
    """The data asked for; else real texts or images that fit, where the bundle takes such; else its own test vectors.

    Args:
        found: the bundle.
        data: see ``tpcompile.data.load.load_data``.
        limit: at most this many.
        default: for a bundle with a tokenizer.
        truncate: cut texts that are too long.
    """
    names = tuple(t.name for t in found.manifest.inputs)
    longest = found.manifest.dims.get("seq", (2, 512))[1]
    patches = found.manifest.patches.spec if found.manifest.patches else None
    grey = (found.path / CONFIG).is_file() and found.manifest.inputs[0].shape[1:] == (1, 8, 8)
    texts = (found.path / "tokenizer.json").is_file()
    specs: tuple[str | Path, ...] = (default, "docstrings") if texts else ("digits:test",) if grey else ()
    for spec in specs if data is None else (data,):
        rows = load_data(spec, found.path, longest, limit, truncate=truncate, names=names, patches=patches)
        if rows or data is not None:
            return rows
    tokens = patches.tokens if patches else 0
    return [Sample("", row, tokens=tokens) for row in wants(found).examples][:limit]


def wants(found: Bundle) -> Wants:
    """What samples for a bundle are made like; its test vectors are the examples."""
    manifest = found.manifest
    examples = [row for vector in found.vectors() for row in apart(vector.inputs, manifest.batch == "ragged")]
    patches = manifest.patches.spec if manifest.patches else None
    return Wants([tensor.spec for tensor in manifest.inputs], manifest.dims, manifest.ranges, found.path, patches, examples)


def fixed_batch(manifest: Manifest) -> int:
    """Samples that every inference of this engine takes; 0 where any number may."""
    first = next((tensor.shape[0] for tensor in manifest.inputs if tensor.shape), 1)
    return first if isinstance(first, int) else 0


def batch_of(found: Bundle, asked: int | None, default: int) -> int:
    """Samples an inference.

    Raises:
        UsageError: more than one, of a bundle that takes one; or another number than a bundle takes.
    """
    fixed = fixed_batch(found.manifest)
    if fixed > 1 and asked not in (None, fixed):
        raise UsageError(f"{found.path} takes {fixed} samples an inference", fix="leave --batch-size out")
    if fixed > 1:
        return fixed
    ragged = found.manifest.batch == "ragged"
    if asked is not None and asked > 1 and not ragged:
        raise UsageError(
            f"{found.path} takes one sample an inference", fix="export with --batch ragged, or leave --batch-size out"
        )
    return asked or (default if ragged else 1)

