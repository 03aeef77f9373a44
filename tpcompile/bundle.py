"""A bundle: the directory an export leaves behind, written whole or not at all, and checked before anything in it is used.

``stage`` gives a private folder beside the destination, ``seal`` hashes what lies in it and writes the manifest last, and only a
clean exit of ``stage`` moves it into place. ``read`` opens a bundle as untrusted input.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue, ValidationError

from tpcompile.errors import EnvironmentFault, IntegrityError, StageError, TpcompileError, UsageError
from tpcompile.files import replace_file
from tpcompile.manifest import FileInfo, Manifest

MANIFEST = "tpcompile.json"
VECTORS = "vectors/vectors.safetensors"
PRIMERS = "prime.safetensors"
REFERENCE = "reference/model.onnx"
REPORTS = "reports"
"""Folder for what is measured later; never hashed."""
MAX_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Vector:
    """One test vector: what went in, what came out, and per site the kept tokens (bool ``[B, N]``, original positions) and their scores."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    kept: tuple[np.ndarray, ...] = ()
    scores: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read. Its files are trusted only after ``verify``."""

    path: Path
    manifest: Manifest

    @property
    def identity(self) -> str:
        """See :attr:`Manifest.identity`."""
        return self.manifest.identity

    @property
    def reference(self) -> Path:
        """The masked program as ONNX, checked.

        Raises:
            IntegrityError: there is none, or it is not what the manifest says.
        """
        if REFERENCE not in self.manifest.files:
            raise IntegrityError(
                f"{self.path} holds no reference", fix="use the pruned bundle, not its dense part, or export again"
            )
        self.verify(name for name in self.manifest.files if name.startswith("reference/"))
        return self.path / REFERENCE

    @property
    def dense(self) -> "Bundle | None":
        """The dense baseline as a bundle of its own; None where there is none.

        Raises:
            IntegrityError: it is not the one this bundle was exported with.
        """
        return self._part("dense") if "dense" in self.manifest.parts else None

    def vectors(self) -> tuple[Vector, ...]:
        """The test vectors, checked, in the order they were written; empty where the bundle has none."""
        if VECTORS not in self.manifest.files:
            return ()
        self.verify([VECTORS])
        return _load_vectors(self.path / VECTORS)

    def primers(self) -> tuple[Mapping[str, np.ndarray], ...]:
        """The inputs that ``load`` runs, checked; empty where the bundle was not exported so."""
        if not self.manifest.primed:
            return ()
        self.verify([PRIMERS])
        return tuple(vector.inputs for vector in _load_vectors(self.path / PRIMERS))

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files with the manifest.

        Args:
            names: paths as in ``manifest.files``; None is everything, parts included, and then no further file may lie there.

        Raises:
            IntegrityError: a file is missing, truncated, changed, unlisted, or a link out of the bundle.
        """
        for name in self.manifest.files if names is None else names:
            if name not in self.manifest.files:
                raise IntegrityError(f"{name} is not in the manifest of {self.path}", fix="export again")
            _check(self.path, name, self.manifest.files[name])
        if names is not None:
            return
        for part in self.manifest.parts:
            self._part(part).verify()
        extra = sorted(set(_contents(self.path, self.manifest.parts)) - self.manifest.files.keys())
        if extra:
            raise IntegrityError(f"{extra[0]} is not in the manifest of {self.path}", fix="move it away, or export again")

    def record(self, key: str, value: JsonValue) -> "Bundle":
        """Put a measurement into the manifest (``measured``); the identity stays."""
        manifest = self.manifest.model_copy(update={"measured": {**self.manifest.measured, key: value}})
        _write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)

    def report(self, name: str, document: JsonValue) -> Path:
        """Write ``reports/<name>.json``, whole or not at all; reports are never hashed.

        Raises:
            EnvironmentFault: the bundle cannot be written.
        """
        path = self.path / REPORTS / f"{name}.json"
        try:
            return replace_file(path, json.dumps(document, indent=1))
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be written: {error.strerror}", fix="make the bundle writable") from error

    def _part(self, name: str) -> "Bundle":
        _inside(self.path, name)
        part = read(self.path / name)
        if part.identity != self.manifest.parts[name]:
            raise IntegrityError(f"{part.path} is not the one {self.path} was exported with", fix="export again")
        return part


def read(path: str | Path) -> Bundle:
    """Open a bundle's manifest. No other file is touched.

    Raises:
        UsageError: there is no such directory.
        EnvironmentFault: a newer tpcompile wrote it.
        IntegrityError: the manifest is missing or not valid.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"no bundle at {folder}", fix="pass the directory that `tpcompile export` wrote")
    _inside(folder, MANIFEST)
    file = folder / MANIFEST
    if not file.is_file() or file.stat().st_size > MAX_MANIFEST:
        raise IntegrityError(f"{folder} holds no usable {MANIFEST}", fix="pass a directory that `tpcompile export` wrote")
    text = file.read_bytes()
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(folder, error) from error
    return Bundle(folder, manifest)


@contextmanager
def stage(out: str | Path, force: bool = False, need: int = 0) -> Iterator[Path]:
    """A private folder that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: the bundle to write. Missing parents are made.
        force: replace an existing bundle, at the very end; anything else that exists is never replaced.
        need: bytes the bundle is expected to take; 0 where unknown.

    Raises:
        UsageError: ``out`` exists.
        EnvironmentFault: the disk is full, or the folder cannot be written.
        StageError: the block did not call ``seal``.
    """
    target = Path(out)
    _vacant(target, force)
    # Named before it is made: an interrupt at any point finds what to remove. A folder inside the private one gets the user's usual
    # mode, and the old bundle has a place to wait.
    private = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    fresh = private / "new"
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        _make(target.parent, private, fresh)
        with _space(fresh, need):
            yield fresh
            if not (fresh / MANIFEST).is_file():
                raise StageError(f"{target} was staged but never sealed", fix="report this: a bug in tpcompile")
            _flush([fresh, *fresh.rglob("*")])
        _vacant(target, force)  # again: another export may have finished meanwhile
        _move(fresh, target, private / "old")
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        for folder in made:
            _remove_empty(folder)
        raise
    shutil.rmtree(private, ignore_errors=True)


def _make(parent: Path, private: Path, fresh: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700)
        fresh.mkdir()
    except OSError as error:
        raise EnvironmentFault(f"{parent} cannot be written: {error.strerror}", fix="choose another output folder") from error


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash everything below a staged folder and write its manifest. Sub-bundles are sealed first; nothing is added afterwards.

    Returns:
        The manifest with ``files`` and ``parts`` filled in.
    """
    parts = {one.parent.name: read(one.parent).identity for one in sorted(folder.glob(f"*/{MANIFEST}"))}
    files = {name: _describe(folder / name) for name in _contents(folder, parts)}
    # Validated again, so that what is written is what `read` will accept.
    sealed = Manifest.model_validate({**manifest.model_dump(), "parts": parts, "files": files})
    _write_manifest(folder, sealed)
    return sealed


def write_vectors(path: Path, samples: Sequence[Vector]) -> None:
    """Write test vectors as one safetensors file: ``0.input.input_ids``, ``0.output.logits``, ``0.kept.site0``."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for i, sample in enumerate(samples):
        tensors |= {f"{i}.input.{name}": value for name, value in sample.inputs.items()}
        tensors |= {f"{i}.output.{name}": value for name, value in sample.outputs.items()}
        tensors |= {f"{i}.kept.site{j}": value for j, value in enumerate(sample.kept)}
        tensors |= {f"{i}.score.site{j}": value for j, value in enumerate(sample.scores)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def _load_vectors(path: Path) -> tuple[Vector, ...]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    groups: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    try:
        for key, value in load_file(path).items():
            number, kind, name = key.split(".", 2)
            groups.setdefault(int(number), {"input": {}, "output": {}, "kept": {}, "score": {}})[kind][name] = value
        rows = [groups[i] for i in range(len(groups))]
        sites = [[tuple(row[kind][f"site{j}"] for j in range(len(row[kind]))) for kind in ("kept", "score")] for row in rows]
        return tuple(Vector(row["input"], row["output"], *decided) for row, decided in zip(rows, sites, strict=True))
    except (SafetensorError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path.name} holds no test vectors: {error}", fix="export again") from error


def _invalid(folder: Path, error: ValidationError) -> TpcompileError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the top"
    found = first["input"]
    if where == "schema_version" and isinstance(found, int) and found > 1:
        return EnvironmentFault(f"{folder} has schema version {found}; this tpcompile reads 1", fix="pip install -U tpcompile")
    fix = "export again; never edit a bundle in place"
    return IntegrityError(f"{folder / MANIFEST} is not valid at {where}: {first['msg']}", fix=fix)


def _inside(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise IntegrityError(f"{name} in {root} leads outside the bundle", fix="copy the bundle with its links followed (cp -RL)")
    return path


def _check(root: Path, name: str, expected: FileInfo) -> None:
    path = _inside(root, name)
    if not path.is_file():
        raise IntegrityError(f"{name} is missing from {root}", fix="copy the whole directory, or export again")
    if path.stat().st_size != expected.size:
        raise IntegrityError(f"{name} has {path.stat().st_size} bytes, not {expected.size}", fix="copy it again, or export again")
    if _describe(path).sha256 != expected.sha256:
        raise IntegrityError(f"{name} was changed after export", fix="export again; never edit a bundle in place")


def _describe(path: Path) -> FileInfo:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(sha256=digest, size=path.stat().st_size)


def _contents(root: Path, parts: Iterable[str]) -> list[str]:
    """Files below ``root`` that its manifest lists, sorted: not itself, its parts, reports, or hidden ones."""
    outside = {MANIFEST, REPORTS, *parts}
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    hidden = {name for name in names if any(part.startswith(".") for part in name.parts)}
    return sorted(name.as_posix() for name in names if name.parts[0] not in outside and name not in hidden)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_file(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n")


def _vacant(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise UsageError(f"{target} exists", fix="choose another output folder, or pass --force to replace a bundle")
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise UsageError(f"{target} exists and is not a bundle", fix="choose another output folder; only bundles are replaced")


@contextmanager
def _space(folder: Path, need: int) -> Iterator[None]:
    """Say a full disk in one way, whoever met it first."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise _full(folder, need, free)
    try:
        yield
    except Exception as error:
        if not _says_full(error):
            raise
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        raise _full(folder, max(need, written), shutil.disk_usage(folder).free) from error


def _full(folder: Path, need: int, free: int) -> EnvironmentFault:
    place, megabyte = folder.parent.parent, 2**20
    return EnvironmentFault(
        f"the disk of {place} is full: {free // megabyte} MB free",
        fix=f"free at least {-(-need // megabyte)} MB there, or choose another disk",
    )


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the disk: libraries wrap ``OSError`` in their own classes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move(fresh: Path, target: Path, old: Path) -> None:
    """Put the new bundle in place; an old one steps aside for one rename only, and comes back if that fails."""
    if target.exists():
        target.replace(old)
    try:
        fresh.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    _flush([target.parent])


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
