"""The pieces of the report's page: text, tables, badges and marks, each as HTML that is escaped and well-formed."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePosixPath
from typing import Any

from markdown_it import MarkdownIt

from shared.errors import DataError

VERDICTS: Mapping[str, tuple[str, str]] = {  # class, and a sign that needs no colour
    "reproduced": ("yes", "✓"), "not reproduced": ("no", "✕"), "inconclusive": ("open", "~"),
    "not run": ("none", "–"),
}  # fmt: skip
NUMBER = re.compile(r"[-+±\d.,e%\[\]()×k ]*\d[-+±\d.,e%\[\]() ]*(?:points|us|ms|s)?|-|–")
INTERVAL = re.compile(r"([+-][\d.]+) ± ([\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] points")
TOGETHER = re.compile(r"[+-]?[\d.,]+ ± [\d.]+|\[[-+\d., ]+\](?: points)?")  # no line ends within it
MARKER = re.compile(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->\n?", re.DOTALL)
IMAGE = re.compile(r"^!\[([^\]]*)\]\(([^)]+)\)\n?", re.MULTILINE)


def slug(*words: str) -> str:
    """An identifier for the page."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


def inline(text: str, base: str = "../..") -> str:
    """One line of Markdown (code, links, emphasis); relative links are from `base`, a folder as the page sees it."""
    return str(_markdown(base).renderInline(text))


def prose(text: str, level: int, base: str) -> str:
    """Paragraphs, lists, code and tables in Markdown; its headings become those of `level`."""
    md = _markdown(base)
    tokens = md.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{level}"
    return str(md.renderer.render(tokens, md.options, {}))


def _markdown(base: str) -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False}).enable("table")

    def table_open(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        """A table that scrolls by itself where the screen is narrow."""
        head = ", ".join(t.content for t in _head(tokens[index:]) if t.content)
        return f"{scroll_open(f'Table: {head}')}<table>\n"

    def table_close(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        """The end of a table and of what scrolls."""
        return "</table></div>\n"

    def th_open(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        """A heading of a column, named as such for screen readers."""
        return '<th scope="col">'

    def td_open(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        """A cell, without the alignment that a style sheet gives."""
        return "<td>"

    def link_open(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        """A link as the page sees it, which lies elsewhere than the README."""
        target = str(tokens[index].attrs.get("href", ""))
        if target.startswith("#"):  # a heading of the README, which may not be on the page
            target = f"README.md{target}"
        if not re.match(r"\w+:", target):
            target = posixpath.normpath(posixpath.join(base, target))
        return f'<a href="{escape(target)}">'

    for name, rule in (("table_open", table_open), ("table_close", table_close), ("th_open", th_open),
                       ("td_open", td_open), ("link_open", link_open)):  # fmt: skip
        md.add_render_rule(name, rule)
    return md


def _head(tokens: Sequence[Any]) -> list[Any]:
    end = next(i for i, token in enumerate(tokens) if token.type == "thead_close")
    return [token for token in tokens[:end] if token.type == "inline"]


def scroll_open(label: str) -> str:
    """The start of a box that scrolls sideways by itself, and by the keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'


def badge(verdict: str) -> str:
    """A verdict with its sign: told by word, sign and outline, not by colour alone."""
    kind, sign = VERDICTS[verdict]
    return f'<span class="badge {kind}"><span class="sign" aria-hidden="true">{sign}</span>{escape(verdict)}</span>'


def cell(text: str) -> str:
    """The inside of a cell: a badge for a verdict, else a line of Markdown."""
    return badge(text) if text in VERDICTS else TOGETHER.sub(r'<span class="nb">\g<0></span>', inline(text))


def table(
    rows: Sequence[Sequence[str]], label: str, kind: str, extra: Mapping[str, Sequence[str]] | None = None
) -> str:
    """A table in its own box; the first row is the head, the first column names the rows.

    Args:
        label: what the table is, for those who do not see it.
        kind: its class; `claims` becomes cards on a narrow screen.
        extra: further columns before the last one, heading -> cells that are HTML already.

    Raises:
        DataError: a row has more or fewer cells than the head.
    """
    head, *body = rows
    if uneven := next((row for row in body if len(row) != len(head)), None):
        raise DataError(f"{label}: a row has {len(uneven)} cells, the head {len(head)}; `make tables` writes it anew")
    inserted = dict(extra or {})
    columns = [*head[:-1], *inserted, head[-1]]
    # Explicit roles keep the table a table for a screen reader where the narrow style makes cards of its rows.
    lines = [f'{scroll_open(label)}<table class="{kind}" role="table">', '<thead role="rowgroup"><tr role="row">']
    lines += [f'<th scope="col" role="columnheader">{inline(name)}</th>' for name in columns]
    lines.append('</tr></thead><tbody role="rowgroup">')
    for number, row in enumerate(body):
        cells = [cell(text) for text in row]
        middle = [values[number] for values in inserted.values()]
        classes = ["num" if NUMBER.fullmatch(text) else "" for text in row]
        shown = zip(columns[1:], [*cells[1:-1], *middle, cells[-1]],
                    [*classes[1:-1], *("mark" for _ in middle), classes[-1]], strict=True)  # fmt: skip
        lines.append(f'<tr role="row"><th scope="row" role="rowheader">{cells[0]}</th>')
        lines += [
            f'<td role="cell" data-label="{escape(_plain(name))}"{f" class={kind!r}" if kind else ""}>{text}</td>'
            for name, text, kind in shown
        ]
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _plain(text: str) -> str:
    return text.replace("`", "").partition(":")[0]


def interval_marks(texts: Sequence[str]) -> list[str]:
    """A small drawing for each difference with its interval, all on one scale around zero; none for other figures."""
    found = [INTERVAL.match(text) for text in texts]
    ends = sorted(max(abs(float(match[i])) for i in (3, 4)) for match in found if match)
    reach = max(1.0, 2 * ends[len(ends) // 2]) if ends else 1.0  # wider ones end in an arrow, so that most can be read
    return [_mark(match, reach) if match else "" for match in found]


def _mark(match: re.Match[str], reach: float) -> str:
    mean, low, high = (float(match[i]) / reach for i in (1, 3, 4))
    if low > 1 or high < -1:  # all of it is beyond the edge
        low, high = (0.8, high) if low > 1 else (low, -0.8)
    left, right = (60 + 56 * min(1.0, max(-1.0, end)) for end in (low, high))
    caps = [f"M{left:.1f} 5V11" if low >= -1 else "M8 4L4 8L8 12"]
    caps += [f"M{right:.1f} 5V11" if high <= 1 else "M112 4L116 8L112 12"]
    caps = [drawn for drawn, end in zip(caps, (low, high), strict=True) if abs(end) != 0.8]
    dot = f'<circle class="dot" cx="{60 + 56 * mean:.1f}" cy="8" r="3"/>' if abs(mean) <= 1 else ""
    title = f"{match[1]} points, 95 % interval {match[3]} to {match[4]}; the edges are {reach:.1f} points from zero"
    return (
        f'<svg class="interval" role="img" viewBox="0 0 120 16" width="120" height="16"><title>{title}</title>'
        f'<path class="zero" d="M60 0V16"/><path class="line" d="M{left:.1f} 8H{right:.1f}{"".join(caps)}"/>{dot}</svg>'
    )


def sections(readme: str) -> dict[str, str]:
    """heading -> text of a README, without generated tables and pictures, which the page shows itself."""
    found, heading, fenced = dict[str, list[str]](), "", False
    for line in IMAGE.sub("", MARKER.sub("", readme)).splitlines():
        fenced ^= line.startswith("```")
        if line.startswith(("# ", "## ")) and not fenced:
            heading = line.lstrip("# ")
            line = ""
        found.setdefault(heading, []).append(line)
    return {name: "\n".join(lines).strip() for name, lines in found.items() if name}


def section(texts: Mapping[str, str], *starts: str) -> list[tuple[str, str]]:
    """The sections whose headings begin with one of these, in the README's order; empty ones left out."""
    return [(name, text) for name, text in texts.items() if name.startswith(starts) and text]


def image_titles(readme: str) -> dict[str, str]:
    """`study/name` of a picture in `<study>/plots/` -> the alternative text that the README gives it."""
    found = {PurePosixPath(path): alt for alt, path in IMAGE.findall(readme)}
    return {f"{path.parent.parent.name}/{path.stem}": alt for path, alt in found.items()}
