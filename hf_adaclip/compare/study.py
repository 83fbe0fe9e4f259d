"""`hf-adaclip compare`: arms and seeds of a training script, to `comparison.json`."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.arms import ARMS, STOCK, SUFFIX, TUNED, Study, is_tuned, untuned
from hf_adaclip.compare.present import MAX_TITLE
from hf_adaclip.compare.runs import MODULE, file_of, run_scripts
from hf_adaclip.compare.summary import COMPARISON_FILE, Judged, summarise
from hf_adaclip.compare.tuning import as_flags, set_target, tune
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near_controller
from hf_adaclip.ledger.schema import plain
from hf_adaclip.telemetry.point import Target

_NAMING: Final = ("--task_name", "--dataset_name", "--dataset_config_name", "--model_name_or_path", "--model_type")
_WORDS: Final = {
    "--learning_rate": "learning rate",
    "--max_grad_norm": "max_grad_norm",
    "--warmup_steps": "warm-up",
    "--adam_beta2": "beta2",
}


def compare_script(*studies: Study) -> dict[str, Any]:
    """Run the comparison, or what is missing of it, and write `comparison.json`.

    Args:
        studies: One for each task; folder, arms, seeds and jobs are those of the first.

    Raises:
        ConfigError: An arm is unknown, the script is not there, or the target cannot be set.
    """
    first = studies[0]
    for study in studies:
        check(study)
    names = [STOCK, *[a for a in first.arms if a != STOCK]]
    judged, runs = [], []
    for study in studies:
        tuned = {arm: tune(study, arm) for arm in names if is_tuned(arm)}
        judged.append(_judged(study, names, tuned))
        runs += [study.run(arm, _flags(study, arm, tuned), seed) for seed in range(first.seeds) for arm in names]
    results = run_scripts(sorted(runs, key=lambda run: run.seed), first.output, **first.pooling)
    comparison = summarise(judged, first.seeds, results, first.command, first.jobs)
    if not first.name:
        comparison["script"] = list(first.script)
    (first.output / COMPARISON_FILE).write_text(json.dumps(plain(comparison), indent=1) + "\n", encoding="utf-8")
    return comparison


def check(study: Study) -> None:
    """Refuse a script that is not there, and unknown arms.

    Raises:
        ConfigError: So it is; all of it is named at once.
    """
    problems = []
    file = file_of(study.script)
    if file is None:
        problems.append(
            f"`-m` must be followed by a module that this Python finds, but is by {''.join(study.script[1:2])!r}."
        )
    elif not file.is_file():
        problems.append(f"`script` must be a file, but {study.script[0]!r} is none.")
    names = list(dict.fromkeys([*ARMS, TUNED, *study.extra]))
    problems += [
        f"`--arms` must be among {', '.join(names)}, or one of these with {SUFFIX!r}, but {arm!r} is not."
        f"{near_controller(arm, names)} `--arm 'NAME=FLAGS'` makes one of your own."
        for arm in study.arms
        if untuned(arm) not in study.known
    ]
    if problems:
        raise ConfigError(problems)


def _flags(study: Study, arm: str, tuned: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    return (*study.flags_of(arm), *(as_flags(tuned[arm]["chosen"]) if arm in tuned else ()))


def _judged(study: Study, names: Sequence[str], tuned: dict[str, dict[str, Any]]) -> Judged:
    """What the study's runs are judged by; a target that is not given is set now."""
    quality = study.quality or study.metric
    target = study.target
    if target is None:
        target = set_target(study, _flags(study, TUNED, tuned) if TUNED in tuned else None)
    return Judged(
        name=study.task,
        title=study.title or _short_title(study.script),
        arms={name: _title(study, name, tuned) for name in names},
        quality=quality.removeprefix("eval_"),
        quality_greater=study.greater if quality == study.metric else quality not in ("eval_loss", "eval_perplexity"),
        quality_of=_quality_of(quality),
        target=Target(study.metric, target, study.greater),
        baseline=_baseline(study, tuned),
        same_data=study.same_data,
    )


def _quality_of(name: str) -> Callable[[dict[str, float]], float | None]:
    """Finds a metric among those of an evaluation; the perplexity follows from the loss."""

    def quality(metrics: dict[str, float]) -> float | None:
        if name == "eval_perplexity" and name not in metrics and "eval_loss" in metrics:
            return math.exp(min(metrics["eval_loss"], 50.0))
        return metrics.get(name)

    return quality


def _title(study: Study, arm: str, tuned: dict[str, dict[str, Any]]) -> str:
    if arm in tuned:
        return f"{untuned(arm)}, tuned: {' '.join(_flags(study, arm, tuned))}"
    return study.known[arm].title


def _short_title(script: Sequence[str]) -> str:
    """The script and what it trains on what, without paths: `run_glue: rte, bert-base-uncased`."""
    named = []
    for position, text in enumerate(script[1:], start=1):
        flag, equals, value = text.partition("=")
        if flag in _NAMING:
            value = value if equals else (script[position + 1] if position + 1 < len(script) else "")
            named += [Path(value).name] if value else []
    stem = script[1] if script[0] == MODULE else Path(script[0]).stem
    title = f"{stem}: {', '.join(dict.fromkeys(named))}" if named else stem
    return title if len(title) <= MAX_TITLE else stem[:MAX_TITLE]


def _baseline(study: Study, tuned: dict[str, dict[str, Any]]) -> str:
    """Who set the target, and how the arms that are tuned were, in sentences."""
    where = (
        "given"
        if study.target is not None
        else "set on other seeds by the " + ("tuned stock arm" if TUNED in tuned else "stock arm")
    )
    text = study.baseline or f"Target {where}. The arm `stock` is the script's flags as they stand."
    if tuned:
        words = ", ".join(_WORDS[flag] for flag in study.coordinates)
        count = len(next(iter(tuned.values()))["tried"])
        text += f" Tuned coordinate by coordinate ({words}; {count} settings on two other seeds): "
        text += "; ".join(f"`{arm}` = {' '.join(_flags(study, arm, tuned))}" for arm in tuned) + "."
    return text
