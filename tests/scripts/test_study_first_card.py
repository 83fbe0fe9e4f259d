"""The first study's card, checked on made-up results, and that the one in the repository is made of the results beside it."""

import json
import math
import shutil

import numpy as np
import pytest

from scripts.docs.readme_section import README, read_section
from scripts.study.card import PACE, main
from scripts.study.first_card import card, goals, section
from scripts.study.plots import draw_curves, draw_ranges
from scripts.study.results import (
    LOSS,
    QUALITY,
    SECONDS,
    STUDY,
    TaskResults,
    interval,
    load_first,
    rates_of_range,
    stable_range,
)
from scripts.study.tasks import TASKS
from scripts.study.tasks_cuda import CUDA_TASKS


def line(arm, seed, losses, *, seconds_per_step=0.1, error=None, alarms=None):
    points = [[10 * (i + 1), (i + 1) * 10 * seconds_per_step, loss, 0.5] for i, loss in enumerate(losses)]
    return {"arm": arm, "seed": seed, "points": points, "error": error, "alarms": alarms, "flags": "--clip x"}


STOCK = [1.0, 0.8, 0.6, 0.5, 0.45]
FASTER = [0.8, 0.5, 0.45, 0.42, 0.4]


@pytest.fixture
def made_up():
    lines = [
        line("target/stock", 100, [1.0, 0.9, 0.7, 0.55, 0.1]),
        line("target/stock", 101, [1.0, 0.8, 0.6, 0.5, 0.1]),
    ]
    lines += [line("stock", seed, STOCK) for seed in range(5)]
    lines += [line("adaptive", seed, STOCK, alarms=[1, 100]) for seed in range(5)]
    lines += [line("adaptive-pace", seed, FASTER, seconds_per_step=0.2) for seed in range(4)]
    lines += [line("adaptive-pace", 4, [2.0, 2.0, math.nan, math.nan, math.nan])]
    lines += [line("pace-only", seed, [], error="exit code 1") for seed in range(5)]
    for rate in rates_of_range(TASKS["cifar-10"]):
        final = {2e-3: 0.5, 4e-3: 0.51}.get(rate, 0.9)
        for seed in (100, 101):
            name = f"learning_rate={rate:g},max_grad_norm=1,warmup_steps=0"
            lines.append(line(f"tuning/tuned/{name}", seed, [final]))
            lines.append(line(f"tuning/adaptive-pace-tuned/{name}", seed, [0.5]))
            lines.append(line(f"tuning/tuned/learning_rate={rate:g},max_grad_norm=0.1,warmup_steps=0", seed, [0.01]))
    return TaskResults(TASKS["cifar-10"], lines)


def test_the_target_is_what_both_other_seeds_reach_within_80_percent(made_up):
    assert made_up.target("stock") == 0.55
    assert made_up.target("tuned") is None


def test_costs_and_ratios_are_paired_and_keep_what_never_arrived(made_up):
    assert made_up.costs("stock", 0.55) == [40.0] * 5
    assert made_up.costs("adaptive-pace", 0.55) == [20.0] * 4 + [math.inf]
    steps = made_up.ratio("adaptive-pace", "stock", 0.55)
    assert steps.ratios == (0.5, 0.5, 0.5, 0.5, math.inf)
    assert steps.median == 0.5
    assert made_up.ratio("adaptive-pace", "stock", 0.55, SECONDS).median == 1.0
    assert made_up.ratio("pace-only", "stock", 0.55).median == math.inf


def test_a_run_that_failed_or_ended_in_nan_is_worst(made_up):
    assert made_up.finals("adaptive-pace")[4] == math.inf
    assert made_up.finals("pace-only") == [math.inf] * 5
    assert made_up.difference("adaptive-pace", "stock").low == math.inf
    assert made_up.difference("adaptive", "stock").mean == 0.0


def test_where_the_baseline_fails_the_arm_is_not_worse():
    lines = [line("stock", 0, [0.5]), line("stock", 1, [], error="x"), line("adaptive", 0, [0.6])]
    r = TaskResults(TASKS["cifar-10"], [*lines, line("adaptive", 1, [0.5])])
    assert r.difference("adaptive", "stock").low == -math.inf
    r = TaskResults(TASKS["cifar-10"], [*lines, line("adaptive", 1, [], error="x")])
    assert r.difference("adaptive", "stock").mean == pytest.approx(0.05)
    assert r.finals("adaptive", QUALITY) == [0.5, -math.inf]
    assert r.finals("adaptive", LOSS) == [0.6, math.inf]


def test_the_share_of_altered_steps(made_up):
    assert made_up.alarms("adaptive") == (5, 500)
    assert made_up.alarms("stock") is None


def test_the_stable_range_is_the_stretch_around_the_best_rate():
    found = stable_range({1.0: 0.6, 2.0: 0.5, 4.0: 0.52, 8.0: 0.9, 16.0: 0.5001})
    assert (found.octaves, found.open_below, found.open_above) == (1.0, False, False)
    found = stable_range({1.0: 0.5, 2.0: 0.5, 4.0: math.inf})
    assert (found.octaves, found.open_below, found.open_above) == (1.0, True, False)
    found = stable_range({1.0: math.inf, 2.0: math.inf})
    assert (found.octaves, found.is_open) == (0.0, False), "where nothing trains there is no range"
    finals = {1.0: 0.6, 2.0: 0.4, 4.0: 0.52, 8.0: 0.9}
    assert [stable_range(finals, best).octaves for best in (None, 0.5, 0.6, 0.1)] == [0.0, 1.0, 2.0, 0.0]


def test_only_runs_without_warm_up_at_threshold_1_make_the_range(made_up):
    found = made_up.range_of("stock")
    assert found is not None
    assert (len(found.finals), min(found.finals.values())) == (9, 0.5)
    assert (found.octaves, found.is_open) == (pytest.approx(1.0), False)
    whole = made_up.range_of("adaptive-pace")
    assert (whole.octaves, whole.is_open) == (pytest.approx(8.0), True)
    assert made_up.range_of("adaptive") is None
    del made_up.runs["tuning/tuned/learning_rate=0.016,max_grad_norm=1,warmup_steps=0", 101]
    assert made_up.range_of("stock") is None, "a grid with gaps says nothing"


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(1.0, 0.5, 200)
    found = interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_the_card_says_what_was_lost(made_up, tmp_path):
    text = card([made_up])
    assert "| 0.50 [0.50, inf] (4/5) |" in text
    assert "**+inf [+inf, +inf]**" in text
    assert "never" in text
    assert "worse on 1 of 1 (cifar-10)" in goals([made_up])
    assert (
        "(`max_pace=64`) | cifar-10 +7 (ours may go on); within 5 % of the *stock* arm's best: cifar-10 +7 | yes |"
        in goals([made_up])
    )
    assert (
        "| 5 of 500 steps after the warm-up over all tasks (1.00%), above 0.1 % on cifar-10 5 of 500 (1.00%)"
        in goals([made_up])
    )
    for draw in (draw_curves, draw_ranges):
        draw([made_up], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 5000


def test_with_nothing_run_nothing_holds():
    lines = [line("stock", 0, STOCK), line("adaptive", 0, STOCK, alarms=[0, 0])]
    results = [TaskResults(TASKS["cifar-10"], lines)]
    verdicts = [row.split("|")[-2].strip() for row in goals(results).splitlines()[2:]]
    assert verdicts == ["no"] * 6
    assert goals(results).count("| not run |") == 5
    assert "1 tasks, 1 seeds" in section(results)
    assert goals([TaskResults(CUDA_TASKS["vit-s16-bf16"], lines)]).count("not run") == 5, "not of the study proper"
    assert "vit-s16-bf16" in card([TaskResults(CUDA_TASKS["vit-s16-bf16"], lines)])


def test_pairs_of_which_neither_arrived_are_shown(made_up):
    made_up.runs["stock", 4] = line("stock", 4, [2.0])
    assert "(4/5, 1 neither)" in card([made_up])


def test_a_folder_of_ones_own_gets_a_card_and_pictures_and_leaves_the_readme(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "`folder` must hold raw results" in capsys.readouterr().err
    shutil.copy(STUDY / "cifar-10.jsonl", tmp_path)
    before = README.read_text(encoding="utf-8")
    main([str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"cifar-10.jsonl", "README.md", "curves.png", "ranges.png"}
    assert README.read_text(encoding="utf-8") == before


def test_results_of_a_gpu_do_not_take_the_place_of_the_first_card(tmp_path):
    shutil.copy(STUDY / "cifar-10.jsonl", tmp_path)
    gpu = {**line("stock", 0, STOCK), "study": 2}
    (tmp_path / "vit-s16-bf16.jsonl").write_text(json.dumps(gpu) + "\n")
    main([str(tmp_path)])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Eight small tasks" in text
    assert "vit-s16-bf16" in text


def test_the_card_and_the_readme_are_those_of_the_raw_results():
    results = load_first()
    assert (STUDY / "README.md").read_text(encoding="utf-8") == card(results)
    assert read_section("study", PACE) == section(results)
