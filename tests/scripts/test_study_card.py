"""The study's card on made-up results: every goal says yes or no, the tuned Trainer stands beside ours, and what is foreign is marked."""

import json
import math
import re
from dataclasses import replace

import pytest

from hf_adaclip.controllers.adaptive import AdaptiveController
from scripts.docs.readme_section import read_section
from scripts.study import card as study_card
from scripts.study.arms import ARMS
from scripts.study.card import card, main, section, unexplained
from scripts.study.goals import verdicts
from scripts.study.records import STUDY_NUMBER, key
from scripts.study.results import SECONDS, STEP, STUDY_ANEW, TaskResults, load_study, rates_of_range, same_points
from scripts.study.tables import against
from scripts.study.tasks import TASKS

STOCK = [1.0, 0.8, 0.6, 0.5, 0.45]
TUNED = [0.8, 0.5, 0.45, 0.42, 0.4]
FASTER = [0.5, 0.42, 0.4, 0.39, 0.38]
UNTUNED = "max_grad_norm=1,warmup_steps=0"


def line(arm, seed, losses, *, seconds_per_step=0.1, **more):
    points = [[10 * (i + 1), (i + 1) * 10 * seconds_per_step, loss, 0.5] for i, loss in enumerate(losses)]
    entry = {"study": STUDY_NUMBER, "arm": arm, "seed": seed, "points": points, "error": None, "flags": "--clip x"}
    return {**entry, "alarms": None, "departures": None, **more}


def lines_of(task, *, tuned_arm=FASTER, default=TUNED, short=None, cost=1.1, seeds=5):
    """Results of a task in which the default is as good as the tuned Trainer, and the tuned default sooner."""
    found = [
        line(f"target/{arm}", s, losses) for arm, losses in (("stock", STOCK), ("tuned", TUNED)) for s in (100, 101)
    ]
    for seed in range(seeds):
        found += [line("stock", seed, STOCK), line("tuned", seed, TUNED), line("adaptive", seed, default)]
        found += [line("guard", seed, STOCK, departures=0), line("adaptive@tuned", seed, TUNED)]
        found.append(line("adaptive-tuned", seed, tuned_arm))
        found.append(line("adaptive-tuned~72", seed, short or TUNED))
        found.append(line("spectral-agreement", seed, FASTER, seconds_per_step=0.1 * cost))
    for rate in rates_of_range(task):
        for seed in (100, 101):
            name = f"adam_beta2=0.999,learning_rate={rate:g},{UNTUNED}"
            found.append(line(f"tuning/tuned/{name}", seed, [0.5 if rate == task.rates[2] else 0.9]))
            found.append(line(f"tuning/adaptive-tuned/{name}", seed, [0.5 if rate in task.rates else 0.9]))
            found.append(line(f"tuning/tuned/{name.replace('0.999', '0.95')}", seed, [0.01]))
    return found


def study(names=("cifar-10", "mrpc"), **how):
    return [TaskResults(TASKS[name], lines_of(TASKS[name], **how)) for name in names]


def test_every_goal_is_met_where_it_is():
    found = verdicts(study())
    assert {name: verdict.word for name, verdict in found.items()} == dict.fromkeys(found, "yes")
    assert "10 of 10 runs in which nothing happened" in found["guard"].measured


@pytest.mark.parametrize(
    ("how", "missed"),
    [
        ({"default": [1.0, 0.8, 0.6, 0.5, 0.6]}, {"no_harm", "sooner", "untuned"}),
        ({"tuned_arm": TUNED}, {"scratch", "fine_tuning", "moonshot"}),
        ({"short": STOCK}, {"horizon"}),
        ({"cost": 1.4}, {"cost"}),
    ],
)
def test_a_goal_that_is_missed_says_no_and_where(how, missed):
    found = verdicts(study(**how))
    assert {name for name, verdict in found.items() if verdict.word == "no"} == missed
    assert all(verdict.holds for name, verdict in found.items() if name not in missed)
    assert all(
        "cifar-10" in found[name].measured for name in missed & {"no_harm", "untuned", "horizon", "cost", "scratch"}
    )


def test_what_was_not_run_is_neither_yes_nor_no():
    found = verdicts([TaskResults(TASKS["cifar-10"], [line("stock", 0, STOCK)])])
    assert {verdict.word for verdict in found.values()} == {"not run"}
    assert {verdict.word for verdict in verdicts([]).values()} == {"not run"}


def test_the_card_and_the_readme_are_those_of_the_raw_results():
    results = load_study(STUDY_ANEW)
    assert (STUDY_ANEW / "README.md").read_text(encoding="utf-8") == card(results)
    assert read_section("study") == section(results)


def test_without_a_search_of_its_own_the_default_is_judged_at_the_settings_of_the_tuned_trainer():
    left_out = ("adaptive-tuned", "adaptive-tuned~72", "adaptive@tuned", "spectral-agreement")
    lines = [x for x in lines_of(TASKS["cifar-10"]) if x["arm"] not in left_out]
    for seed in range(5):
        lines.append(line("adaptive@tuned", seed, FASTER, seconds_per_step=0.14))
        lines.append(line("adaptive@tuned~72", seed, STOCK))
    found = verdicts([r := TaskResults(TASKS["cifar-10"], lines)])
    assert found["scratch"].measured.startswith("`adaptive@tuned` 0.50 over 1 tasks")
    assert found["scratch"].word == "yes"
    assert (found["horizon"].word, found["cost"].word) == ("no", "no")
    assert "| default at its settings / tuned |" in section([r])


def test_a_run_that_failed_is_no_success():
    results = study(("cifar-10",))
    results[0].runs["adaptive", 4] = line("adaptive", 4, [], error="exit code 1")
    results[0].runs["adaptive", 3] = line("adaptive", 3, [2.0, math.nan, math.nan, math.nan, math.nan])
    found = verdicts(results)
    assert found["no_harm"].word == "no"
    assert "+inf" in card(results)


def test_a_guard_run_that_is_not_the_stock_run_is_named():
    results = study(("cifar-10",))
    results[0].runs["guard", 3] = line("guard", 3, [*STOCK[:-1], 0.4500001], departures=0)
    assert verdicts(results)["guard"] == (
        "4 of 5 runs in which nothing happened have the stock run's evaluations; not cifar-10 3",
        False,
    )
    results[0].runs["guard", 3]["departures"] = 2
    assert verdicts(results)["guard"].holds
    assert same_points(line("a", 0, STOCK), line("b", 0, STOCK, seconds_per_step=9.0))


def test_tasks_where_the_stock_range_has_no_end_cannot_tell():
    results = study(("cifar-10",))
    for (arm, _), run in results[0].runs.items():
        if arm.startswith("tuning/tuned/"):
            run["points"][0][2] = 0.5
    assert verdicts(results)["wider"].word == "no"
    assert "stock may go on" in verdicts(results)["wider"].measured


def test_the_range_is_without_warm_up_at_the_usual_beta2():
    [r] = study(("cifar-10",))
    assert r.range_of("stock").octaves == 0.0
    assert r.range_of("adaptive").octaves == pytest.approx(4.0)
    assert r.tuning_runs("tuned") == 2 * 2 * len(r.task.rates), "the range's own rates are none of the tuning"


def test_the_tuned_trainer_and_the_horizon_stand_in_the_tables():
    text, readme = card(study()), section(study())
    assert "| task | `tuned` | `adaptive` |" in text
    assert "| task | tuned ends at | `tuned~72` |" in text
    assert "| cifar-10 | 0.400, 50.0% | - | - | +0.000 [+0.000, +0.000] |" in text
    assert "| task | tuned / as it comes | default / as it comes | default tuned / tuned |" in readme
    assert "0.50 from scratch and 0.50 on fine-tuning of the tuned Trainer's steps are the medians." in readme
    assert "10 of 10 runs of the untuned default reach the *tuned* Trainer's target." in readme


def test_seconds_are_compared_only_where_they_were_measured_alike():
    [r] = study(("cifar-10",))
    for (arm, _), run in r.runs.items():
        run["clock"], run["jobs"] = "cpu", 2 if arm in ("stock", "target/stock", "spectral-agreement") else 1
    assert r.step_ratio("spectral-agreement") == pytest.approx(1.1)
    assert r.step_ratio("adaptive") is None
    target = r.target("stock")
    assert against(r, "adaptive", "stock", STEP) != "-"
    assert against(r, "adaptive", "stock", SECONDS) == "-"
    assert r.ratio("spectral-agreement", "stock", target, SECONDS).ratios
    with pytest.raises(ValueError, match="must pair up"):
        r.ratio("adaptive", "stock", target, SECONDS)
    r.runs["adaptive", 0]["jobs"] = 2
    assert len(r.ratio("adaptive", "stock", target, SECONDS).ratios) == 1
    assert "processor time" in card([r])
    assert "Runs were made 1 or 2 at a time." in card([r])


def test_what_the_tuning_chose_says_where_the_grid_ended():
    [r] = study(("cifar-10",))
    for arm, rate in (("tuned", r.task.rates[-1]), ("adaptive-tuned", r.task.rates[1])):
        r.runs[arm, 0]["flags"] = (
            f"--clip x --max_grad_norm 1 --warmup_steps 0 --adam_beta2 0.99 --learning_rate {rate:g}"
        )
    text = card([r])
    assert "| 0.008, 1, 0, 0.99 (20 runs, rate at an end of the grid) | 0.001, 1, 0, 0.99 (10 runs) |" in text


def test_several_epochs_show_the_lowest_loss_and_the_last():
    results = study(("sst-2-epochs", "mrpc"), default=[0.9, 0.5, 0.4, 0.6, 0.7])
    part = card(results).split("### Several epochs")[1].split("###")[0]
    assert "| sst-2-epochs | 0.450 to 0.450 | 0.400 to 0.400 | 0.400 to 0.700 |" in part
    assert "mrpc" not in part


def test_a_missed_goal_without_a_reason_is_named(tmp_path, monkeypatch):
    given = study_card.TEMPLATE.read_text(encoding="utf-8")
    template = tmp_path / "card.template.md"
    monkeypatch.setattr(study_card, "TEMPLATE", template)
    template.write_text(re.sub(r"cost_holds \|[^|]*\|", "cost_holds | - |", given), encoding="utf-8")
    assert [goal[:2] for goal in unexplained(card(study(cost=1.4)))] == ["6."]
    template.write_text(re.sub(r"cost_holds \|[^|]*\|", "cost_holds | small steps |", given), encoding="utf-8")
    assert not unexplained(card(study(cost=1.4)))
    assert "| no | small steps |" in card(study(cost=1.4))
    assert "small steps" not in card(study())


def test_what_another_revision_or_other_settings_made_is_marked(tmp_path):
    task, now = TASKS["cifar-10"], AdaptiveController.revision
    flags = {"stock": "--clip stock", "adaptive": "--clip adaptive", "guard": " ".join(ARMS["guard"].flags)}
    lines = [line(arm, 0, STOCK, task=task.name, flags=text) for arm, text in flags.items()]
    lines = [{**made, "key": key(task, made), "revision": None if made["arm"] == "stock" else now} for made in lines]

    def load():
        (tmp_path / "cifar-10.jsonl").write_text("".join(json.dumps(made) + "\n" for made in lines))
        return load_study(tmp_path)

    assert load()[0].foreign == {}
    assert "would be other ones" not in card(load())
    lines[1]["revision"] = now + 1
    lines[2]["flags"] = "--clip adaptive:max_pace=2"
    assert load()[0].foreign == {f"of revision {now + 1} (now {now})": 1, "of other settings": 1}
    assert f"2 of 3 runs would be other ones today: 1 of other settings, 1 of revision {now + 1} (now {now})." in card(
        load()
    )


def test_a_new_revision_makes_recorded_runs_foreign(tmp_path, monkeypatch):
    task = TASKS["cifar-10"]
    made = line("adaptive", 0, STOCK, flags="--clip adaptive", revision=None)
    made["key"] = key(task, made)
    stock = {**line("stock", 0, STOCK, flags="--clip stock"), "revision": None}
    stock["key"] = key(task, stock)
    monkeypatch.setattr(AdaptiveController, "revision", AdaptiveController.revision + 1)
    (tmp_path / "cifar-10.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (made, stock)))
    assert load_study(tmp_path)[0].foreign == {"of other settings": 1}


def test_the_card_of_a_folder_that_the_new_study_has_begun_is_the_new_one(tmp_path, capsys, monkeypatch):
    template = tmp_path.parent / f"{tmp_path.name}.template.md"
    text = study_card.TEMPLATE.read_text(encoding="utf-8")
    template.write_text(re.sub(r"(\$moonshot_holds \|)[^|]*\|", r"\1 - |", text), encoding="utf-8")
    monkeypatch.setattr(study_card, "TEMPLATE", template)
    task = TASKS["mrpc"]
    for made in lines_of(task, tuned_arm=TUNED):
        with (tmp_path / "mrpc.jsonl").open("a") as file:
            file.write(json.dumps(made) + "\n")
    main([str(tmp_path)])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 3c. From scratch, in 0.72 of the steps" in text
    assert "No reason is given for a goal that is missed: 3d." in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"mrpc.jsonl", "README.md", "curves.png", "ranges.png"}


def test_tasks_of_a_gpu_do_not_count():
    [r] = study(("cifar-10",), cost=1.4)
    r.task = replace(r.task, group="gpu")
    assert {verdict.word for verdict in verdicts([r]).values()} == {"not run"}
