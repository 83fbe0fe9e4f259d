"""`report.html`: a comparison on one self-contained page; nothing is fetched when it is opened."""

import json
from pathlib import Path
from typing import Any

from hf_adaclip.convergence.arms import STOCK
from hf_adaclip.convergence.plots import plotly_curves, plotly_norms
from hf_adaclip.convergence.present import COLUMNS, heading, notes, table_rows
from hf_adaclip.convergence.tuning import Tuned

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hf_adaclip comparison</title>
<style>
  :root { color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; --line: #d8d8d8; --soft: #666666; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --ground: #16181c; --line: #3a3d44; --soft: #a0a0a0; } }
  body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto; padding: 24px 16px;
         max-width: 1100px; }
  h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.1rem; margin: 40px 0 8px; } h3 { font-size: 1rem; margin: 24px 0 0; }
  .soft { color: var(--soft); } .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
  th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
  code { overflow-wrap: anywhere; } .plotly-graph-div { max-width: 100%; overflow: hidden; }
</style>
<script>{{ plotly_js | safe }}</script>
</head>
<body>
<h1>Time to target: adaptive clipping against the stock Trainer</h1>
<p class="soft">{{ comparison.created }} · {{ comparison.device }} ·
{% for name, version in comparison.versions.items() %}{{ name }} {{ version }}{{ " · " if not loop.last }}{% endfor %}</p>
{% for section in sections %}
<h2>{{ section.heading }}</h2>
<p class="soft">Learning rate {{ section.rate }}, the stock arm's best of {{ section.grid }}.</p>
<div class="scroll"><table>
<tr>{% for label in section.labels %}<th>{{ label }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h3>Eval loss: thin lines are seeds, thick lines medians (drag to zoom, double-click to reset)</h3>
{{ section.curves | safe }}
{% for norms in section.norms %}<h3>Gradient norm, {{ norms.arm }}, seed 0</h3>
<p class="soft">{{ norms.verdict }}</p>
{{ norms.figure | safe }}
{% endfor %}{% endfor %}
<h2>How to read this</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<p>Made by <code>{{ comparison.command }}</code></p>
</body>
</html>
"""


def write_report(comparison: dict[str, Any], output: Path, tuned: dict[str, Tuned]) -> Path:
    """Write `report.html` into the comparison's folder."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    sections = []
    for task in comparison["tasks"]:
        settings = tuned[task["task"]]
        sections.append(
            {
                "heading": heading(task),
                "rate": f"{settings.learning_rate:g}",
                "grid": ", ".join(f"{rate:g}" for rate in sorted({g["learning_rate"] for g in settings.grid})),
                "labels": [task["quality"] if c == "quality" else c for c in COLUMNS],
                "rows": table_rows(task),
                "curves": _embed(plotly_curves(comparison, output, task)),
                "norms": [n for entry in task["arms"] if (n := _norms(output, task["task"], entry)) is not None],
            }
        )
    page = Environment(autoescape=True).from_string(_TEMPLATE)
    text = page.render(comparison=comparison, sections=sections, notes=notes(comparison), plotly_js=get_plotlyjs())
    path = output / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _norms(output: Path, task: str, entry: dict[str, Any]) -> dict[str, Any] | None:
    first = entry["seeds"][0]
    if entry["arm"] == STOCK or not first["ledger"]:
        return None
    path = output / "runs" / task / entry["arm"] / "seed-0" / first["ledger"]["file"]
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    records = [line for line in lines if line["kind"] == "step"]
    return {
        "arm": entry["arm"],
        "verdict": f"Ledger {first['ledger']['summary']}",
        "figure": _embed(plotly_norms(records)),
    }


def _embed(figure: Any) -> str:
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
    )
