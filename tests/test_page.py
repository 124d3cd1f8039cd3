"""The one page of all results: strict HTML, alternative text, nothing from the network, and what it shows."""

import base64
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from shared.cli import run_main
from shared.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "results"))
report, parts, plots, study, recompute = (
    import_module(name) for name in ("report", "page_parts", "page_plots", "page_study", "recompute")
)
PAGE = REPOSITORY / report.PAGE
VOID = {"meta", "br", "img", "hr", "link", "input"}
DRAWN = {"svg", "img"}


class Strict(HTMLParser):
    """Reads a page and notes all that is wrong with it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict]] = []
        self.wrong: list[str] = []
        self.titles = 0  # of drawings
        self.text = ""

    def note(self, problem: str) -> None:
        self.wrong.append(f"line {self.getpos()[0]}: {problem}")

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if len(found) != len(attrs):
            self.note(f"<{tag}> has an attribute twice")
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        self.references += [v[1:] for k, v in attrs if k == "href" and v.startswith("#")]
        self.references += [name for k, v in attrs for name in re.findall(r"url\(#([^)]+)\)", v or "")]
        for key in ("aria-labelledby", "aria-describedby"):
            self.references += found.get(key, "").split()
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        inside = [name for name, _ in self.stack]
        if tag in ("p", "ul", "ol", "table", "div", "figure", "section", "pre", *(f"h{i}" for i in range(1, 7))):
            for outer in ("p", "h1", "h2", "h3", "h4", "h5", "h6", "span", "code", "a", "th"):
                if outer in inside:
                    self.note(f"<{tag}> inside <{outer}>")
        wanted = {"li": {"ul", "ol"}, "tr": {"thead", "tbody"}, "td": {"tr"}, "th": {"tr"}, "figcaption": {"figure"}}
        if tag in wanted and (not inside or inside[-1] not in wanted[tag]):
            self.note(f"<{tag}> inside <{inside[-1] if inside else 'nothing'}>")
        if tag == "th" and found.get("scope") not in ("col", "row"):
            self.note("<th> without scope")
        if tag == "img" and not found.get("alt", "").strip():
            self.note("<img> without alternative text")
        if tag == "svg" and found.get("role") != "img":
            self.note("<svg> without role=img")
        if tag == "title" and "svg" in inside:
            self.titles += 1
        if tag not in VOID:
            self.stack.append((tag, found))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if not self.stack or self.stack[-1][0] != tag:
            self.note(f"</{tag}> closes <{self.stack[-1][0] if self.stack else 'nothing'}>")
        else:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack or self.stack[-1][0] != "style":
            self.text += data
        if self.stack and self.stack[-1][0] == "title" and not data.strip():
            self.note("an empty title")


def read(text: str) -> Strict:
    page = Strict()
    page.feed(text)
    page.close()
    return page


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Strict:
    return read(text)


def test_the_committed_page_is_that_of_the_results_and_is_no_burden_to_load(capsys):
    assert run_main(report.main, ["--check"]) == 0, "stale: make report writes it anew"
    assert capsys.readouterr().out == "up to date\n"
    assert PAGE.stat().st_size < 8 * 2**20


def test_the_page_is_well_formed(page):
    assert page.wrong == []
    assert page.stack == []


def test_its_identifiers_are_unique_and_every_reference_resolves(page):
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) - set(page.ids) == set()


def test_it_has_a_language_one_first_heading_and_no_gap_in_their_order(page):
    assert ("html", {"lang": "en"}) in page.tags
    assert page.headings.count(1) == 1
    assert page.headings[0] == 1
    assert [pair for pair in zip(page.headings, page.headings[1:], strict=False) if pair[1] > pair[0] + 1] == []


def test_every_drawing_has_a_title_and_every_plot_a_description(page):
    drawings = [found for tag, found in page.tags if tag == "svg"]
    assert page.titles == len(drawings)
    shown = [found for tag, found in page.tags if tag in DRAWN and "plot" in found.get("class", "")]
    published = sorted((REPOSITORY / "results").glob("*/*/plots/*.svg"))
    assert published
    assert len(shown) == len(published)
    for found in shown:
        assert found.get("alt") or len(found["aria-labelledby"].split()) == 2


def test_every_table_scrolls_in_a_box_that_has_a_name_and_takes_the_keyboard(page, text):
    boxes = re.findall(r'<div class="scroll" role="region" tabindex="0" aria-label="([^"]+)">\s*<table', text)
    assert len(boxes) == sum(tag == "table" for tag, _ in page.tags)


def test_nothing_is_loaded_and_nothing_runs(page, text):
    assert {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags} == set()
    for tag, found in page.tags:
        assert not [name for name in found if name.startswith("on")]
        for key in ("src", "href", "srcset", "data", "poster"):
            value = found.get(key, "")
            if tag != "a":
                assert value.startswith(("data:image/png", "#")) or not value, (tag, value)
    assert "@import" not in text
    assert "url(" not in text.partition("<style>")[2].partition("</style>")[0]
    assert "default-src 'none'" in text


def test_every_link_to_a_file_leads_somewhere(page):
    for tag, found in page.tags:
        target = found.get("href", "#")
        if tag == "a" and not target.startswith(("#", "http")):
            assert (PAGE.parent / target.partition("#")[0]).exists(), target


def test_every_published_study_and_every_paper_is_on_it_with_its_command(page, text):
    for path in (REPOSITORY / "results").glob("*/*/results.csv"):
        command = study.StudyPart(path, "", {}).command
        assert f"<code>{parts.escape(command)}</code></figcaption>" in text
        assert f"{path.parent.parent.name}/{path.parent.name}/results.csv" in page.text
    for name in ("FedLoGe", "MDCS", "LightCNN", "SparseViT"):
        assert name in page.text
    assert text.count("</figcaption>") == text.count("<figure")


def test_a_paper_without_results_is_named_as_such(page):
    for paper in report.PAPERS:
        published = [*(REPOSITORY / "results" / paper).rglob("results.csv"),
                     *(REPOSITORY / "results" / paper).glob("runs.csv")]  # fmt: skip
        said = f"No study of {report.PaperPart(REPOSITORY, paper).name} is published yet"
        assert (said in page.text) == (not published)


def test_the_headline_claims_are_those_of_the_table_of_papers():
    wanted = recompute.table_of(REPOSITORY / "results" / "papers.md")[1:]
    parts_of_papers = [report.PaperPart(REPOSITORY, paper) for paper in report.PAPERS]
    found = [row for paper in parts_of_papers for one in paper.studies for row in one.headlines]
    assert sorted(found) == sorted(wanted)


@pytest.fixture
def small(tmp_path) -> Path:
    """A repository of READMEs and one published study."""
    for name in ("README.md", *(f"{paper}/README.md" for paper in report.PAPERS)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "results" / "fedloge" / "mini", tmp_path / "results" / "fedloge" / "mini")
    return tmp_path


def test_what_a_readme_or_a_table_says_cannot_break_the_page(small):
    claims = small / "results" / "fedloge" / "mini" / "claims.md"
    claims.write_text(claims.read_text().replace("| 640 | 640 |", '| <b onclick=x>& "q" | 6 < 4 \\| 0 |'))
    readme = small / "fedloge" / "README.md"
    readme.write_text(readme.read_text().replace("## Deviations", "## Deviations <script>alert(1)</script>"))
    built = report.build(small)
    found = read(built)
    assert found.wrong == []
    assert "script" not in {tag for tag, _ in found.tags}
    assert '<b onclick=x>& "q"' in found.text
    assert "6 < 4 | 0" in found.text


def test_no_results_at_all_still_make_a_page(small):
    shutil.rmtree(small / "results")
    found = read(report.build(small))
    assert found.wrong == []
    assert found.text.count("is published yet") == len(report.PAPERS)


def test_single_runs_are_shown(small):
    source = small / "results" / "fedloge" / "mini" / "results.csv"
    lines = source.read_text().splitlines()[:40]
    command = "python -m fedloge.train --config mini seed=9"
    lines.append(re.sub(r"python -m fedloge\.train [^,]*", command, lines[1]))
    (small / "results" / "fedloge" / "runs.csv").write_text("\n".join(lines) + "\n")
    text = report.build(small)
    assert (found := read(text)).wrong == []
    assert "Single runs" in found.text
    section = text.partition('id="fedloge-runs"')[2].partition("</section>")[0]
    assert section.count(command) == 1, "each row has its own command"
    assert "Each made by the command in its row." in section


def test_a_large_drawing_is_replaced_by_its_png_and_refused_without_one(small, monkeypatch):
    monkeypatch.setattr(plots, "LARGE", 1000)
    found = read(report.build(small))
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    folder = small / "results" / "fedloge" / "mini" / "plots"
    assert len(images) == len(list(folder.glob("*.png")))
    raw = base64.b64decode(images[0]["src"].partition(",")[2])
    assert raw == sorted(folder.glob("*.png"))[0].read_bytes()
    sorted(folder.glob("*.png"))[0].write_bytes(b"no picture")
    with pytest.raises(DataError, match="is not a PNG"):
        report.build(small)
    sorted(folder.glob("*.png"))[0].unlink()
    with pytest.raises(DataError, match="cannot be read"):
        report.build(small)


def test_a_damaged_drawing_or_a_missing_readme_is_told_in_one_line(small, monkeypatch, capsys):
    monkeypatch.setattr(report, "REPOSITORY", small)
    drawing = next((small / "results" / "fedloge" / "mini" / "plots").glob("*.svg"))
    drawing.write_text("<svg")
    assert run_main(report.main, []) == 2
    assert re.fullmatch(rf"error: {drawing.name}: is not an SVG: .*\n", capsys.readouterr().err)
    (small / "mdcs" / "README.md").unlink()
    assert run_main(report.main, []) == 2
    assert capsys.readouterr().err == "error: README.md: cannot be read: No such file or directory; the page shows it\n"


def test_check_writes_nothing_and_the_command_mends_it(small, monkeypatch, capsys):
    monkeypatch.setattr(report, "REPOSITORY", small)
    assert run_main(report.main, ["--check"]) == 1
    assert capsys.readouterr().out == "stale: results/report/index.html\n"
    assert not (small / report.PAGE).exists()
    assert run_main(report.main, []) == 0
    assert run_main(report.main, ["--check"]) == 0


def test_identifiers_of_two_drawings_do_not_meet():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">'
        "<metadata>x</metadata><style>*{fill:red}</style><script>x</script>"
        '<defs><path id="m1"/><clipPath id="p1"/></defs>'
        '<g id="figure_1" clip-path="url(#p1)" style="fill:#ff0000"><use xlink:href="#m1"/></g></svg>'
    )
    root = plots.ElementTree.fromstring(svg)
    drawn = plots.inline_svg(root, "a", "title & more", "labels")
    found = read(drawn)
    assert found.wrong == []
    assert set(found.references) <= set(found.ids)
    assert all(name.startswith("a-") for name in found.ids)
    assert {"script", "style", "metadata"} & {tag for tag, _ in found.tags} == set()
    assert "fill:#ff0000" in drawn
    assert "figure_1" not in drawn


@pytest.mark.parametrize(("text", "kind"), [
    ("+2.64 ± 0.67 [+1.81, +3.48] points", "dot"), ("+22.57 ± 4.83 [+10.58, +34.56] points", "M112 4"),
    ("-22.57 ± 4.83 [-34.56, -10.58] points", "M8 4"), ("640", ""), ("+0.9 ± 0.1 [+0.8, +1.0]", ""),
])  # fmt: skip
def test_an_interval_is_drawn_where_there_is_one_in_points(text, kind):
    usual = ["+1.00 ± 1.00 [-1.00, +3.00] points"] * 3
    (drawn, *_) = parts.interval_marks([text, *usual])
    assert kind in drawn if kind else drawn == ""
    assert ('class="dot"' in drawn) == (kind == "dot")


def test_a_choice_made_before_a_study_is_shown_but_is_no_result(small):
    folder = small / "results" / "sparsevit" / "mini_choice"
    folder.mkdir(parents=True)
    made = "python -m sparsevit.reproduce --config mini --study choose"
    (folder / "choice.md").write_text(
        f"The rule. `{made}`.\n\n| arm | value |\n| --- | --- |\n| l1 | 0.1 |\n\n- l1: 0.1\n"
    )
    built = report.build(small)
    found = read(built)
    assert found.wrong == []
    assert "Choice of coefficients" in found.text
    assert f"Made by <code>{made}</code>" in built
    assert "No study of SparseViT is published yet" in found.text


def test_a_table_is_captioned_with_the_command_that_its_text_names_and_never_with_another(small):
    folder = small / "results" / "sparsevit" / "vit_b16_224"
    folder.mkdir(parents=True)
    made, table = "python -m sparsevit.latency nets --batch 1", "| network | ms |\n| --- | --- |\n| dense | 1 |\n"
    (folder / "latency.md").write_text(f"A CPU. `{made}`.\n\n{table}")
    assert f"<figcaption>Made by <code>{made}</code></figcaption>" in report.build(small)
    (folder / "latency.md").write_text(f"A CPU. `make reproduce`.\n\n{table}")
    assert "<figcaption>Its command is not recorded.</figcaption>" in report.build(small)


def test_the_page_says_how_comparisons_and_facts_are_judged_and_how_many_there_are(page):
    rows = recompute.table_of(REPOSITORY / "results" / "papers.md")[1:]
    compared = sum("±" in row[3] for row in rows)
    assert f"{compared} are comparisons, judged by a difference over n seeds" in page.text
    left = len(rows) - compared - sum(row[-1] == "not run" for row in rows)
    assert (f"{left} are facts, such as a count, without an interval" in page.text) == (left > 1)
    fact, other = ["p", "c", "-", "640", "5", "reproduced"], ["p", "c", "-", "-", "0", "not run"]
    assert "1 verdicts, one for each claim of each study. 0 are comparisons" in report._judged([other])
    assert "fact" not in report._judged([other])
    assert " 1 is a fact, such as a count, without an interval" in report._judged([fact, other])


def test_the_page_says_where_its_words_are_from(page, text):
    assert "READMEs" in text.partition("<footer>")[2]
    told = (REPOSITORY / "README.md").read_text().split("\n\n")[1].replace("\n", " ")
    assert told in " ".join(page.text.split())  # it does take words from there


def test_papers_with_results_come_first_in_the_order_of_the_readme(small):
    (small / "results" / "fedloge").rename(small / "results" / "mdcs")
    assert [x["id"] for tag, x in read(report.build(small)).tags if tag == "section" and x.get("class") == "paper"] == [
        "mdcs", "fedloge", "lightcnn", "sparsevit",
    ]  # fmt: skip
