"""The page in a real browser, as wide as a phone and as a desktop."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest

from llmkern.diagnose import page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOOK = """<script>onload = () => {
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const boxes = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  document.title = JSON.stringify({
    wide: page.documentElement.scrollWidth, window: inside.innerWidth, pictures: boxes.length,
    drawn: boxes.filter(box => box.width > 200 && box.height > 100).length,
    head: page.querySelector("thead").getBoundingClientRect().height,
    asked: inside.performance.getEntriesByType("resource").length});
}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_and_asks_for_nothing(diagnosed, tmp_path, width):
    frame = f'<iframe width="{width}" height="800" srcdoc="{escape(page.page(diagnosed))}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}{LOOK}", encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1300,900",
        "--dump-dom",
    ]
    url = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout).group(1))
    assert seen["wide"] <= seen["window"], "it scrolls sideways"
    assert seen["pictures"] == seen["drawn"] == 4 and seen["asked"] == 0
    assert (seen["head"] == 0) == (width < 600), "a phone gets a list in place of a table"
