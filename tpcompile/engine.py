"""An opened bundle: arrays in, arrays out, and on request which tokens each site kept, in original positions."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from tpcompile.backends import Backend, Closable, Session, backend, copier
from tpcompile.bundle import Bundle, read
from tpcompile.chain import open_chain, shared
from tpcompile.data.samples import Sample, batches, collate, split
from tpcompile.errors import InputError, UsageError
from tpcompile.inputs import Takes
from tpcompile.kept import Kept, compose
from tpcompile.lengths import cuts, length, lengthen, shorten, unpadded
from tpcompile.manifest import Manifest
from tpcompile.spec import TensorSpec


def check(feeds: Mapping[str, object], manifest: Manifest) -> dict[str, np.ndarray]:
    """Refuse what the engine cannot take: some runtimes accept a missing input, two lengths or an unknown token id in silence.

    Returns:
        Every input as a contiguous array, in the manifest's order.

    Raises:
        InputError: a name, dtype, rank, size or value that does not fit.
    """
    specs = tuple(tensor.spec for tensor in manifest.inputs)
    return Takes(specs, manifest.dims, manifest.ranges, manifest.attended).check(feeds)


class _Runner:
    """A manifest with the two sessions of one graph: the plain one, and one with taps that is opened when first asked for.

    Args:
        manifest: of the bundle.
        open_: gives the session with these taps.
    """

    def __init__(self, manifest: Manifest, open_: Callable[[tuple[str, ...]], Session]) -> None:
        self.manifest = manifest
        self._open = open_
        self._sessions: dict[tuple[str, ...], Session] = {}
        self._closed = False

    def run(self, feeds: Mapping[str, object], taps: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """Check, then compute the outputs and these taps."""
        if self._closed:
            raise UsageError("the engine is closed", fix="load the bundle again")
        arrays = check(feeds, self.manifest)
        return shorten(self.session(taps).run(lengthen(arrays, self.manifest)), self.manifest, length(arrays, self.manifest))

    def session(self, taps: tuple[str, ...] = ()) -> Session:
        """The session with these taps, opened once."""
        if taps not in self._sessions:
            self._sessions[taps] = self._open(taps)
        return self._sessions[taps]

    def traced(
        self, feeds: Mapping[str, object], kinds: tuple[str, ...], more: tuple[str, ...] = ()
    ) -> tuple[dict[str, np.ndarray], tuple[Kept, ...], dict[str, np.ndarray]]:
        """Outputs, per sample what each site decided, and ``more`` taps; ``kinds`` are the site taps this form of the program has."""
        sites = self.manifest.sites
        taps = tuple(f"site{i}.{kind}" for i, site in enumerate(sites) for kind in site.taps(kinds))
        values = self.run(feeds, (*taps, *more))
        samples, tokens = values["site0.keep"].shape if sites else (1, 0)
        rows = ({name: values[name][b : b + 1] for name in taps} for b in range(samples))
        own = length({name: np.asarray(value) for name, value in feeds.items()}, self.manifest)
        kept = tuple(unpadded(compose(row, len(sites), tokens), own) for row in rows)
        return self.outputs(values), kept, {name: values[name] for name in more}

    def outputs(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs the manifest promises, in its order."""
        return {output.name: values[output.name] for output in self.manifest.outputs}

    def close(self) -> None:
        """Close both sessions; a second call does nothing."""
        self._closed = True
        while self._sessions:
            self._sessions.popitem()[1].close()


class _Closes(Closable):
    """What both kinds of session share: closing, by hand or at the end of a ``with``."""

    _runner: _Runner

    def close(self) -> None:
        """Give the runtime's memory and threads back."""
        self._runner.close()


class Engine(_Closes):
    """A loaded bundle. Call it with the inputs by name; one thread at a time, others take ``share``.

    Attributes:
        bundle: where it came from, checked.
        threads: threads per inference, 0 for the runtime's default.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, prime: bool = True, callers: int = 1) -> None:
        manifest = bundle.manifest
        bundle.verify(name for name in manifest.files if "/" not in name)
        self.bundle = bundle
        self.threads = threads
        self._runner = _Runner(manifest, _opener(bundle, threads, callers))
        self._runner.session()
        for primer in bundle.primers() if prime else ():
            for inputs in cuts(check(primer, manifest), manifest):
                self(**inputs)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes."""
        return tuple(tensor.spec for tensor in self.manifest.inputs)

    def __call__(self, /, **inputs: object) -> dict[str, np.ndarray]:
        """Compute.

        Args:
            inputs: every input by name, as arrays of the dtypes and shapes in ``engine.inputs``.

        Returns:
            output name -> array.

        Raises:
            InputError: an input does not fit.
        """
        return self._runner.outputs(self._runner.run(inputs))

    def share(self) -> Self:
        """Another handle on the same compiled engine, for another thread; each is closed by itself.

        Raises:
            UsageError: the runtime serves one caller.
        """
        other = copy(self)
        other._runner = _Runner(self.manifest, lambda taps: shared(self._runner.session(taps)))
        other._runner.session()
        return other

    def each(self, samples: Sequence[Sample], batch: int = 1) -> list[dict[str, np.ndarray]]:
        """Compute for many samples, ``batch`` at a time.

        Samples of similar length go together, whatever their order: a batch is stored at its longest sample and, behind each
        site, at its largest count, so mixed lengths pay for rows that nobody reads.

        Args:
            samples: of one kind, see ``tpcompile.data.load``.
            batch: samples an inference; more than 1 needs a bundle exported with ``batch="ragged"``.

        Returns:
            Each sample's outputs, in the order of ``samples``, without padding.

        Raises:
            InputError: an input does not fit.
        """
        found: list[dict[str, np.ndarray]] = [{} for _ in samples]
        for group in batches(samples, batch, by_length=True):
            rows = [samples[i] for i in group]
            for i, outputs in zip(group, split(self(**collate(rows)), rows, self.manifest.along), strict=True):
                found[i] = outputs
        return found

    def kept(self, /, **inputs: object) -> tuple[dict[str, np.ndarray], Kept]:
        """Compute for one sample, and say which tokens each site kept. A second session, opened at the first call; slower.

        Raises:
            InputError: an input does not fit, or holds several samples.
        """
        outputs, each = self.kept_each(**inputs)
        if len(each) != 1:
            raise InputError(f"the inputs hold {len(each)} samples", fix="call engine.kept_each(**inputs)")
        return outputs, each[0]

    def kept_each(self, /, **inputs: object) -> tuple[dict[str, np.ndarray], tuple[Kept, ...]]:
        """The same for a batch: the outputs, and for each sample which tokens each site kept.

        Raises:
            InputError: an input does not fit.
        """
        outputs, kept, _ = self._runner.traced(inputs, ("keep", "index", "score"))
        return outputs, kept


class ReferenceSession(_Closes):
    """The masked program of a bundle, in ONNX Runtime: the truth the engine is compared with.

    Attributes:
        manifest: of the bundle.
        margins: by number of a bound of the manifest, how far dropped keys lay below their row's largest logit, at least, so far.
    """

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self.manifest = bundle.manifest
        self.margins: dict[int, float] = {}
        plain = bundle.manifest.model_copy(
            update={"lengths": ()}
        )  # the truth is what the masked program makes of the input itself
        self._runner = _Runner(plain, partial(_graph, backend("onnx"), bundle.reference.parent, threads, "fp32"))

    def kept_each(self, /, **inputs: object) -> tuple[dict[str, np.ndarray], tuple[Kept, ...]]:
        """Outputs and, per sample, what each site decided, all N rows stored throughout.

        Raises:
            InputError: an input does not fit.
        """
        bounds = tuple(f"bound{i}" for i in range(len(self.manifest.bounds)))
        outputs, kept, seen = self._runner.traced(inputs, ("keep", "score"), bounds)
        for i, name in enumerate(bounds):
            self.margins[i] = min(self.margins.get(i, np.inf), float(seen[name]))
        return outputs, kept


def load(path: str | Path, *, threads: int = 0, prime: bool = True, callers: int = 1) -> Engine:
    """Open a bundle: check its files against the manifest, then hand them to its runtime.

    Args:
        path: the directory an export wrote, or its ``dense/``.
        threads: threads per inference; 0 is the runtime's default.
        prime: run the inputs that the bundle was exported with for that (``export(prime=True)``), so that shapes like theirs are not new
            to the runtime later.
        callers: threads that will call it at once, each through a handle of its own (``engine.share()``).

    Raises:
        UsageError: there is no bundle, or its target is unknown.
        IntegrityError: a file is not what the manifest says.
        BackendUnavailable: the runtime is not installed.
        BuildFailed: the runtime refuses the files.
    """
    if threads < 0:
        raise UsageError(f"threads is {threads}", fix="pass 0 for the runtime's default, or a positive number")
    return Engine(read(path), threads, prime, callers)


def open_reference(bundle: Bundle, threads: int = 0) -> ReferenceSession:
    """Open the masked program that lies in a bundle.

    Raises:
        IntegrityError: the bundle has none, or it was changed.
    """
    return ReferenceSession(bundle, threads)


def _graph(runtime: Backend, folder: Path, threads: int, precision: str, taps: tuple[str, ...]) -> Session:
    """One graph, with taps."""
    return runtime.open(folder, taps=taps, threads=threads, precision=precision)


def _opener(bundle: Bundle, threads: int, callers: int) -> Callable[[tuple[str, ...]], Session]:
    """What opens a bundle's engine with taps; the stages of a chain are opened once for all."""
    manifest, runtime = bundle.manifest, backend(bundle.manifest.target)
    opened = partial(runtime.open, bundle.path, threads=threads, precision=manifest.precision, callers=callers)
    if manifest.form != "staged":
        return lambda taps: _copies(bundle, threads, callers) if manifest.copies > 1 and not taps else opened(taps=taps)
    return open_chain(manifest, lambda number: opened(stage=number)).tapped


def _copies(bundle: Bundle, threads: int, callers: int) -> Session:
    """The engine as often as the manifest says.

    Raises:
        UsageError: its runtime does not care for shapes.
    """
    manifest, runtime = bundle.manifest, copier(bundle.manifest.target)
    return runtime.open_copies(bundle.path, manifest.copies, threads=threads, precision=manifest.precision, callers=callers)
