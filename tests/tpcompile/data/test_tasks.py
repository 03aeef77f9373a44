"""GLUE, SQuAD and ImageNet as they are published, in small files of the same form; and what ``datasets`` saves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tpcompile.data.images import Preprocessing
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.data.tasks import Labels, open_task
from tpcompile.data.textfiles import read_file
from tpcompile.errors import EnvironmentFault, InputError, ModelError, UsageError
from tpcompile.proof.agreement import measure
from tpcompile.spec import Patches

NONE = Labels()
GLUE = {
    "cola": ("CoLA/dev.tsv", "src\t1\t\tShe said \"so.\nsrc\t0\t*\tSaid she so.\n"),
    "sst2": ("SST-2/dev.tsv", "sentence\tlabel\nit 's a charming journey .\t1\nunflinchingly bleak\t0\n"),
    "stsb": ("STS-B/dev.tsv", "index\tgenre\tsentence1\tsentence2\tscore\n0\tn\tA man.\tA woman.\t2.5\n"),
    "mnli": ("MNLI/dev_matched.tsv", "index\tsentence1\tsentence2\tgold_label\n0\tIt rains.\tIt is wet.\tneutral\n"),
    "qnli": ("QNLI/dev.tsv", "index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tentailment\n"),
}


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    for path, content in GLUE.values():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(content, encoding="utf-8")
    return tmp_path


def test_glue_as_published(glue: Path) -> None:
    rows = {name: open_task(f"glue:{name}:{glue}", NONE) for name in GLUE}
    cola, sst, sts, mnli, qnli = (rows[name] or [] for name in GLUE)
    assert [(row.text, row.label, row.metric) for row in cola] == [('She said "so.', 1, "matthews"), ("Said she so.", 0, "matthews")]
    assert [(row.text, row.label) for row in sst] == [("it 's a charming journey .", 1), ("unflinchingly bleak", 0)]
    assert [(row.text, row.second, row.number, row.label) for row in sts] == [("A man.", "A woman.", 2.5, None)]
    assert [(row.second, row.label) for row in (*mnli, *qnli)] == [("It is wet.", 1), ("He did.", 0)]
    assert open_task(f"glue:sst2:{glue / 'SST-2'}", NONE) == sst or sst[0].source.startswith(str(glue))


def test_labels_are_the_models_own_where_it_names_them(glue: Path) -> None:
    (glue / "config.json").write_text(json.dumps({"label2id": {"CONTRADICTION": 0, "NEUTRAL": 2, "ENTAILMENT": 1}}), encoding="utf-8")
    labels = Labels.read(glue)
    assert [row.label for row in open_task(f"glue:mnli:{glue}", labels) or []] == [2]
    assert [row.label for row in open_task(f"glue:qnli:{glue}", labels) or []] == [0]  # not all of its names are the model's


def test_what_is_no_glue(glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no task 'imdb'"):
        open_task(f"glue:imdb:{glue}", NONE)
    with pytest.raises(InputError, match=r"RTE|cannot be read"):
        open_task(f"glue:rte:{glue}", NONE)
    (glue / "SST-2" / "dev.tsv").write_text("text\tlabel\n", encoding="utf-8")
    with pytest.raises(InputError, match="no column 'sentence'"):
        open_task(f"glue:sst2:{glue}", NONE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in ("glue:sst2", "squad", f"datasets:{glue}"):
        with pytest.raises(EnvironmentFault, match="needs the package 'datasets'") as caught:
            open_task(spec, NONE)
        assert "pip install 'tpcompile[data]'" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[" * 100_000, "not JSON"),
        ("a.jsonl", '{"question": "q", "context": "c", "answers": [5]}', "the answers are no list of texts"),
        ("a.jsonl", '{"question": "q", "context": "c", "answers": {}}', "the answers are no list of texts"),
    ],
)
def test_tablethat_are_none(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=f":1: {message}"):
        read_file(tmp_path / name)


def test_one_text_is_one_answer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,context,answers\nWho?,He did.,He\nWhy?,No.,\n", encoding="utf-8")
    assert [row.answers for row in read_file(tmp_path / "a.csv")] == [("He",), ()]


def test_a_number_that_is_none(glue: Path) -> None:
    path = glue / "STS-B" / "dev.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("2.5", "nan"), encoding="utf-8")
    with pytest.raises(InputError, match="'nan' is no number"):
        open_task(f"glue:stsb:{glue}", NONE)


def test_a_task_without_rows(glue: Path, bert_folder: Path) -> None:
    (glue / "SST-2" / "dev.tsv").write_text("sentence\tlabel\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no texts"):
        load_data(f"glue:sst2:{glue}", bert_folder, 64)


@pytest.mark.parametrize("content", ["[]", "{", '{"label2id": [1]}', '{"label2id": {"a": null}}', '{"label2id": {"a": "x"}}'])
def test_a_config_that_names_labels_badly(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="does not say which label is which"):
        Labels.read(tmp_path)


def test_pairs_are_one_input(glue: Path, bert_folder: Path) -> None:
    names = ("input_ids", "token_type_ids")
    (sample,) = load_data(f"glue:stsb:{glue}", bert_folder, 64, names=names)
    kinds = sample.inputs["token_type_ids"][0].tolist()
    assert kinds == sorted(kinds)
    assert (sample.text, sample.number, sample.context) == ("A man.\nA woman.", 2.5, 7)
    assert [sample.text[low:high] for low, high in sample.spans if high][-2:] == ["n", "."]
    assert len({word for word in sample.words if word is not None}) == 6


SQUAD = {"data": [{"paragraphs": [{"context": "The fox jumps over a dog.", "qas": [
    {"id": "1", "question": "Who?", "answers": [{"text": "The fox", "answer_start": 0}, {"text": "fox", "answer_start": 4}]},
    {"id": "2", "question": "Why?", "answers": []},
]}]}]}  # fmt: skip


def test_squad(tmp_path: Path, bert_folder: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    first, second = load_data(f"squad:{tmp_path / 'dev.json'}", bert_folder, 64)
    assert (first.answers, second.answers) == (("The fox", "fox"), ())
    assert len(load_data(f"squad:{tmp_path / 'dev.json'}", bert_folder, 12, truncate=True)) == 2  # the context is cut, not the question
    right = spans(first, "fox"), spans(second, None)
    wrong = spans(first, "fox jumps"), spans(second, "dog")
    task = measure([first, second], right, wrong)
    assert (task.name, task.dense, task.pruned, task.lost) == ("span f1", 1.0, pytest.approx((2 / 3) / 2), 2)
    assert task.more == {"exact match": 0.0, "exact match dense": 1.0}
    (tmp_path / "dev.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no file of SQuAD"):
        open_task(f"squad:{tmp_path / 'dev.json'}", NONE)


def spans(sample: Sample, words: str | None) -> dict[str, np.ndarray]:
    """Logits of both ends of an answer; without one, of position 0."""
    start, end = np.zeros((1, sample.length)), np.zeros((1, sample.length))
    low = 0 if words is None else sample.text.index(words, sample.context)
    high = 0 if words is None else low + len(words)
    tokens = [i for i, (a, b) in enumerate(sample.spans) if b > a and low <= a and b <= high and a >= sample.context] or [0]
    start[0, tokens[0]] = end[0, tokens[-1]] = 9.0
    return {"start_logits": start, "end_logits": end}


def test_labels_of_a_regression() -> None:
    samples = [Sample("", {"x": np.ones((1, 2))}, number=float(i)) for i in range(4)]
    dense = [{"logits": np.array([[float(i)]])} for i in range(4)]
    pruned = [{"logits": np.array([[float(-i)]])} for i in range(4)]
    task = measure(samples, dense, pruned)
    assert (task.name, task.dense, task.pruned, task.agreement) == ("pearson", pytest.approx(1), pytest.approx(-1), pytest.approx(-1))


def test_imagenet_in_both_layouts(tmp_path: Path, draw, image_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    grid, names = Patches(1, 4, 4), ("pixel_values",)
    for synset in ("n01440764", "n01484850"):
        draw(f"net/val/{synset}/{synset}_1.JPEG")
    with pytest.raises(InputError, match="2 classes, and no LOC_synset"):
        load_data(f"imagenet:{tmp_path / 'net'}", image_bundle, 512, names=names, patches=grid)
    (tmp_path / "net" / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01443537 goldfish\nn01484850 shark\n", encoding="utf-8")
    rows = load_data(f"imagenet:{tmp_path / 'net'}", image_bundle, 512, names=names, patches=grid)
    assert [row.label for row in rows] == [0, 2]
    (tmp_path / "net" / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01443537 goldfish\n", encoding="utf-8")
    with pytest.raises(InputError, match="no class for the folder n01484850"):
        load_data(f"imagenet:{tmp_path / 'net'}", image_bundle, 512, names=names, patches=grid)
    draw("flat/val/ILSVRC2012_val_1.JPEG")
    with pytest.raises(InputError, match="holds 0 classes"):
        load_data(f"imagenet:{tmp_path / 'flat'}", image_bundle, 512, names=names, patches=grid)
    (tmp_path / "flat" / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01443537 goldfish\n", encoding="utf-8")
    with pytest.raises(InputError, match="LOC_val_solution"):
        load_data(f"imagenet:{tmp_path / 'flat'}", image_bundle, 512, names=names, patches=grid)
    for table, message in (("ILSVRC2012_val_1,n99 1 2 3 4\n", "'n99' is no class"), ("other,n01443537 1 2 3 4\n", "has no label of")):
        (tmp_path / "flat" / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{table}", encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_data(f"imagenet:{tmp_path / 'flat'}", image_bundle, 512, names=names, patches=grid)
    (tmp_path / "flat" / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_1,n01443537 1 2 3 4 \n", encoding="utf-8"
    )
    assert [row.label for row in load_data(f"imagenet:{tmp_path / 'flat'}", image_bundle, 512, names=names, patches=grid)] == [1]
    assert Preprocessing.read(image_bundle).height == 8


def test_what_the_package_saves(tmp_path: Path, bert_folder: Path, image_bundle: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    from PIL import Image

    labels = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    held = datasets.Dataset.from_dict({"sentence": ["good film", "bad"], "label": [1, 0]}, features=labels)
    datasets.DatasetDict({"validation": held, "train": held.select([0])}).save_to_disk(tmp_path / "texts")
    assert [row.label for row in load_data(f"datasets:{tmp_path / 'texts'}", bert_folder, 64)] == [1, 0]
    assert len(load_data(f"datasets:{tmp_path / 'texts'}:train", bert_folder, 64)) == 1
    with pytest.raises(InputError, match="not in the cache"):
        open_task("glue:sst2", NONE)
    pictures = {"image": [Image.new("L", (9, 9), 40), Image.new("L", (8, 8), 90)], "label": [3, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(pictures, features=features).save_to_disk(tmp_path / "pictures")
    rows = load_data(f"datasets:{tmp_path / 'pictures'}", image_bundle, 512, names=("pixel_values",), patches=Patches(1, 4, 4))
    assert [row.label for row in rows] == [3, 1]
