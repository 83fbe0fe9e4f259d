"""`README.md` of a comparison: a model card that states the question, the rules, and every result, losses as well as wins."""

from pathlib import Path
from typing import Any

from hf_adaclip.convergence.present import heading, markdown_table, notes
from hf_adaclip.convergence.tuning import Tuned


def write_card(comparison: dict[str, Any], output: Path, tuned: dict[str, Tuned]) -> Path:
    """Write the card into the comparison's folder."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        tags=["hf_adaclip", "gradient-clipping", "time-to-convergence"],
    )
    path = output / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(comparison, tuned)}").save(path)
    return path


def _body(comparison: dict[str, Any], tuned: dict[str, Tuned]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    parts = [
        "# Time to target: adaptive clipping against the stock Trainer",
        "Does replacing the static `max_grad_norm` of `transformers.Trainer` by an adaptive controller reach the same eval loss "
        "sooner? Same data order and initial weights, seed by seed.",
        "![curves](curves.png)",
    ]
    for task in comparison["tasks"]:
        settings = tuned[task["task"]]
        rates = ", ".join(f"{rate:g}" for rate in sorted({g["learning_rate"] for g in settings.grid}))
        parts += [
            f"## {heading(task)}",
            f"Learning rate {settings.learning_rate:g}: the stock arm's best of {rates} on other seeds. Arms:",
            "\n".join(f"- `{entry['arm']}`: {entry['title']}" for entry in task["arms"]),
            markdown_table(task),
            _every_seed(task),
        ]
    ledgers = [
        f"| {task['task']} | {entry['arm']} | {row['seed']} | {row['ledger']['summary']} |"
        for task in comparison["tasks"]
        for entry in task["arms"]
        for row in entry["seeds"]
        if row["ledger"]
    ]
    parts += [
        "## Rules",
        "\n".join(f"- {note}" for note in notes(comparison)),
        "## Ledgers",
        "\n".join(["| task | arm | seed | `hf-adaclip verify` |", "| --- | --- | --- | --- |", *ledgers]),
        "## Reproduce",
        f"```\n{comparison['command']}\n```",
        f"{comparison['created']}, {comparison['device']}, {versions}. The raw numbers are in `comparison.json`, the runs in `runs/`.",
    ]
    return "\n\n".join(parts) + "\n"


def _every_seed(task: dict[str, Any]) -> str:
    lines = ["| arm | seed | steps to target | final eval loss | error |", "| --- | --- | --- | --- | --- |"]
    for entry in task["arms"]:
        for row in entry["seeds"]:
            steps = "never" if not row["reached"] else row["step"]
            lines.append(
                f"| {entry['arm']} | {row['seed']} | {steps} | {float(row['final_eval_loss']):.4f} | {row['error'] or ''} |"
            )
    return "\n".join(lines)
