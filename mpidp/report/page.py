"""Makes the HTML page around the charts. The page is one file with its own style sheet. It can be read on light and dark screens
and in print. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LIGHT = ["#0b62a4", "#b3470a", "#1f7a55", "#8e3b8f", "#8a6d00", "#2b8fa3", "#9c2f45", "#5b5f66"]
DARK = ["#6cb6ff", "#ff9e57", "#4fd1a0", "#d99bdc", "#e3c63b", "#62d0e6", "#ff8fa3", "#b4bac2"]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"  # no scripts, no network
DASHES = ["none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2"]


def _colours(values: Sequence[str]) -> str:
    return "".join(f"--c{i}:{value};" for i, value in enumerate(values))


_LIGHT = (
    "color-scheme:light;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--grid:#e2e6ea;--card:#f5f7f9;--edge:#d0d7de;--ideal:#1f7a55;"
    "--loss:#c2560c;--hot:176,58,16;--note:#fff6dd;" + _colours(LIGHT)
)
_DARK = (
    "color-scheme:dark;--paper:#12161b;--ink:#e6eaef;--soft:#a3adb8;--grid:#2a313a;--card:#1a2027;--edge:#37404a;--ideal:#4fd1a0;"
    "--loss:#ff9e57;--hot:255,150,80;--note:#3a3010;" + _colours(DARK)
)
STYLE = (
    f":root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + f"@media print{{:root{{{_LIGHT}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 28px 48px;max-width:1240px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.6rem;margin:0 0 2px}h1.next{margin-top:56px}
h2{font-size:1.2rem;margin:34px 0 10px;padding-bottom:4px;border-bottom:1px solid var(--edge)}
h3{font-size:1.02rem;margin:18px 0 6px}p{margin:6px 0;max-width:78ch}.soft,.under{color:var(--soft)}.under{margin-top:0}
.note{background:var(--note);border-left:4px solid var(--loss);padding:8px 12px;margin:12px 0}
.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 12px;break-inside:avoid}
.card b{display:block;font-size:1.22rem;font-variant-numeric:tabular-nums}.card span{color:var(--soft);font-size:.84rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:14px 22px}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600;margin:6px 0 2px}svg{display:block;width:100%;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:4px 0 0;padding:0;font-size:.86rem}
.legend li{display:flex;align-items:center;gap:6px}.legend svg{width:auto;flex:none}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;fill:var(--ink)}
svg text.tick{fill:var(--soft);font-size:11px}svg text.name{fill:var(--soft)}
.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:2}.hover{fill:transparent;stroke:none}
.hover:hover{fill:var(--ink);fill-opacity:.35}.ideal{fill:var(--ideal)}.loss{fill:var(--loss)}
.cell{fill:rgba(var(--hot),var(--shade))}.bar{stroke:var(--paper);stroke-width:1}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;margin:8px 0}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code,.mono{font:13px/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
@media (max-width:760px){.cards{grid-template-columns:repeat(2,1fr)}}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
@page{margin:14mm}
@media print{body{padding:0;max-width:none;font-size:11pt}h2{break-after:avoid}.charts{grid-template-columns:1fr 1fr}
.charts svg text,.charts svg text.tick{font-size:16px}section>p,h1.next{break-after:avoid}
details>summary{list-style:none}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
h1.next{break-before:page;margin-top:0}tr,.note{break-inside:avoid}}
"""
    + "".join(
        f".line.s{i}{{stroke:var(--c{i});stroke-dasharray:{DASHES[i]}}}.dot.s{i},.bar.s{i}{{fill:var(--c{i})}}" for i in range(8)
    )
)


def page(title: str, under: str, sections: Sequence[str]) -> str:
    """Return the whole HTML file. under: the line below the title. sections: HTML of the sections. Pure."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="under">{escape(under)}</p>{"".join(sections)}</body></html>\n'
    )


def section(title: str, *parts: str) -> str:
    """Return HTML for a section with a heading, or "" if all parts are empty. Pure."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def charts(*figures: str) -> str:
    """Return HTML that shows figures side by side if there is space, or "" if there are none. Pure."""
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def cards(rows: Sequence[tuple[str, str]]) -> str:
    """Return HTML for a row of cards. A card shows a value above its name. rows: (value, name). Pure."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in rows
    ) + "</div>"


def paragraph(text: str, kind: str = "") -> str:
    """Return HTML for a paragraph of text. kind: its CSS class. Pure."""
    return f'<p class="{kind}">{escape(text)}</p>'


def note(text: str) -> str:
    """Return HTML for a highlighted paragraph of text. Pure."""
    return f'<p class="note" role="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return HTML for a table. head: the names of the columns. numbers: indices of the columns that contain numbers. Pure."""
    kinds = [' class="n"' if i in numbers else "" for i in range(len(head))]
    top = "" if not any(head) else "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>{f"<thead><tr>{top}</tr></thead>" if top else ""}<tbody>{body}</tbody></table></div>'


def folded(title: str, *parts: str) -> str:
    """Return HTML that shows only `title` until the reader opens it. parts: HTML that is then shown. Pure."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"
