"""The sentence that a comparison leads with, made from its numbers: on the page, the card and the terminal."""

import json
import math
from typing import Any

import numpy as np
import pytest

from hf_adaclip.compare.verdict import verdict, verdicts

N = math.inf


def entry(arm, steps, losses):
    seeds = [
        {"error": None if s is not None else "exit code 1", "step": N if s is None else s, "final_eval_loss": loss}
        for s, loss in zip(steps, losses, strict=True)
    ]
    return {"arm": arm, "seeds": seeds}


def said(*arms, **more):
    task = {"task": "t", "arms": [entry(*arm) for arm in arms]}
    return verdict({"tasks": [task], **more}, task)


STOCK = ("stock", [100, 100, 100], [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        (
            [STOCK, ("adaptive", [70, 72, 68], [0.9, 0.9, 0.9]), ("adaptive-default", [62, 70, 55], [0.92, 0.92, 0.9])],
            "`adaptive-default` reaches the target in 0.62 of the tuned stock Trainer's steps [0.55, 0.70] and ends 0.08 lower; "
            "`adaptive` in 0.70, 0.1 lower (3 seeds).",
        ),
        (
            [("stock", [100], [1.0]), ("adaptive", [130], [1.2])],
            "`adaptive` reaches the target in 1.30 times the tuned stock Trainer's steps and ends 0.2 higher (1 seed).",
        ),
        (
            [STOCK, ("adaptive", [N, N, N], [1.4, 1.4, 1.4])],
            "`adaptive` never reaches the target, which the tuned stock Trainer does, and ends 0.4 higher (3 seeds).",
        ),
        (
            [("stock", [N], [1.0]), ("adaptive-default", [N], [1.0]), ("adaptive", [50], [0.5])],
            "`adaptive-default` never reaches the target, nor does the tuned stock Trainer, and ends level; `adaptive` reaches it, "
            "0.5 lower (1 seed).",
        ),
        (
            [("stock", [N, N], [1.0, 1.0]), ("adaptive", [50, 60], [0.5, 0.5])],
            "`adaptive` reaches the target, which the tuned stock Trainer never does, and ends 0.5 lower (2 seeds).",
        ),
        (
            [("stock", [90, N, 90], [1.0] * 3), ("adaptive", [80, N, N], [0.98] * 3)],
            "`adaptive` reaches the target in 1 of 3 seeds (the tuned stock Trainer in 2) and ends 0.02 lower.",
        ),
        (
            [("stock", [90, N, 90], [1.0] * 3), ("adaptive", [N] * 3, [1.1] * 3), ("median", [50, 60, 70], [0.9] * 3)],
            "`adaptive` never reaches the target (the tuned stock Trainer in 2 of 3 seeds) and ends 0.1 higher; `median` in 3 of 3, "
            "0.1 lower.",
        ),
        (
            [("stock", [100], [1.0]), ("adaptive-default", [N], [1.3]), ("adaptive", [38], [0.88])],
            "`adaptive-default` never reaches the target, which the tuned stock Trainer does, and ends 0.3 higher; `adaptive` in 0.38 of "
            "stock's steps, 0.12 lower (1 seed).",
        ),
        (
            [STOCK, ("adaptive", [70, None, 70], [0.9, N, 0.9])],
            "`adaptive` reaches the target in 0.70 of the tuned stock Trainer's steps [0.70, 0.70] and ends 0.1 lower "
            "(2 of 3 seeds; others failed).",
        ),
        ([STOCK, ("adaptive", [None] * 3, [N] * 3)], "`adaptive` cannot be compared, because runs failed."),
        (
            [STOCK, ("adaptive", [N] * 3, [N] * 3)],
            "`adaptive` never reaches the target, which the tuned stock Trainer does, and diverges (3 seeds).",
        ),
        ([STOCK], ""),
        (
            [STOCK, ("none", [100] * 3, [1.0] * 3)],
            "`none` reaches the target in 1.00 of the tuned stock Trainer's steps [1.00, 1.00] and ends level (3 seeds).",
        ),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_numbers_say(arms, text):
    assert said(*arms) == text
    assert len(text.split()) <= 25


def test_a_script_is_held_against_its_tuned_arm_where_there_is_one():
    ours, tuned = ("adaptive", [60] * 3, [0.9] * 3), ("tuned", [80] * 3, [0.8] * 3)
    assert said(STOCK, ours, script=["t.py"]).startswith(
        "`adaptive` reaches the target in 0.60 of the stock Trainer's steps"
    )
    text = said(STOCK, tuned, ours, script=["t.py"])
    assert text.startswith("`adaptive` reaches the target in 0.75 of the tuned stock Trainer's steps")
    assert "0.1 higher" in text


def test_several_tasks_are_named():
    tasks = [
        {"task": name, "arms": [entry(*STOCK), entry("adaptive", [70] * 3, [0.9] * 3)]} for name in ("one", "two")
    ]
    found = verdicts({"tasks": tasks})
    assert [f.split(" ")[0] for f in found] == ["`one`:", "`two`:"]
    assert not verdicts({"tasks": tasks[:1]})[0].startswith("`one`")


@pytest.fixture
def comparison(tmp_path):
    """A comparison of two arms as it lies on the disk: one that a ledger of both parts stands behind, and the stock Trainer's."""
    from hf_adaclip.compare.summary import Judged, summarise
    from hf_adaclip.ledger.schema import plain
    from hf_adaclip.telemetry.point import Target
    from tests.run.test_shaping import BOTH, run

    results = []
    for arm, speed in (("stock", 1.0), ("adaptive", 2.0)):
        folder = tmp_path / "runs" / "toy" / arm / "seed-0"
        folder.mkdir(parents=True)
        points = [
            {
                **dict.fromkeys(("samples", "tokens", "energy_wh", "energy_source", "energy_measured")),
                "step": step,
                "train_seconds": step / 10,
                "metrics": {"eval_loss": 1 / (1 + speed * step / 20)},
            }
            for step in range(10, 101, 10)
        ]
        result: dict[str, Any] = {"spec": {"task": "toy", "arm": arm, "seed": 0}, "points": points, "device": "cpu"}
        if arm == "adaptive":
            _, _, clipper = run(BOTH.replace(max_pace=8.0), steps=60, ledger=folder / "clip_ledger.jsonl")
            clipper.close()
            result.update(
                clipped=3, skipped=0, ledger={"file": "clip_ledger.jsonl", "verified": True, "summary": "ok"}
            )
        (folder / "result.json").write_text(json.dumps(result))
        results.append(result)
    judged = Judged(
        "toy", "a toy", {"stock": "stock", "adaptive": "ours"}, "loss", False, lambda m: m["eval_loss"],
        Target("eval_loss", 0.4), "Fixed."
    )  # fmt: skip
    found = summarise([judged], 1, results, "hf-adaclip compare", 1)
    return tmp_path, json.loads(json.dumps(plain(found)))


def test_page_card_and_terminal_lead_with_it(comparison, capsys):
    from hf_adaclip.compare.card import write_card
    from hf_adaclip.compare.present import print_tables
    from hf_adaclip.compare.report import write_report

    folder, found = comparison
    words = "reaches the target in 0.67 of the tuned stock Trainer's steps"
    text = write_report(found, folder).read_text()
    assert '<p class="lead"><code>adaptive</code> reaches the target in 0.67 of the tuned stock Trainer&#39;s' in text
    assert text.index('class="lead"') < text.index("<h2>")
    card = write_card(found, folder).read_text()
    assert f"**`adaptive` {words}" in card
    assert card.index(words) < card.index("## ")
    print_tables(found)
    out = capsys.readouterr().out
    assert out.index(words) < out.index("steps vs stock")


def test_the_page_shows_pace_and_altered_energy_of_our_arm(comparison):
    from hf_adaclip.compare.report import write_report

    folder, found = comparison
    text = write_report(found, folder).read_text()
    assert "What adaptive did, seed 0" in text
    assert '<td class="short" data-label="arm">adaptive</td>' in text
    assert ">0.67<" in text.replace("\n", "")  # of one seed there is no interval
    assert text.count('<svg class="chart"') == 4  # curves; norms, pace, what shapes the step
    for name in ("altered energy", "agreeing share", 'aria-label="pace"'):
        assert name in text
    assert len(text) < 60_000


def test_a_figure_of_shares_goes_from_0_to_1_and_is_none_where_nothing_acted():
    from hf_adaclip.report.chart import svg
    from hf_adaclip.report.figures import interactive, shape_chart

    steps = np.arange(10_000)
    nothing = np.full(len(steps), np.nan, np.float32)
    some = nothing.copy()
    some[::4] = 0.2
    assert shape_chart(steps, nothing, nothing) is None
    assert shape_chart(steps, None, None) is None
    chart = shape_chart(steps, some, nothing)
    assert [line.name for line in chart.lines] == ["altered energy"]
    assert chart.limits == (0.0, 1.0)
    assert len(svg(chart)) < 10_000
    assert "points" in svg(chart)
    assert tuple(interactive(chart).layout.yaxis.range) == (0.0, 1.0)
