"""`README.md` of a comparison: a model card that states the question, the rules, and every result, losses as well as wins."""

import math
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.present import heading, markdown_table, notes, seeds_of
from hf_adaclip.compare.verdict import verdicts
from hf_adaclip.errors import LedgerError
from hf_adaclip.ledger.tail import find_tail
from hf_adaclip.report import markdown as md

GRAMS_CO2_PER_WH: Final = 0.48
"""World average of electricity (Ember, Global Electricity Review 2024: 480 g per kWh in 2023)."""

_TASK_TYPES: Final = {"accuracy": "image-classification", "perplexity": "text-generation"}


def write_card(comparison: dict[str, Any], output: Path, path: Path | None = None) -> Path:
    """Write the card, by default as README.md into the comparison's folder."""
    from huggingface_hub import ModelCard

    path = path or output / "README.md"
    text = _body(comparison, output)
    ModelCard(f"---\n{card_metadata(comparison).to_yaml()}\n---\n\n{text}").save(path)
    return path


def card_metadata(comparison: dict[str, Any]) -> Any:
    """Metadata for the Hub, a `huggingface_hub.ModelCardData`: tags, data, every arm's result, and emissions where energy was measured."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for task in comparison["tasks"]:
        for entry in task["arms"]:
            for metric, value in (
                (task["quality"], entry["median_quality"]),
                ("steps to target", entry["median_step"]),
            ):
                missed = metric == "steps to target" and entry["reached"] < len(entry["seeds"])
                if value is None or missed or not math.isfinite(float(value)):
                    continue  # a median over seeds of which some never got there must not stand alone; the table says so
                results.append(
                    EvalResult(
                        task_type=_TASK_TYPES.get(task["quality"], "other"),
                        dataset_type=task["task"],
                        dataset_name=task["title"],
                        metric_type=metric,
                        metric_name=f"{metric}, median of {seeds_of(comparison)}, arm {entry['arm']}",
                        metric_value=round(float(value), 6),
                    )
                )
    # Of a script of somebody's own nothing is known of its language, nor under which terms its numbers go.
    known = {} if comparison.get("script") else {"license": "apache-2.0", "language": "en"}
    data = ModelCardData(
        model_name="hf_adaclip comparison",
        library_name="transformers",
        **known,
        datasets=[task["task"] for task in comparison["tasks"]],
        tags=["hf_adaclip", "gradient-clipping", "time-to-convergence"],
        eval_results=results or None,
    )
    energy = comparison["energy"]
    if energy is not None and energy["measured"]:
        spent = [row["energy_wh"] for t in comparison["tasks"] for e in t["arms"] for row in e["seeds"]]
        total = sum(float(wh) for wh in spent if wh is not None and math.isfinite(float(wh)))
        data.co2_eq_emissions = {
            "emissions": round(total * GRAMS_CO2_PER_WH, 3),
            "source": f"energy to target measured by {energy['source']}, at the world average of 480 g CO2 per kWh",
            "training_type": "pre-training",
            "hardware_used": comparison["device"],
        }
    return data


def _body(comparison: dict[str, Any], output: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    made = f"{comparison['created']}, {comparison['device']}, {versions}"
    parts = [
        "# Time to target: adaptive clipping against the stock Trainer",
        *(f"**{md.prose(sentence)}**" for sentence in verdicts(comparison)),
        "Does replacing the static `max_grad_norm` of `transformers.Trainer` by an adaptive controller reach the same eval loss "
        "sooner? Same data order and initial weights, seed by seed.",
        "![curves](curves.png)",
    ]
    for task in comparison["tasks"]:
        parts += [
            f"## {md.text(heading(task))}",
            f"{md.prose(str(task.get('baseline', '')))} Arms:",
            "\n".join(f"- {md.code(entry['arm'])}: {md.prose(entry['title'])}" for entry in task["arms"]),
            markdown_table(task),
            _every_seed(task),
        ]
    ledgers = [
        [md.text(v) for v in (task["task"], entry["arm"], row["seed"], row["ledger"]["summary"])]
        + [_seal(output, task, entry, row)]
        for task in comparison["tasks"]
        for entry in task["arms"]
        for row in entry["seeds"]
        if row["ledger"]
    ]
    parts += [
        "## Rules",
        "\n".join(f"- {md.prose(note)}" for note in notes(comparison)),
        "## Ledgers",
        md.table(["task", "arm", "seed", "`hf-adaclip verify`", "last seal"], ledgers),
        "## Reproduce",
        md.block(comparison["command"]),
        f"{md.text(made)}. The raw numbers are in `comparison.json`, the runs in `runs/`.",
    ]
    return "\n\n".join(parts) + "\n"


def _every_seed(task: dict[str, Any]) -> str:
    rows = []
    for entry in task["arms"]:
        for row in entry["seeds"]:
            steps = "never" if not row["reached"] else str(row["step"])
            loss = f"{float(row['final_eval_loss']):.4f}"
            rows.append(
                [md.text(entry["arm"]), md.text(row["seed"]), md.text(steps), loss, md.text(row["error"] or "")]
            )
    return md.table(["arm", "seed", "steps to target", "final eval loss", "error"], rows)


def _seal(output: Path, task: dict[str, Any], entry: dict[str, Any], row: dict[str, Any]) -> str:
    """Hash of the ledger's last seal: a ledger with this hash at its end is the one that the card speaks of."""
    path = output / "runs" / task["task"] / entry["arm"] / f"seed-{row['seed']}" / row["ledger"]["file"]
    try:
        return f"`{find_tail(path).sha256}`"
    except (OSError, LedgerError):
        return "-"
