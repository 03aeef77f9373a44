"""Data sets in their own layouts: GLUE's and SQuAD's files, and what the package ``datasets`` has here. Nothing is downloaded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpcompile.data.textfiles import Text, read_text, row_texts
from tpcompile.errors import EnvironmentFault, InputError, ModelError, UsageError, first_line

ENTAILMENT = ("entailment", "neutral", "contradiction")
FOLDERS = "glue:TASK:FOLDER, squad:FILE.json, datasets:FOLDER[:SPLIT]"
SPLITS = ("validation", "test", "train")


@dataclass(frozen=True)
class Layout:
    """One task of GLUE.

    Attributes:
        folder: of the files as they are published.
        columns: our name -> theirs, or the column's number where the file has no header.
        classes: names of the labels, in the usual order; empty where they are numbers already.
        metric: of ``tpcompile.proof.scores``.
        file: with labels.
    """

    folder: str
    columns: Mapping[str, str | int]
    classes: tuple[str, ...] = ()
    metric: str = "accuracy"
    file: str = "dev.tsv"


TWO = {"sentence1": "sentence1", "sentence2": "sentence2"}
GLUE = {
    "cola": Layout("CoLA", {"text": 3, "label": 1}, metric="matthews"),
    "sst2": Layout("SST-2", {"text": "sentence", "label": "label"}),
    "mrpc": Layout("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}, metric="f1"),
    "qqp": Layout("QQP", {"sentence1": "question1", "sentence2": "question2", "label": "is_duplicate"}, metric="f1"),
    "stsb": Layout("STS-B", {**TWO, "label": "score"}, metric="pearson"),
    "mnli": Layout("MNLI", {**TWO, "label": "gold_label"}, ENTAILMENT, file="dev_matched.tsv"),
    "mnli-mm": Layout("MNLI", {**TWO, "label": "gold_label"}, ENTAILMENT, file="dev_mismatched.tsv"),
    "qnli": Layout("QNLI", {"sentence1": "question", "sentence2": "sentence", "label": "label"}, ("entailment", "not_entailment")),
    "rte": Layout("RTE", {**TWO, "label": "label"}, ("entailment", "not_entailment")),
    "wnli": Layout("WNLI", {**TWO, "label": "label"}),
}  # fmt: skip
"""Task -> layout; the order of the classes is that of the Hugging Face data set, which models are trained on."""
LIBRARY_SPLITS = {"mnli": "validation_matched", "mnli-mm": "validation_mismatched"}


@dataclass(frozen=True)
class Labels:
    """How the names of labels become numbers: as the model has them where it knows all of them, else in the task's order."""

    model: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Labels":
        """From a bundle's ``config.json``; empty where it names no labels.

        Raises:
            ModelError: it is no such file.
        """
        path = folder / "config.json"
        if not path.is_file():
            return cls()
        try:
            found = json.loads(read_text(path)).get("label2id") or {}
            return cls({str(name).lower(): int(number) for name, number in found.items()})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} does not say which label is which: {first_line(error)}", fix="save the model again") from error

    def order(self, classes: Sequence[str]) -> Mapping[str, int]:
        """Name in lower case -> number."""
        names = [name.lower() for name in classes]
        return self.model if names and set(names) <= self.model.keys() else {name: i for i, name in enumerate(names)}


def open_task(spec: str, labels: Labels) -> list[Text] | None:
    """The texts of a data set; None where the words name none.

    Args:
        spec: ``glue:TASK`` or ``squad`` (as ``datasets`` has them on this machine), ``glue:TASK:FOLDER``, ``squad:FILE.json``,
            ``datasets:FOLDER[:SPLIT]`` (what ``save_to_disk`` wrote).
        labels: of the model.

    Raises:
        UsageError: an unknown task.
        InputError: files that are missing or of another kind.
        EnvironmentFault: the package ``datasets`` is needed and missing.
    """
    kind, _, rest = spec.partition(":")
    if kind == "glue":
        name, _, folder = rest.partition(":")
        if name not in GLUE:
            raise UsageError(f"GLUE has no task {name!r}", fix=f"one of {', '.join(GLUE)}")
        return glue_files(name, Path(folder), labels) if folder else _library(spec, "nyu-mll/glue", name, labels)
    if kind == "squad":
        return squad_file(Path(rest)) if rest else _library(spec, "rajpurkar/squad", "", labels)
    if kind == "datasets":
        folder, split = split_name(rest)
        return _texts(saved(spec, Path(folder), split), spec, "", (), labels)
    return None


def glue_files(name: str, folder: Path, labels: Labels) -> list[Text]:
    """The labelled part of a GLUE task as it is published: tab-separated, quotes are characters.

    Args:
        name: of the task.
        folder: the task's, or the one above it.
        labels: of the model.

    Raises:
        InputError: the file is missing, or has other columns.
    """
    layout = GLUE[name]
    path = next((one for one in (folder / layout.file, folder / layout.folder / layout.file) if one.is_file()), folder / layout.file)
    lines = [line.removesuffix("\r").split("\t") for line in read_text(path).split("\n")]
    named = any(isinstance(column, str) for column in layout.columns.values())
    head = lines[0] if named else []
    missing = [column for column in layout.columns.values() if isinstance(column, str) and column not in head]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}", fix=f"pass the files of GLUE as published: {layout.folder}/{layout.file}")
    places = {ours: column if isinstance(column, int) else head.index(column) for ours, column in layout.columns.items()}
    order = labels.order(layout.classes)
    rows: list[Text] = []
    for number, line in enumerate(lines[1 if named else 0 :], 2 if named else 1):
        if line == [""]:
            continue
        source = f"{path}:{number}"
        if len(line) <= max(places.values()):
            raise InputError(f"{source}: {len(line)} columns, {max(places.values()) + 1} are needed", fix="pass the file as published")
        rows += row_texts({ours: line[at] for ours, at in places.items()}, source, number, layout.metric, order)
    return rows


def squad_file(path: Path) -> list[Text]:
    """A SQuAD file, version 1.1 or 2.0.

    Raises:
        InputError: it is missing, or of another form.
    """
    try:
        document = json.loads(read_text(path))
        rows = [
            (f"{path}: {entry['id']}", {"question": entry["question"], "context": part["context"], "answers": {
                "text": [answer["text"] for answer in entry["answers"]]}})
            for article in document["data"] for part in article["paragraphs"] for entry in part["qas"]
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no file of SQuAD: {error!r}", fix="pass dev-v1.1.json or dev-v2.0.json as published") from error
    return [text for number, (source, row) in enumerate(rows) for text in row_texts(row, source, number)]


# --- the package datasets -----------------------------------------------------------------------------------------------------


def split_name(rest: str) -> tuple[str, str]:
    """``FOLDER:SPLIT`` apart; a folder may have a colon of its own."""
    folder, _, split = rest.rpartition(":")
    return (folder, split) if folder and not Path(rest).exists() else (rest, "")


def saved(spec: str, folder: Path, split: str) -> Any:
    """One split of what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Raises:
        EnvironmentFault: the package is missing.
        InputError: nothing of the kind lies there.
    """
    library = _package(spec)
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # the library raises what its readers raise
        raise InputError(f"{folder} holds no data set: {first_line(error)}", fix="write it with save_to_disk") from error
    if not isinstance(found, dict):
        return found
    name = split or next((one for one in SPLITS if one in found), next(iter(found)))
    if name not in found:
        raise UsageError(f"{folder} has no split {name!r}", fix=f"one of {', '.join(found)}")
    return found[name]


def _package(spec: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        fix = f"pip install 'tpcompile[data]', or pass the published files: {FOLDERS}"
        raise EnvironmentFault(f"{spec} needs the package 'datasets'", fix=fix) from error
    return datasets


@contextmanager
def _offline(library: Any) -> Iterator[None]:
    """Keep the library from the network: what it has not is missing."""
    from huggingface_hub import constants

    before = library.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _library(spec: str, name: str, task: str, labels: Labels) -> list[Text]:
    """A data set that the library has in its cache."""
    library = _package(spec)
    config = "mnli" if task == "mnli-mm" else task
    try:
        with _offline(library):
            found = library.load_dataset(name, config or None, split=LIBRARY_SPLITS.get(task, "validation"))
    except Exception as error:  # offline, a dozen classes say that something is not there
        fix = f"load it once where there is a network (datasets.load_dataset({name!r}, {config!r})), or pass files: {FOLDERS}"
        raise InputError(f"{spec}: {name} is not in the cache of 'datasets': {first_line(error)}", fix=fix) from error
    layout = GLUE.get(task)
    return _texts(found, spec, layout.metric if layout else "", layout.classes if layout else (), labels)


def _texts(found: Any, spec: str, metric: str, classes: Sequence[str], labels: Labels) -> list[Text]:
    names = getattr(found.features.get("label"), "names", None) or ()
    order = labels.order(classes or names)
    rows = (_named(row, names) for row in found)
    return [text for number, row in enumerate(rows) for text in row_texts(row, f"{spec}[{number}]", number, metric, order)]


def _named(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row whose label is a name where the data set has names."""
    label = row.get("label")
    if isinstance(label, int) and label < 0:
        return {**row, "label": None}
    return {**row, "label": names[label]} if names and isinstance(label, int) else dict(row)


def images(spec: str, rest: str) -> Iterator[tuple[str, int | None, Any]]:
    """The images of a saved data set: where each comes from, its class, and a row to read it from."""
    folder, split = split_name(rest)
    found = saved(spec, Path(folder), split)
    if "image" not in found.features:
        raise InputError(f"{folder} has no column 'image'", fix="save a data set of images")
    for number in range(len(found)):
        label = found[number].get("label")
        yield f"{spec}[{number}]", label if isinstance(label, int) and label >= 0 else None, found[number]["image"]
