"""The report: one file, nothing from outside, every string escaped, words joined and levelled."""

import math
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.flops import Saving
from tpcompile.manifest import Flops, Manifest, MethodInfo, ModelInfo, PatchesInfo, SiteInfo, TensorInfo
from tpcompile.proof.parity import Difference, Parity, SampleParity, Task
from tpcompile.report.page import EngineRun, ReportData, render, trace_patches, trace_words, write
from tpcompile.spec import Patches
from tpcompile.timing.latency import Latency, Phase, Shape
from tpcompile.timing.stats import paired_ratio, summarise

EVIL = "<script>alert(1)</script>&\"'"


@dataclass(frozen=True)
class Kept:
    masks: tuple
    counts: tuple
    stored: tuple = ()
    scores: tuple = ()


def manifest(target="onnx", **changes):
    return Manifest(
        target=target,
        role="pruned",
        model=ModelInfo(id=EVIL, family="bert", architecture="BertModel", sha256="0" * 64),
        method=MethodInfo(name="ltp", parameters={"thresholds": [0.0, 0.01, 0.02], "n_ref": "length"}),
        sites=(SiteInfo(name="site0", module="encoder.layer.1"), SiteInfo(name="site1", module="encoder.layer.2", where=EVIL)),
        inputs=(TensorInfo(name="input_ids", dtype="int64", shape=(1, "seq")),),
        outputs=(TensorInfo(name="sentence_embedding", dtype="float32", shape=(1, 4)),),
        flops=Flops(),
        environment={"python": "3.12", "note": EVIL},
        **changes,
    )


def parity(task=True):
    difference = Difference(2e-7, 1e-5, 0.9999999, 2e-7)
    records = tuple(
        SampleParity(i, 20 + i, (15, 8 + i % 5), (15, 9), "equal", "", (), {"sentence_embedding": difference}, {})
        for i in range(40)
    )
    found = Task("recall@1", 20, 0.6, 0.55, 0.8) if task else None
    return Parity(
        "PASSED", f"all equal {EVIL}", 0, 1e-5, 1e-6, records, {"sentence_embedding": difference}, 0, 3e-7, 0.0, found, 0
    )


def phase(factor, seed=0):
    dense = np.random.default_rng(seed).uniform(5, 50, (4, 40))
    a, b = np.median(dense, axis=0), np.median(dense * factor, axis=0)
    speedup = paired_ratio(dense, dense * factor, 0.95, 0)
    times = (dense, dense * factor, dense, dense * factor, "cpu")
    return Phase(*times, summarise(a), summarise(b), speedup, {"paper": speedup.value / 2.5}, int((b > a).sum()))


def latency(cold=0.5, warm=0.4, **changes):
    found = Latency(
        "PASSED", "measured", 0, tuple(range(20, 60)), 40, (Shape(20, 59, 40, 20.0, 8.0, 2.0, 2.5),), phase(cold), phase(warm),
        {"dense": 0.01, "pruned": 0.02, "ratio": 0.01}, 0.0, "cpu", 0.0, (1,), 0.01, {"dense": 40.0, "pruned": 90.0}, None, {},
        Saving(250.0, 100.0, 250.0, 110.0), 0,
    )  # fmt: skip
    return replace(found, **changes)


def trace():
    sample = Sample(
        text=f"Token pruning {EVIL}\n works",
        inputs={"input_ids": np.ones((1, 6), dtype=np.int64)},
        spans=((0, 0), (0, 5), (6, 10), (10, 13), (14, 22), (0, 0)),
        words=(None, 0, 1, 1, 2, None),
        pieces=("[CLS]", "token", "prun", "##ing", "<script>", "[SEP]"),
    )
    first = np.array([True, True, False, True, True, False])
    second = np.array([True, False, False, True, False, False])
    return trace_words(sample, Kept((first, second), (4, 2)))


def document(**latencies):
    runs = (EngineRun(manifest(), parity(), latency()), EngineRun(manifest("openvino"), parity(), latency(**latencies)))
    return render(ReportData(f"Report {EVIL}", runs, (trace(),), (f"note {EVIL}",)))


class Collector(HTMLParser):
    """Tags still open, and every tag and attribute met."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "line", "circle", "polygon", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"


def test_words_are_joined_and_take_their_deepest_piece():
    found = trace()
    assert [(word.text, word.level, word.special) for word in found.words] == [
        ("[CLS]", 2, True),
        ("Token", 1, False),
        ("pruning", 2, False),
        ("<script>", 1, False),
        ("[SEP]", 0, True),
    ]
    assert (found.tokens, found.alive) == (6, (4, 2))
    assert [word.gap for word in found.words] == ["", " ", " ", " ", " "]


def test_document_is_well_formed_and_alone():
    html = document()
    collector = Collector()
    collector.feed(html)
    assert collector.open == []
    assert "script" not in collector.tags
    links = [entry for entry in collector.attributes if entry[1] in {"src", "href", "srcset"} or entry[1].startswith("on")]
    assert links == [("a", "href", "#content")]
    assert not re.search(r"https?://|url\(|@import", html)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 5


def test_charts_are_described():
    html = document()
    images = re.findall(r"<svg[^>]*>", html)
    assert len(images) == 7
    assert all('role="img"' in image and ("aria-label" in image) for image in images)
    assert 'aria-label="onnx fp32, milliseconds: dense, warm 1172; FLOPs saved, by the paper \u2212703' in html
    assert "layer 1: " in html
    assert "nan" not in " ".join(re.findall(r'points="([^"]*)"', html))


def test_what_scrolls_can_be_reached_by_keyboard():
    for region in re.findall(r'<div class="scroll[^>]*>', document()):
        assert 'tabindex="0"' in region
        assert 'role="region"' in region
        assert re.search(r'aria-label="[^"]+"', region)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_both_schemes():
    """WCAG AA: 4.5 for text, on the page, on cards, and on the darkest highlight of a kept word."""
    schemes = re.findall(r":root { (--paper[^}]*)}", document())
    assert len(schemes) == 2
    weight = float(re.search(r"calc\(var\(--k\) \* (\.\d+)\)", document())[1])
    for scheme in schemes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", scheme))
        word = [int(part) for part in re.search(r"--word: (\d+ \d+ \d+)", scheme)[1].split()]
        under = [int(colours["sheet"][i : i + 2], 16) for i in (1, 3, 5)]
        marked = "#" + "".join(f"{round(weight * a + (1 - weight) * b):02x}" for a, b in zip(word, under, strict=True))
        assert contrast(colours["ink"], marked) >= 4.5, scheme
        for name in ("ink", "soft", "accent", "dense", "bad"):
            assert min(contrast(colours[name], colours[ground]) for ground in ("paper", "sheet")) >= 4.5, (name, scheme)


def test_levels_read_without_colour():
    html = document()
    assert 'title="kept by 2 of 2 sites">pruning<sub>2</sub>' in html
    assert "print-color-adjust: exact" in html
    assert "prefers-color-scheme: dark" in html


def test_slower_is_said():
    html = document(cold=1.25)
    assert '<span class="slow">0.80\u00d7 slower</span>' in html
    assert 'class="slow">openvino fp32, cold: pruned is SLOWER than dense, 1.25x the time' in html
    assert "0.80\u00d7 slower" not in document()


def test_no_clear_difference_is_not_called_one():
    """2 % slower by an interval that holds 1, and one that few samples leave open."""
    near, unknown = phase(1.02), phase(1.25)
    near = replace(near, speedup=replace(near.speedup, low=0.9, high=1.1))
    unknown = replace(unknown, speedup=replace(unknown.speedup, low=0.0, high=math.inf))
    html = render(ReportData("t", (EngineRun(manifest(), parity(), replace(latency(), cold=near, warm=unknown)),)))
    assert '<span class="">0.98\u00d7</span>' in html
    assert '<span class="">0.80\u00d7</span> (too few to tell)' in html
    assert "\u00d7 slower" not in html


def test_what_was_measured_is_shown_without_formulas():
    found = replace(latency(), saving=None, memory={"dense": 10.0, "pruned": 8.0})
    html = render(ReportData("t", (EngineRun(manifest(), parity(), found),)))
    assert "Peak memory dense 10 MB, pruned 8 MB." in html
    assert "what the FLOPs promise" not in html


def test_unsupported_percentiles_are_dashes():
    assert re.search(r"\d / \d+\.\d+ / – / –", document())  # noqa: RUF001  40 samples support p50 and p90


def test_report_without_task_or_traces():
    html = render(ReportData("t", (EngineRun(manifest(), parity(task=False), latency()),)))
    assert "Pruned against dense" not in html
    assert "Words that were kept" not in html


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    data = ReportData("t", (EngineRun(manifest(), parity(), latency()),))
    path = write(data, tmp_path / "reports" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="No space"):
        write(data, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_same_data_same_bytes():
    assert document() == document()


# --- images -----------------------------------------------------------------------------------------------------------------

GRID = Patches(1, 2, 2)


def picture_trace(name="digits:test[0]", side=8):
    pixels = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)
    sample = Sample(name, {"pixel_values": np.ones((1, 1, side, side), dtype=np.float32)}, tokens=5, picture=pixels)
    masks = (np.array([True, True, False, True, True]), np.array([True, False, False, False, True]))
    return trace_patches(sample, Kept(masks, (4, 2)), GRID)


def picture_document(*traces):
    run = EngineRun(manifest(patches=PatchesInfo.of(GRID)), parity(), latency())
    return render(ReportData("Report", (run,), traces))


def test_patches_are_traced():
    pytest.importorskip("PIL")
    found = picture_trace()
    assert (found.tokens, found.alive, found.width, found.height, found.rows, found.columns) == (5, (4, 2), 8, 8, 2, 2)
    assert [(panel.gone, panel.counts) for panel in found.panels] == [
        ("M1 0h1v1h-1z", "3 of 4 patches, 1 of 1 prefix tokens"),
        ("M0 0h2v1h-2zM0 1h1v1h-1z", "1 of 4 patches, 1 of 1 prefix tokens"),
    ]
    assert found.image.startswith("data:image/png;base64,iVBOR")


def test_kept_patches_are_drawn_over_the_image():
    pytest.importorskip("PIL")
    html = picture_document(picture_trace(EVIL), picture_trace(side=64))
    collector = Collector()
    collector.feed(html)
    assert collector.open == []
    assert "script" not in collector.tags
    links = [value for _, name, value in collector.attributes if name in {"src", "href", "srcset"}]
    assert [link[:22] for link in links] == (
        ["#content", "data:image/png;base64,"] + ["#image1"] * 3 + ["data:image/png;base64,"] + ["#image2"] * 3
    )
    assert not re.search(r"https?://|url\(|@import", html)
    assert html.count('class="veil"') == 4
    assert html.count('class="coarse"') == 3
    assert '<path class="veil" transform="scale(4.0 4.0)" d="M1 0h1v1h-1z"/>' in html
    assert 'aria-label="digits:test[0] after layer 1: 3 of 4 patches, 1 of 1 prefix tokens kept"' in html
    assert "<strong>layer 2</strong> 1 of 4 patches, 1 of 1 prefix tokens" in html
    assert "img-src data:" in html
    assert "print-color-adjust: exact" in html


def test_a_report_on_images_speaks_of_images():
    html = picture_document()
    assert "Timed over 40 inferences, held against the masked model on 40 images." in html
    assert "Images equal" in html
    assert not re.search(r"\btexts?\b", re.sub(r"<(style|svg).*?</\1>", "", html, flags=re.DOTALL))
    assert "Patches that were kept" not in html


def test_a_report_on_spectrograms_speaks_of_recordings():
    sound = TensorInfo(name="input_values", dtype="float32", shape=(1, 48, 16))
    run = EngineRun(manifest(patches=PatchesInfo.of(GRID)).model_copy(update={"inputs": (sound,)}), parity(), latency())
    html = render(ReportData("Report", (run,), ()))
    assert "held against the masked model on 40 recordings." in html
    assert "img-src data:" in html


def test_a_report_on_texts_allows_no_images():
    assert "img-src" not in document()
    assert "<image" not in document()


def test_a_text_has_no_patches():
    sample = Sample("words", {"input_ids": np.ones((1, 5), dtype=np.int64)})
    with pytest.raises(UsageError) as caught:
        trace_patches(sample, Kept((), ()), GRID)
    assert (caught.value.message, caught.value.fix) == ("the sample is no image", "use trace_words for a text")
