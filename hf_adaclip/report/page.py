"""One self-contained HTML page from a list of parts: the frame of every report. Nothing is fetched when it is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adaclip.report.chart import Chart, svg

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; --line: #d8d8d8; --soft: #5c5c5c; --good: #0B5A8A;
          --bad: #b3261e; --mark: #fff4d6;
          --norm: #0072B2; --threshold: #B87700; --cut: #C04F00; --out: #A8457F; --loss: #00734F; --pace: #2B7FB0; --grey: #6b6b6b; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --ground: #16181c; --line: #3a3d44; --soft: #a8a8a8;
          --good: #8CCBF0; --bad: #ff8a80; --mark: #3a3216;
          --norm: #6CB8EE; --threshold: #F0B429; --cut: #FF8A5C; --out: #E6A0C8; --loss: #4CC38A; --pace: #8CCBF0; --grey: #a8a8a8; } }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
         padding: 24px 16px; max-width: 1100px; }
  h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 40px 0 8px; }
  h3 { font-size: 1rem; margin: 24px 0 0; } p, li { overflow-wrap: anywhere; }
  .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); } .lead { font-size: 1.1rem; }
  .good::before { content: "\\2713\\00a0"; } .bad::before { content: "\\26a0\\00a0"; }
  .scroll { overflow-x: auto; } .tall { overflow-y: auto; max-height: 480px; }
  table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
  th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); }
  th:first-child, td:first-child, td.words, th.words { text-align: left; }
  td { overflow-wrap: break-word; }
  td.short, th.short { text-align: left; } td.short { white-space: nowrap; }
  td.words { min-width: 200px; } td.words, table.facts td { overflow-wrap: anywhere; }
  table.facts td { text-align: left; } table.facts td:first-child { width: 14rem; color: var(--soft); }
  th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--ground); }
  tr.marked td { background: var(--mark); }
  details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
  code { overflow-wrap: anywhere; } .plotly-graph-div { max-width: 100%; overflow: hidden; }
  figure.images img { margin: 0 4px 4px 0; image-rendering: pixelated; }
  figure { margin: 8px 0 0; } figcaption { font-size: 0.85rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 16px; }
  svg.chart { display: block; width: 100%; height: auto; } .chart text { fill: var(--soft); font: 13px system-ui, sans-serif; }
  .chart .grid { stroke: var(--line); } .chart polyline { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
  .chart path.b, .chart path.m-down { stroke: none; } .chart path.m-cross { fill: none; stroke-width: 2; }
  polyline.c-norm { stroke: var(--norm); }
  path.c-norm { fill: var(--norm); stroke: var(--norm); } .t-norm { color: var(--norm); }
  polyline.c-threshold { stroke: var(--threshold); }
  path.c-threshold { fill: var(--threshold); stroke: var(--threshold); } .t-threshold { color: var(--threshold); }
  polyline.c-cut { stroke: var(--cut); }
  path.c-cut { fill: var(--cut); stroke: var(--cut); } .t-cut { color: var(--cut); }
  polyline.c-out { stroke: var(--out); }
  path.c-out { fill: var(--out); stroke: var(--out); } .t-out { color: var(--out); }
  polyline.c-loss { stroke: var(--loss); }
  path.c-loss { fill: var(--loss); stroke: var(--loss); } .t-loss { color: var(--loss); }
  polyline.c-pace { stroke: var(--pace); }
  path.c-pace { fill: var(--pace); stroke: var(--pace); } .t-pace { color: var(--pace); }
  polyline.c-grey { stroke: var(--grey); }
  path.c-grey { fill: var(--grey); stroke: var(--grey); } .t-grey { color: var(--grey); }
  @media (min-width: 900px) { .chart text { font-size: 10px; } }
  @media (max-width: 620px) {
    .chart text { font-size: 21px; } .chart .odd { display: none; }
    table.wide, table.wide tbody, table.wide tr, table.wide td { display: block; } table.wide tr.head { display: none; }
    table.wide tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
    table.wide td, table.wide td:first-child { border: none; padding: 1px 0; text-align: left; min-width: 0; white-space: normal; }
    table.wide td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
    table.facts td:first-child { width: 38%; } .tall { max-height: 80vh; }
  }
</style>
{% if plotly_js %}<script>{{ plotly_js | safe }}</script>{% endif %}
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% macro table(part) %}<div class="scroll{{ ' tall' if part.rows | length > 14 }}">
<table class="{{ 'facts' if not part.labels else 'wide' if part.labels | length > 2 }}"><tbody>
{% if part.labels %}<tr class="head">{% for label in part.labels %}
<th{{ ' class="words"' | safe if label in part.words }}
{{- ' class="short"' | safe if label in part.short }}>{{ label }}</th>{% endfor %}</tr>
{% endif %}{% for row in part.rows %}<tr{{ ' class="marked"' | safe if loop.index0 in part.marked }}>{% for cell in row %}
<td{{ ' class="words"' | safe if part.labels and part.labels[loop.index0] in part.words }}
{{- ' class="short"' | safe if part.labels and part.labels[loop.index0] in part.short }}
{%- if part.labels and part.labels[loop.index0] %} data-label="{{ part.labels[loop.index0] }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro prose(text) %}{% set pieces = text.split("`") %}{% for piece in pieces %}
{%- if pieces | length % 2 == 0 %}{{ "`" if not loop.first }}{{ piece }}
{%- elif loop.index0 % 2 %}<code>{{ piece }}</code>{% else %}{{ piece }}{% endif %}{% endfor %}{% endmacro %}
{% for part in parts %}
{% if part.kind == "heading" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "subheading" %}<h3>{{ part.text }}</h3>
{% elif part.kind == "text" %}<p class="{{ part.tone }}">{{ prose(part.text) }}</p>
{% elif part.kind == "list" %}<ul>{% for item in part.rows %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif part.kind == "figure" %}{{ part.text | safe }}
{% elif part.kind == "table" %}{{ table(part) }}
{% elif part.kind == "folded" %}<details><summary>{{ part.text }}</summary>{{ table(part) }}</details>
{% endif %}{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Part:
    """A piece of a page. `text` of a figure is HTML that we made; everything else is escaped."""

    kind: str
    text: str = ""
    tone: str = ""
    labels: Sequence[str] = ()
    rows: Sequence[Any] = ()
    words: Sequence[str] = ()
    short: Sequence[str] = ()
    marked: Sequence[int] = ()
    interactive: bool = False


def heading(text: str) -> Part:
    return Part("heading", text)


def subheading(text: str) -> Part:
    return Part("subheading", text)


def text(content: str, tone: str = "soft") -> Part:
    """A paragraph; `tone` is soft, good, bad or empty."""
    return Part("text", content, tone)


def bullets(items: Sequence[str]) -> Part:
    return Part("list", rows=items)


def table(
    labels: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[str] = (),
    marked: Sequence[int] = (),
    short: Sequence[str] = (),
) -> Part:
    """A table; the columns in `words` hold sentences, those in `short` a few words that stay on one line, the rows in `marked` stand out.
    On a narrow screen each row is a card."""
    return Part("table", labels=labels, rows=rows, words=words, short=short, marked=marked)


def facts(rows: Sequence[Sequence[str]]) -> Part:
    """Names and values, without a head."""
    return Part("table", rows=rows)


def folded(summary: str, labels: Sequence[str], rows: Sequence[Sequence[str]]) -> Part:
    """A table that is opened by a click."""
    return Part("folded", summary, labels=labels, rows=rows)


def figure(chart: Chart, *, zoom: bool = False) -> Part:
    """A chart: a static drawing, or with `zoom` one by plotly, whose library (4.8 MB) then stands once in the page's head."""
    if not zoom:
        return Part("figure", svg(chart))
    from hf_adaclip.report.figures import interactive

    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawn = interactive(chart).to_html(full_html=False, include_plotlyjs=False, config=config)
    return Part("figure", str(drawn), interactive=True)


def images(content: str) -> Part:
    """Pictures beside each other; `content` is HTML that we made."""
    return Part("figure", f'<figure class="images">{content}</figure>')


def write_page(path: Path, title: str, subtitle: str, parts: Sequence[Part]) -> Path:
    """Render the page."""
    from jinja2 import Environment

    plotly_js = ""
    if any(p.interactive for p in parts):
        from plotly.offline import get_plotlyjs

        plotly_js = get_plotlyjs()
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    path.write_text(
        template.render(title=title, subtitle=subtitle, parts=parts, plotly_js=plotly_js), encoding="utf-8"
    )
    return path
