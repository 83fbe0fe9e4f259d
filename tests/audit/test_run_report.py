"""`hf-adaclip report` of a run: as a page in a real browser, as Markdown, PNG and JSON; live in TensorBoard."""

import csv
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer, LedgerError
from hf_adaclip.cli import main
from hf_adaclip.controllers import Reason
from hf_adaclip.report.run_report import answer, clipping_section, load_run, summary, write_html, write_markdown
from tests.audit.test_ledger import CONFIG, write_run
from tests.integrations.trainers import arguments, build, run
from tests.loops import make, train

CHROMIUM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)


def open_in_browser(page, tmp_path):
    """The page's DOM after its scripts have run, and what they wrote to the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--v=0",
    ]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def write_interesting_run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG.replace(max_pace=2.0, max_edge=1.9)
    write_run(folder / "clip_ledger.jsonl", config, steps=120, faults={60: 90.0, 80: float("nan")})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("interactive", [False, True])
def test_the_page_works_in_a_browser_and_shows_a_hostile_name_as_text(tmp_path, interactive):
    folder = write_interesting_run(tmp_path / "<script>alert(1)<b>&\"'")
    flags = ["--interactive"] if interactive else []
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html"), *flags]) == 0
    dom, console = open_in_browser(tmp_path / "page.html", tmp_path)

    assert console == []
    drawn = 'class="main-svg"' if interactive else '<svg class="chart"'
    # Norms, phases, pace, loss: drawn, not only asked for.
    assert len(re.findall(drawn, dom)) >= (4 * 2 if interactive else 4)
    assert "<script>alert(1)" not in dom
    assert "&lt;script&gt;alert(1)&lt;b&gt;" in dom
    assert (tmp_path / "page.html").stat().st_size < (6_000_000 if interactive else 150_000)
    assert re.search(r"verified\. 120 steps", dom)
    assert "The norm left the range upward" in dom


def test_the_page_is_self_contained_and_complete(tmp_path):
    folder = write_interesting_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)

    assert not re.findall(r'(?:src|href)="(?!data:)', outside)
    for piece in (
        "Gradient norm and threshold",
        "Phases",
        "Pace",
        "Training loss",
        "Adjustments",
        "Settings",
        "Reasons",
        "warmup_observations",
        "Yes: clipping scaled down",
        Reason.SPIKE.sentence,
        "torch",
    ):
        assert piece in outside


@pytest.mark.parametrize("form", ["md", "png", "json"])
def test_other_formats(tmp_path, form, capsys):
    folder = write_interesting_run(tmp_path / "run")
    assert main(["report", str(folder / "clip_ledger.jsonl"), "--format", form]) == 0
    path = folder / f"report.{form}"
    assert capsys.readouterr().out.strip() == str(path)
    if form == "json":
        content = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))
        assert content["verified"] is True
        assert content["left_out"] == 1
        assert content["largest_pace"] > 1
        assert {e["kind"] for e in content["events"]} >= {"spike", "skipped", "widened", "pace_raised"}
    elif form == "md":
        assert "| 60 | spike |" in path.read_text()
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_short_run_and_a_tampered_one(tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    write_run(short / "clip_ledger.jsonl", steps=10, faults={})
    assert main(["report", str(short)]) == 0
    bad = tmp_path / "bad"
    bad.mkdir()
    ledger = (short / "clip_ledger.jsonl").read_bytes()
    (bad / "clip_ledger.jsonl").write_bytes(re.sub(rb'"norm":[\d.]+', b'"norm":1.5', ledger, count=1))
    assert main(["report", str(bad)]) == 0
    text = (bad / "report.html").read_text()

    assert "NOT verified" in text
    assert "VIOLATION" in text


def test_a_resumed_run_is_one_run(tmp_path):
    path = tmp_path / "clip_ledger.jsonl"
    write_run(path, steps=30, clean=False)
    write_run(path, steps=45)
    report = load_run(path)

    assert len(report.series) == 45
    assert 30 <= max(e.until for e in report.events) <= 44
    assert report.repeated == 30
    assert [e.step for e in report.events if e.kind == "spike"].count(20) == 1


@pytest.mark.slow
def test_a_comparison_is_reported_too(tmp_path):
    quick = ["--steps", "4", "--seeds", "1", "--tasks", "digits-vit", "--arms", "stock,adaptive", "--jobs", "1"]
    assert main(["compare", "--output", str(tmp_path), *quick, "--json"]) == 0
    for form in ("html", "md", "png", "json"):
        assert main(["report", str(tmp_path), "--format", form]) == 0
        assert (tmp_path / f"report.{form}").stat().st_size > 200


def test_what_holds_neither_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "must hold comparison.json or clip_ledger.jsonl" in capsys.readouterr().err
    with pytest.raises(LedgerError):
        load_run(tmp_path / "missing.jsonl")


def test_a_million_steps_stay_a_page(tmp_path):
    from hf_adaclip.report.chart import svg
    from hf_adaclip.report.figures import interactive, norms_chart

    n = 1_000_000
    steps, values = np.arange(n), np.exp(0.1 * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    values[777_777] = 500.0
    coefficients = np.ones(n, np.float32)
    coefficients[777_777] = 0.01
    chart = norms_chart(steps, values, np.full(n, 2.0, np.float32), coefficients, np.array([5]))

    figure = interactive(chart)
    for line, mark in ((chart.lines[0], chart.marks[0]), (figure.data[0], figure.data[2])):
        assert len(line.x) <= 4000
        assert 777_777 in line.x
        assert mark.x[0] == 777_777
    assert len(figure.to_json()) < 1_000_000
    assert len(svg(chart)) < 60_000


@pytest.mark.slow
def test_live_in_trackio(tmp_path):
    pytest.importorskip("trackio")
    code = (
        "from tests.integrations.trainers import arguments, build, run\n"
        "from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer\n"
        f"args = arguments({str(tmp_path)!r}, report_to=['trackio'], trackio_space_id=None, project='p', run_name='r', logging_steps=5)\n"
        f"run(build(AdaptiveClipTrainer, {str(tmp_path)!r}, args=args, clip=AdaptiveClipConfig(warmup_observations=10)))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, timeout=300)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    logged = [row for row in rows if "train/clip/threshold" in row]

    assert len(logged) == 8
    assert logged[0]["train/clip/phase"] == "warmup"
    assert {"train/clip/fraction", "train/clip/pace", "train/clip/skipped", "train/clip/coefficient"} <= set(logged[0])


def test_live_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, report_to=["tensorboard"], logging_steps=5)
    build_and_run = build(AdaptiveClipTrainer, tmp_path, args=args, clip=AdaptiveClipConfig(warmup_observations=10))
    run(build_and_run)
    folder = next(tmp_path.glob("**/*tfevents*")).parent
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = events.Tags()["scalars"]

    for name in ("clip/threshold", "clip/coefficient", "clip/fraction", "clip/pace", "clip/skipped"):
        tag = next(t for t in scalars if t.endswith(name))
        assert len(events.Scalars(tag)) == 8
    texts = [t for t in events.Tags()["tensors"] if "clip/phase" in t]
    assert len(texts) == 1
    phases = [e.tensor_proto.string_val[0].decode() for e in events.Tensors(texts[0])]
    assert phases[0] == "warmup"
    assert set(phases[3:]) <= {"stable", "unstable", "vanishing", "held"}


def test_steps_that_were_done_again_count_once(tmp_path):
    path = tmp_path / "clip_ledger.jsonl"
    model, optimizer = make()
    config = CONFIG.replace(ledger=str(path))
    first = AdaptiveClipper(config, optimizer=optimizer)
    clip = lambda clipper: lambda m, loss: clipper.clip_(m.parameters(), loss=loss)  # noqa: E731
    train(model, optimizer, clip(first), 100)
    first.save_state(tmp_path)
    train(model, optimizer, clip(first), 2, start=100)  # lost in a crash after this
    first.close(clean=False)
    second = AdaptiveClipper(config, optimizer=optimizer)
    assert second.load_state(tmp_path)
    train(model, optimizer, clip(second), 100, start=100)
    second.close()
    report = load_run(path)
    text = write_markdown(report, tmp_path / "r.md").read_text()

    assert report.verdict.steps == 202
    assert (len(report.series), report.repeated, second.statistics.steps) == (200, 2, 200)
    assert "| steps | 200 (2 done again after a resumption, counted once) |" in text
    assert "The run has 200 steps: 2 were done again" in text
    assert summary(report)["steps"] == 200


@pytest.mark.parametrize(
    ("config", "faults", "start"),
    [
        ({"static_threshold": 1e3}, {5: 1.0}, "No: clipping left all 60 gradients as they were"),
        ({"static_threshold": 1e3}, {40: 90.0}, "Yes: clipping scaled down 1 of 60 gradients (1.7%)"),
        (
            {"static_threshold": 1e3},
            {40: math.nan},
            "Yes: clipping scaled down 0 of 60 gradients (0.0%), and left out 1 step (1 not",
        ),
        ({"static_threshold": 1e3, "on_spike": "skip"}, {40: 90.0}, "and left out 1 step (0 not finite)"),
        ({"static_threshold": 1e-3, "shadow": True}, {40: 90.0}, "Shadow run: the static threshold 0.001 was applied"),
    ],
)
def test_the_first_sentence_answers_whether_clipping_did_anything(tmp_path, config, faults, start):
    write_run(tmp_path / "clip_ledger.jsonl", CONFIG.replace(max_edge=1.9, **config), steps=60, faults=faults)
    report = load_run(tmp_path)
    assert start in answer(report)
    for write in (write_html, write_markdown):
        assert start.split("(")[0] in write(report, tmp_path / "r").read_text()


def test_changed_settings_come_first_and_the_rest_is_folded(tmp_path):
    folder = write_interesting_run(tmp_path / "run")
    text = write_html(load_run(folder), tmp_path / "r.html").read_text()
    settings = text[text.index("<h2>Settings") :]
    changed, rest = settings.split("<details>")

    decided = ("spectral_width", "agreement")  # by what was known when the clipper was made
    for name in ("warmup_observations", "ceiling_share", "ring_capacity", "max_pace", "max_edge", *decided):
        assert name in changed
        assert name not in rest
    assert changed.count('<tr class="marked">') == 7
    assert "min_far_width" in rest


def test_the_axis_reads_in_order():
    from hf_adaclip.report.chart import Chart, Line, linear_ticks, log_ticks, svg

    assert log_ticks(0.3, 400) == [1, 10, 100]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]
    for low, high in ((1e-8, 1e8), (3.1, 3.2), (0.99, 1.01), (1e-30, 1e30), (5.0, 5.1)):
        for ticks in (log_ticks(low, high), linear_ticks(low, high)):
            assert ticks == sorted(set(ticks))
            assert 2 <= len(ticks) <= 9
    line = Line([0, 1, 2], [1.0, math.nan, 1e9], "<b>", "norm")
    for chart in (
        Chart("x", "y", [line], log=True),
        Chart("x", "y"),
        Chart("x", "y", [Line([], [], "a", "norm")], log=True),
    ):
        drawn = svg(chart)
        assert "nan" not in drawn
        assert "<b>" not in drawn.replace("<b class", "")


def test_good_and_bad_are_not_told_by_colour_alone_nor_is_unstable_green():
    from hf_adaclip.controllers.base import PHASES
    from hf_adaclip.report.chart import PHASE_COLOURS

    assert set(PHASE_COLOURS) == set(PHASES)
    assert PHASE_COLOURS["unstable"] == PHASE_COLOURS["trouble"] == "cut"
    assert PHASE_COLOURS["stable"] not in ("cut", "threshold", "out")


def test_the_adjustments_as_csv(tmp_path, capsys):
    folder = write_interesting_run(tmp_path / "run")
    assert main(["report", str(folder), "--format", "csv"]) == 0
    rows = list(csv.DictReader((folder / "report.csv").open()))

    assert {r["quantity"] for r in rows} == {"norm", "threshold", "pace"}
    assert next(r for r in rows if r["kind"] == "spike" and r["step"] == "60")["code"] == "SPIKE"


def test_the_card_says_threshold_pace_and_effective_rate(tmp_path):
    folder = write_interesting_run(tmp_path / "run")
    section = clipping_section(load_run(folder), "abc", learning_rate=1e-3)
    pace = summary(load_run(folder))["largest_pace"]

    assert "| max_grad_norm | 1 |" in section
    assert "| max_pace | 2.0 |" in section
    write_run(tmp_path / "z" / "clip_ledger.jsonl", AdaptiveClipConfig(controller="zscore"))
    assert "pace |" not in clipping_section(load_run(tmp_path / "z"), "abc")
    assert (
        f"| effective learning rate | at most {1e-3 * pace:.3g}: the given 0.001 times a pace of at most {pace:.3g} |"
        in section
    )
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 101, "learning_rate": 5e-4}, {"loss": 1, "step": 2}]})
    )
    report = load_run(folder)
    assert report.series.paces is not None
    rate = 5e-4 * float(report.series.paces[100])
    assert summary(report)["effective_rate"] == pytest.approx(rate)
    assert f"at most {rate:.3g} in a logged step" in clipping_section(report, "abc")


@pytest.mark.parametrize("name", ["a: b", "x|y", "$a$ <b>", "`c`"])
def test_any_folder_name_will_do(tmp_path, name):
    folder = write_interesting_run(tmp_path / name)
    for form in ("html", "md", "png", "json", "csv"):
        assert main(["report", str(folder), "--format", form]) == 0
    assert "verified. 120 steps" in (folder / "report.html").read_text()
    assert ": verified" not in clipping_section(load_run(folder), "abc").replace("Ledger: verified", "")


def test_a_few_words_stay_on_one_line_and_code_is_code(tmp_path):
    from hf_adaclip.report import page

    rows = [["1", "threshold 1 -> 2", "Why."]]
    parts = [
        page.table(["steps", "change", "why"], rows, words=["why"], short=["change"]),
        page.text("The arm `<b>` is it."),
        page.text("A ` alone."),
    ]
    shown = page.write_page(tmp_path / "p.html", "t", "s", parts).read_text()
    assert '<td class="short" data-label="change">threshold 1 -&gt; 2</td>' in shown
    assert '<td class="words" data-label="why">' in shown
    assert "The arm <code>&lt;b&gt;</code> is it." in shown
    assert "A ` alone." in shown


@pytest.mark.parametrize(
    ("losses", "log"),
    [
        ([2.0, 2.1, 1.9, 800.0, 2.0], True),
        ([2.0, 2.1, float("nan"), 800.0, 2.0], True),
        ([2.0, 2.1, 1.9, 30.0, 2.0], False),
        ([0.0, 2.1, 1.9, 800.0, 2.0], False),
        ([float("nan")], False),
    ],
)
def test_a_spike_of_the_loss_does_not_flatten_the_rest(losses, log):
    from hf_adaclip.report.chart import svg
    from hf_adaclip.report.figures import line_chart, spans_decades

    values = np.array(losses)
    assert spans_decades(values) is log
    chart = line_chart(np.arange(len(values)), values, "training loss", "loss", log=spans_decades(values))
    assert (", log axis" in svg(chart)) is log


def test_a_linear_axis_is_not_called_a_log_axis():
    from hf_adaclip.report.chart import svg
    from hf_adaclip.report.figures import line_chart

    chart = line_chart(np.arange(3), np.array([0.0, 1.0, 2.0]), "norm", "norm", log=True)
    assert "log axis" not in svg(chart)


def write_shaped_run(folder, steps=120, **changes):
    """A run with pace, spectral range and sign agreement; `overfits` tells it, at step 80, that the data is learned by heart."""
    from tests.run.test_shaping import BOTH, run

    folder.mkdir(parents=True, exist_ok=True)
    overfits = changes.pop("overfits", False)
    config = BOTH.replace(max_pace=8.0, **changes)
    model, optimizer, clipper = run(config, steps=80, ledger=folder / "clip_ledger.jsonl")
    if overfits:
        clipper.evaluated(1.0)
        run(config, steps=1, start=80, clipper=clipper, model=model, optimizer=optimizer)
        for loss in (1.5, 2.0):  # the training loss goes on falling
            clipper.evaluated(loss)
    start = clipper.step
    run(config, steps=steps - start, start=start, clipper=clipper, model=model, optimizer=optimizer)
    clipper.close()
    return folder


def test_what_shapes_the_step_is_in_the_answer_the_facts_and_a_figure(tmp_path):
    folder = write_shaped_run(tmp_path / "run")
    report = load_run(folder)
    numbers = summary(report)
    share, agreed = f"{numbers['altered_energy']:.0%}"[:-1], f"{numbers['agreeing_share']:.0%}"[:-1]
    words = (
        f"The spectral range moved gradients by {share} % of their energy, {agreed} % of the steps' components agreed."
    )
    text = write_html(report, tmp_path / "r.html").read_text()

    assert answer(report).endswith(words)
    assert (numbers["spectral_steps"], numbers["agreement_steps"]) == (120, 120)
    assert numbers["altered_energy"] == pytest.approx(float(report.series.altered_energies.mean()))
    assert "<h2>Pace</h2>" in text
    assert text.index("<h2>Pace</h2>") < text.index("<h2>Spectral range and sign agreement</h2>")
    for piece in ("altered energy", "agreeing share", f"altered energy {share} % on average, in 120 of 120 steps"):
        assert piece in text
    assert len(text) < 40_500
    zoomed = write_html(report, tmp_path / "z.html", zoom=True).read_text()
    assert zoomed.count('class="plotly-graph-div"') == text.count('<svg class="chart"')
    assert (
        f"| sign agreement | {agreed} % of the components agreed"
        in write_markdown(report, tmp_path / "r.md").read_text()
    )
    assert f"| spectral range | altered energy {share} %" in clipping_section(report, "abc")


def test_parts_that_are_off_are_not_spoken_of(tmp_path):
    folder = write_interesting_run(tmp_path / "run")
    (folder / "clip_ledger.jsonl").unlink()
    write_run(folder / "clip_ledger.jsonl", CONFIG.replace(max_pace=1.0, agreement=False, spectral_width=None))
    report = load_run(folder)
    text = write_html(report, tmp_path / "r.html").read_text().partition("<h2>Settings")[0]
    for piece in ("spectral", "altered energy", "agree", "<h2>Pace", "by heart", "a part of the optimizer"):
        assert piece not in text
        assert piece not in answer(report)
    assert summary(report)["altered_energy"] is None
    assert summary(report)["agreeing_share"] is None


def test_one_part_alone(tmp_path):
    folder = write_shaped_run(tmp_path / "run", spectral_width=None)
    report = load_run(folder)
    text = write_html(report, tmp_path / "r.html").read_text()
    assert re.search(r"\. \d+ % of the steps' components agreed\.$", answer(report))
    assert "altered energy" not in text
    assert "agreeing share" in text


def test_in_shadow_mode_the_range_would_have_moved_them(tmp_path):
    report = load_run(write_shaped_run(tmp_path / "run", shadow=True))
    assert "The spectral range would have moved gradients by" in answer(report)
    assert "of 120 steps (shadow: not applied)" in write_markdown(report, tmp_path / "r.md").read_text()


def test_that_data_is_learned_by_heart_is_said_in_words_and_among_the_adjustments(tmp_path):
    folder = write_shaped_run(tmp_path / "run", overfits=True)
    report = load_run(folder)
    step = summary(report)["by_heart_step"]
    words = f"From step {step} on the pace is 1 for good. The data is learned by heart"
    text = write_html(report, tmp_path / "r.html").read_text()

    assert step == 81
    assert words in text
    assert text.index("<h2>Pace</h2>") < text.index(words) < text.index("<h2>Reasons</h2>")
    assert words in write_markdown(report, tmp_path / "r.md").read_text()
    [event] = [e for e in report.events if "by heart" in e.reason]
    assert (event.step, event.kind, event.after) == (step, "pace_lowered", 1.0)


def test_where_the_static_threshold_always_acts_it_is_said_what_the_controller_does_instead(tmp_path):
    folder = write_shaped_run(tmp_path / "run", static_threshold=1e-3, ceiling_share=0.5)
    report = load_run(folder)
    words = (
        "The threshold stayed at <code>max_grad_norm</code> in 110 of 110 steps after the warm-up. Where that cuts most steps, it is a "
        "part of the optimizer, and no guard. The pace, the spectral range and the sign agreement went on."
    )
    assert words in write_html(report, tmp_path / "r.html").read_text()
    assert (
        words.replace("<code>", "`").replace("</code>", "`") in write_markdown(report, tmp_path / "r.md").read_text()
    )
    calm = load_run(write_shaped_run(tmp_path / "calm", static_threshold=1e3))
    assert "a part of the optimizer" not in write_html(calm, tmp_path / "r.html").read_text()


def test_of_many_moves_of_the_pace_the_largest_are_in_the_table_and_that_of_the_overfitting(tmp_path):
    from dataclasses import replace

    from hf_adaclip.report.run_report import MAX_MOVES
    from hf_adaclip.run.events import ClipEvent

    report = load_run(write_interesting_run(tmp_path / "run"))
    moves = [
        ClipEvent(
            i,
            i,
            "pace_raised" if i % 2 else "pace_lowered",
            1.0,
            (1.1 + i / 100) ** (1 if i % 2 else -1),
            "why",
            "pace",
        )
        for i in range(100)
    ]
    heart = ClipEvent(100, 100, "pace_lowered", 1.0, 1.0, "by heart", "pace")
    many = replace(report, events=[*moves, heart])
    text = write_html(many, tmp_path / "r.html").read_text()

    assert text.count(">pace raised<") == MAX_MOVES
    assert text.count(">pace lowered<") == MAX_MOVES + 1
    assert "pace 1 -&gt; 2.09<" in text
    assert "by heart" in text
    left = len(moves) - 2 * MAX_MOVES
    assert f"{left} more of the frequent kinds are in the JSON" in text
    assert f"{left} more are in the JSON" in write_markdown(many, tmp_path / "r.md").read_text()
