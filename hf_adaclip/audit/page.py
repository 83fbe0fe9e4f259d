"""One self-contained HTML page from a list of parts: the frame of every report. Nothing is fetched when it is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; --line: #d8d8d8; --soft: #666666; --good: #00734f;
          --bad: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --ground: #16181c; --line: #3a3d44; --soft: #a0a0a0;
          --good: #4cc38a; --bad: #ff8a80; } }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
         padding: 24px 16px; max-width: 1100px; }
  h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 40px 0 8px; }
  h3 { font-size: 1rem; margin: 24px 0 0; }
  .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
  .scroll { overflow: auto; max-height: 480px; }
  table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
  th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th:first-child, td:first-child, td.words, th.words { text-align: left; } td.words { white-space: normal; min-width: 240px; }
  th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--ground); }
  code { overflow-wrap: anywhere; } .plotly-graph-div { max-width: 100%; overflow: hidden; }
</style>
{% if plotly_js %}<script>{{ plotly_js | safe }}</script>{% endif %}
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% for part in parts %}
{% if part.kind == "heading" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "subheading" %}<h3>{{ part.text }}</h3>
{% elif part.kind == "text" %}<p class="{{ part.tone }}">{{ part.text }}</p>
{% elif part.kind == "list" %}<ul>{% for item in part.rows %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif part.kind == "figure" %}{{ part.text | safe }}
{% elif part.kind == "table" %}<div class="scroll"><table>
<tr>{% for label in part.labels %}<th{{ ' class="words"' | safe if label in part.words }}>{{ label }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}
<td{{ ' class="words"' | safe if part.labels[loop.index0] in part.words }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
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


def heading(text: str) -> Part:
    return Part("heading", text)


def subheading(text: str) -> Part:
    return Part("subheading", text)


def text(content: str, tone: str = "soft") -> Part:
    """A paragraph; `tone` is soft, good, bad or empty."""
    return Part("text", content, tone)


def bullets(items: Sequence[str]) -> Part:
    return Part("list", rows=items)


def table(labels: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> Part:
    """A table; the columns in `words` hold sentences and may wrap."""
    return Part("table", labels=labels, rows=rows, words=words)


def figure(plot: Any) -> Part:
    """A plotly figure, zoomable; the library itself stands once in the page's head."""
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return Part("figure", str(plot.to_html(full_html=False, include_plotlyjs=False, config=config)))


def write_page(path: Path, title: str, subtitle: str, parts: Sequence[Part]) -> Path:
    """Render the page."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    plotly_js = get_plotlyjs() if any(p.kind == "figure" for p in parts) else ""
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    path.write_text(
        template.render(title=title, subtitle=subtitle, parts=parts, plotly_js=plotly_js), encoding="utf-8"
    )
    return path
