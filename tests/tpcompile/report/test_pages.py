"""Reports of every kind of bundle: measured, written, and shown by a browser, wide and narrow, light and dark."""

import html
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from tpcompile import api
from tpcompile import bundle as bundles
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.plan import Wish
from tpcompile.subject import subject_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<!doctype html><html><head><meta name="color-scheme" content="light dark"></head><body>
<iframe style="width: %dpx; height: 900px; border: 0" srcdoc="%s"></iframe><script>
onload = () => {
  const page = document.querySelector('iframe').contentDocument, view = page.defaultView;
  const spills = e => !e.closest('.scroll') && e.getBoundingClientRect().right > view.innerWidth + 1;
  const small = e => e.textContent.trim() && e.getClientRects().length && parseFloat(view.getComputedStyle(e).fontSize) *
    (e.getScreenCTM ? e.getScreenCTM().a : 1) < 8;
  const seen = {
    wide: page.documentElement.scrollWidth, view: view.innerWidth,
    spills: [...page.querySelectorAll('body *')].filter(spills).map(e => e.tagName).join(),
    small: [...page.querySelectorAll('text, td, p')].filter(small).map(e => e.textContent).join(),
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
  };
  document.body.dataset.seen = Object.entries(seen).map(pair => pair.join('=')).join(';');
}
</script></body></html>"""
"""A page in a frame of its own width (a window of Chromium has at least 500 pixels), and what is seen of it."""


@pytest.fixture(scope="module")
def pages(
    short_bert_folder: Path,
    text_compiled: Compiled,
    text_bundles: dict[str, Path],
    image_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A report of a bundle of each kind, on few samples: beside the shared ones a chain of stages, and ragged batches that merge tokens."""
    room = tmp_path_factory.mktemp("pages")
    merged = compile_subject(subject_of(short_bert_folder, None, None, "tome", {"r": [4]}, batch="ragged"))
    found = {"text": text_bundles["onnx"], "image": image_bundle, "staged": room / "staged", "merged": room / "merged"}
    for name, compiled, wish in (("staged", text_compiled, Wish(form="staged")), ("merged", merged, Wish())):
        with bundles.stage(found[name]) as folder:
            fill(folder, compiled, "onnx", wish=wish)
    found |= {"openvino": text_bundles["openvino"]} if "openvino" in text_bundles else {}
    texts = room / "texts.txt"
    texts.write_text("\n".join("words about pruning "[: 3 + i] for i in range(6)), encoding="utf-8")
    data = {name: None if name == "image" else texts for name in found}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "bench", partial(api.bench, repeats=2))
        return {name: api.report(path, data[name], samples=6, out=room / f"{name}.html") for name, path in found.items()}


def test_every_kind_of_bundle_has_a_report(pages: Mapping[str, Path]) -> None:
    for name, path in pages.items():
        page = path.read_text("utf-8")
        assert "Where the promise goes" in page, name
        assert "ops by class" in page, name
        assert ("Patches that were kept" if name == "image" else "Words that were kept") in page, name
        assert not re.search(r">(nan|inf|None)\b", page), name


@pytest.fixture(scope="module")
def browser() -> str:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    return CHROMIUM


def shown(browser: str, room: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Chromium on a page, with a profile of its own."""
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={room / 'profile'}")
    done = subprocess.run([browser, *flags, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("text", 390, "light"), ("text", 1280, "dark"), ("image", 390, "dark"), ("image", 1280, "light")],
)
def test_nothing_spills_on_a_phone_or_a_desk(
    browser: str, pages: Mapping[str, Path], tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    page = re.sub(r"<details(?! open)", "<details open", pages[name].read_text("utf-8"))
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % (width, html.escape(page)), encoding="utf-8")
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    dom = shown(browser, tmp_path, *flags, "--window-size=1400,1000", "--dump-dom", probe.as_uri()).stdout
    told = re.search(r'data-seen="([^"]*)"', dom)
    assert told, dom[-500:]
    seen = dict(pair.split("=", 1) for pair in html.unescape(told[1]).split(";"))
    assert int(seen["wide"]) <= int(seen["view"]) == width
    assert (seen["spills"], seen["small"], seen["dark"]) == ("", "", str(scheme == "dark").lower())


def test_a_page_is_painted_and_the_console_stays_empty(browser: str, pages: Mapping[str, Path], tmp_path: Path) -> None:
    """The page as it is, with its content policy: what that blocks would stand on the console."""
    picture = tmp_path / "page.png"
    shown(browser, tmp_path, "--window-size=1280,2000", f"--screenshot={picture}", pages["image"].as_uri())
    from PIL import Image

    with Image.open(picture) as found:
        assert found.size == (1280, 2000)
        assert len(found.convert("RGB").getcolors(1 << 22) or ()) > 50
