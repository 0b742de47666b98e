"""The look of a report: one HTML page with its style inside, that asks nothing of the network.

Colours are CSS variables, so that page and figures follow the reader's light or dark setting together. Series colours keep apart
for colour-blind readers (lightness differs as well as hue), and lines differ in dash or marker too where several share a frame.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #f3f3ef; --ink: #1d1f21; --soft: #5f6468; --line: #dcdcd6;
  --s0: #1f5f9e; --s1: #b8530a; --s2: #0f7d6c; --s3: #7d4fa8; --s4: #a8325e; --s5: #6a6a10;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181a; --card: #1e2225; --ink: #e8e8e4; --soft: #9ba1a6; --line: #343a3e;
    --s0: #78b4ee; --s1: #f29a5c; --s2: #55c7b2; --s3: #c0a0f0; --s4: #f08cb0; --s5: #c8c45c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 3rem 0 .35rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .35rem 0 .9rem; max-width: 46rem; }
.soft, figcaption, th { color: var(--soft); }
.soft, figcaption { font-size: .875rem; }
nav { margin: 1.1rem 0 0; font-size: .875rem; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; }
a { color: var(--s0); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
.tiles { display: grid; gap: .75rem; margin: 1.6rem 0 0; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.tile { background: var(--card); border-radius: 8px; padding: .8rem .95rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { font-size: .8125rem; color: var(--soft); display: block; line-height: 1.35; }
.figures { display: grid; gap: 1.25rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); }
figure { margin: .6rem 0 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; }
figure.wide { max-width: 540px; }
figure svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .875rem; margin: .5rem 0 0; padding: 0; list-style: none; }
.keys svg { width: 26px; height: 10px; margin-right: .4rem; vertical-align: middle; overflow: visible; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
th, td { padding: .32rem 1.4rem .32rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.total td { font-weight: 600; }
.share { display: inline-block; height: .6em; border-radius: 2px; background: var(--s0); min-width: 1px; }
td.bar { width: 9rem; min-width: 6rem; }
blockquote {
  margin: .9rem 0 1.2rem; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--line);
  max-width: 46rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
blockquote b { font-weight: 650; }
details { margin: .3rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
code, .code td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .8125rem; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 1.5rem 1rem 3rem; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .6rem; }
  .tile b { font-size: 1.25rem; }
  th, td { padding-right: .9rem; }
}
@media print { main { max-width: none; } h2 { break-after: avoid; } figure, .tile { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: Any) -> Html:
    """Escapes a value for use between tags."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def page(title: str, subtitle: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Puts a page together from (heading, HTML) sections; `lead` is HTML above the first heading."""
    names = [(f"section-{i}", heading) for i, (heading, _) in enumerate(sections)]
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading in names)
    body = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{text(heading)}</h2>\n{content}</section>'
        for (name, heading), (_, content) in zip(names, sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<header><h1>{text(title)}</h1><div class="soft">{text(subtitle)}</div></header>\n{lead}\n'
        f'<nav aria-label="Sections">{links}</nav>\n{body}\n</main></body></html>\n'
    )


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Headline numbers: (number, what it is)."""
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{text(n)}</b><span>{text(w)}</span></div>" for n, w in entries)}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Iterable[int] = (), total: bool = False
) -> str:
    """A table; `numeric` columns are set flush right, and `total` marks the last row."""
    right = set(numeric)

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{text(value)}</{tag}>" for i, value in enumerate(row))

    rows = list(rows)
    body = "".join(
        f"<tr{' class=total' if total and i == len(rows) - 1 else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def share_bar(share: float) -> Html:
    """A bar within a table cell, of a share from 0 to 1."""
    return Html(f'<span class="share" style="width: {max(0.0, min(1.0, share)) * 8:.2f}rem" aria-hidden="true"></span>')


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Lists a nested JSON value as (dotted path, text); short lists of plain values stay on one line."""
    if isinstance(value, Mapping) and value:
        return [line for key, item in value.items() for line in flatten(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return [line for i, item in enumerate(value) for line in flatten(item, f"{path}.{i}" if path else str(i))]
    if isinstance(value, (list, tuple)):
        return [(path, ", ".join(map(str, value)) if value else "none")]
    if isinstance(value, bool):
        return [(path, "yes" if value else "no")]
    if isinstance(value, int) and abs(value) >= 10_000:
        return [(path, f"{value:,}")]
    return [(path, "none" if value is None or value == {} else str(value))]


def facts(value: Any) -> str:
    """A nested JSON value as a table of paths and values."""
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(item)}</td></tr>" for name, item in flatten(value))
    return f'<div class="scroll" tabindex="0"><table class="code"><tbody>{rows}</tbody></table></div>'


def folded(summary: str, content: str, opened: bool = False) -> str:
    """Content that opens on demand."""
    return f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{content}</details>"


def figure(svg: str, caption: str = "", wide: bool = False) -> str:
    """A figure with its caption; a wide one stands alone."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' if wide else ''}>{svg}{below}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Figures beside each other, as many as fit."""
    return f'<div class="figures">{"".join(parts)}</div>'


def keys(entries: Iterable[tuple[str, str, str]]) -> str:
    """A legend: (label, CSS colour, "line" | "dots" | "faint" | "bar" | "dashes")."""

    def mark(colour: str, kind: str) -> str:
        if kind == "dots":
            drawing = f'<path d="M0 5h26" stroke="{colour}" stroke-width="1.2"/><circle cx="13" cy="5" r="3.2" fill="{colour}"/>'
        elif kind == "bar":
            drawing = f'<rect x="4" width="18" height="10" rx="1" fill="{colour}"/>'
        elif kind == "dashes":
            drawing = f'<path d="M13 -2v14" stroke="{colour}" stroke-width="2" stroke-dasharray="3 2"/>'
        else:
            opacity = ".35" if kind == "faint" else "1"
            drawing = f'<path d="M0 5h26" stroke="{colour}" stroke-width="2.2" opacity="{opacity}"/>'
        return f'<svg viewBox="0 0 26 10" aria-hidden="true">{drawing}</svg>'

    return f'<ul class="keys">{"".join(f"<li>{mark(c, k)}{text(label)}</li>" for label, c, k in entries)}</ul>'
