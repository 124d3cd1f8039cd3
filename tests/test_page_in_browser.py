"""The page of results as headless Chromium draws it (Debian's package `chromium`), on a phone, a screen and paper."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "results"))
recompute = import_module("recompute")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = REPOSITORY / "results" / "report" / "index.html"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
MEASURE = """<script>addEventListener("load", () => {
  const tables = [...document.querySelectorAll("table")].map(table => ({
    label: table.parentElement.getAttribute("aria-label"), kind: table.className,
    right: table.parentElement.getBoundingClientRect().right,
    empty: [...table.querySelectorAll("tbody th, tbody td")].filter(
      cell => cell.textContent && (cell.offsetWidth < 4 || cell.offsetHeight < 4)).length,
    rows: [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, " ").trim())),
  }));
  const outside = [...document.querySelectorAll("main *")].filter(
    node => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".scroll, pre"),
  ).map(node => node.outerHTML.slice(0, 80));
  const plots = [...document.querySelectorAll(".plot")].map(plot => [plot.clientWidth, plot.clientHeight]);
  parent.postMessage(JSON.stringify({width: document.documentElement.scrollWidth, inner: innerWidth,
    tables: tables, plots: plots, outside: outside}), "*");
})</script>"""
FRAME = """<!DOCTYPE html><body style="margin:0"><pre id="found"></pre><script>
addEventListener("message", event => { document.getElementById("found").textContent = event.data; })
</script><iframe src="page.html" style="border:0;width:WIDTHpx;height:900px"></iframe></body>"""


def chromium(folder: Path, *arguments: str) -> str:
    """What a headless browser prints."""
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [str(CHROMIUM), *fixed, *arguments], capture_output=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


@pytest.fixture(scope="module", params=[390, 1280])
def drawn(request, tmp_path_factory):
    """What was measured on the page at a width, inside a frame, for a window is never as narrow as a phone."""
    folder = tmp_path_factory.mktemp("browser")
    text = PAGE.read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=.*>\n", text)[0]
    (folder / "page.html").write_text(
        text.replace(policy, "").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8"
    )
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(request.param)), encoding="utf-8")
    dumped = chromium(
        folder, "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/frame.html"
    )
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)[1]))
    assert found["inner"] == request.param
    return found


def plain(cell: str) -> str:
    """A cell of Markdown as it reads on the page."""
    return re.sub(r"\s+", " ", cell.replace("`", "")).strip()


def rows_of(drawn, label: str) -> list[list[str]]:
    """The rendered rows of the table with that name; verdicts without their signs."""
    (table,) = [table for table in drawn["tables"] if table["label"] == label]
    return [[re.sub(r"^[✓✕~–] ?(?=[a-z])", "", cell) for cell in row] for row in table["rows"]]


def test_nothing_is_wider_than_the_screen(drawn):
    assert drawn["width"] <= drawn["inner"]
    assert drawn["outside"] == []
    assert [table["label"] for table in drawn["tables"] if table["right"] > drawn["inner"] + 1] == []


def test_no_cell_with_text_is_drawn_without_size(drawn):
    assert [table["label"] for table in drawn["tables"] if table["empty"]] == []


def test_every_plot_is_drawn(drawn):
    published = list((REPOSITORY / "results").glob("*/*/plots/*.svg"))
    assert len(drawn["plots"]) == len(published)
    assert all(width > 200 and height > 80 for width, height in drawn["plots"])


def test_the_rendered_headline_claims_are_those_of_the_table_of_papers(drawn):
    head, *rows = rows_of(drawn, "Headline claims of all papers")
    assert head == ["paper", "claim", "paper's number", "ours", "n", "verdict"]
    wanted = [[plain(cell) for cell in row] for row in recompute.table_of(REPOSITORY / "results" / "papers.md")[1:]]
    assert sorted(rows) == sorted(wanted)


@pytest.mark.parametrize("name", ["claims", "methods"])
def test_the_rendered_tables_of_a_study_are_those_of_its_files(drawn, name):
    paths = sorted((REPOSITORY / "results").glob(f"*/*/{name}.md"))
    assert paths
    for path in paths:
        _, *deciding = recompute.table_of(path.with_name("summary.md"))  # the peers of LightCNN have none
        study = plain(deciding[0][0]) if deciding else f"LightCNN, {path.parent.name}"
        rows = rows_of(drawn, f"{name.capitalize()} of {study}")
        wanted = [[plain(cell) for cell in row] for row in recompute.table_of(path)]
        added = rows[0].index("interval") if "interval" in rows[0] else None
        kept = [[cell for i, cell in enumerate(row) if i != added] for row in rows]
        assert kept == wanted


def test_the_rendered_benchmarks_are_those_of_their_files(drawn):
    for path in sorted((REPOSITORY / "results").glob("*/*.md")):  # benchmarks.md, latency.md
        for title, table in zip(re.findall(r"^\*\*(.+)\*\*$", path.read_text(), re.MULTILINE),
                                recompute.read_tables(path.read_text()), strict=True):  # fmt: skip
            found = [[[plain(c) for c in r] for r in t["rows"]] for t in drawn["tables"]
                     if t["label"] == f"Benchmark: {title}"]  # fmt: skip
            assert [[plain(cell) for cell in row] for row in table] in found


def test_the_page_makes_a_picture_and_a_document(tmp_path):
    from PIL import Image

    picture, document = tmp_path / "page.png", tmp_path / "page.pdf"
    chromium(tmp_path, "--window-size=1280,1600", f"--screenshot={picture}", f"file://{PAGE}")
    with Image.open(picture) as image:
        assert image.size == (1280, 1600)
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={document}", f"file://{PAGE}")
    raw = document.read_bytes()
    assert raw.startswith(b"%PDF")
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", raw)) < 80
