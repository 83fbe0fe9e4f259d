import errno
import json
import subprocess
import sys

import pytest

from hf_adaclip.cli import build_parser, main
from tests.audit.test_ledger import CONFIG, write_run


def test_exit_codes_of_verify(tmp_path, capsys):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    write_run(good)
    bad.write_bytes(good.read_bytes().replace(b'"step":7,', b'"step":8,', 1))

    assert main(["verify", str(good)]) == 0
    assert "verified. 45 steps in 1 segment(s), 45 decisions recomputed" in capsys.readouterr().out
    assert main(["verify", str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "NOT verified" in out
    assert "VIOLATION (line" in out
    assert main(["verify", str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl cannot be read: No such file or directory." in capsys.readouterr().err


def test_a_folder_stands_for_its_ledger(tmp_path, capsys):
    write_run(tmp_path / "clip_ledger.jsonl")

    assert main(["verify", str(tmp_path)]) == 0
    assert main(["advise", str(tmp_path)]) == 0
    assert "45 norms" in capsys.readouterr().out


def test_verify_json(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    write_run(path)
    assert main(["verify", "--json", str(path), str(tmp_path)]) == 2
    reports = json.loads(capsys.readouterr().out)

    assert reports[0]["ok"] is True
    assert reports[0]["steps"] == 45
    assert reports[1]["ok"] is None


@pytest.mark.parametrize("command", ["compare", "verify"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    parser = build_parser()._subparsers._group_actions[0].choices[command]  # type: ignore[index]

    assert stop.value.code == 0
    for action in parser._actions:
        assert action.help
        assert all(option in text for option in action.option_strings)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["compare", "--seeds", "0"], ["verify"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.slow
def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hf_adaclip.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "compare" in done.stdout


@pytest.mark.slow
def test_the_gauntlet_with_settings_noise_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "g.png"
    options = ["--controllers", "static", "median:median_factor=3", "--seeds", "1", "--noise", "student"]
    assert main(["gauntlet", *options, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "median:median_factor=3" in out
    assert picture.stat().st_size > 5000
    assert main(["gauntlet", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["noise"], found["seeds"], set(found["verdicts"])) == ("student", 1, {"static", options[2]})
    # The second of two spikes becomes what it is bounded by: the factor times the running median.
    assert 2.5 < found["verdicts"]["median:median_factor=3"]["second_spike"] < 3.5


def test_the_gauntlet_on_norms_of_ones_own(tmp_path, capsys):
    write_run(tmp_path / "clip_ledger.jsonl", CONFIG.replace(static_threshold=0.25))
    stream = ["--stream", str(tmp_path / "clip_ledger.jsonl")]
    assert main(["gauntlet", "--controllers", "static", "adaptive", *stream, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stream"].endswith("clip_ledger.jsonl")
    assert set(found["verdicts"]) == {"static", "adaptive"}
    altered = found["verdicts"]["static"]["altered"]
    assert main(["replay", stream[1], "--controller", "static", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["static_threshold"] == 0.25  # that of the run, for both
    assert replayed["outcomes"]["static"]["altered"] == altered
    assert main(["gauntlet", "--controllers", "static", *stream, "--max-grad-norm", "0"]) == 2
    assert "`--max-grad-norm` must be above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["gauntlet", "--seeds", "none"])
    assert main(["gauntlet", "--controllers", "static", "--seeds", "0"]) == 2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["reprot", "x"], "Did you mean 'report'?"),
        (["report", "x", "--fromat", "md"], "Did you mean `--format`?"),
        (["report", "x", "--format", "htm"], "Did you mean 'html'?"),
        (["compare", "--sedes=3"], "Did you mean `--seeds`?"),
        (["replay", "x", "--max_grad_nrom", "3"], "Did you mean `--max-grad-norm`?"),
    ],
)
def test_a_mistyped_word_gets_a_hint(arguments, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_mistyped_names_in_values_get_a_hint(tmp_path, capsys):
    log = tmp_path / "n.csv"
    log.write_text("step,norm\n" + "".join(f"{i},1.{i % 7}\n" for i in range(200)))
    assert main(["replay", str(log), "--controller", "zclip"]) == 2
    assert "zclip is here 'zscore'" in capsys.readouterr().err
    assert main(["replay", str(log), "--set", "median_facter=3"]) == 2
    assert "Did you mean `median_factor`?" in capsys.readouterr().err
    assert main(["replay", str(log), "--controller", "zscore", "--set", "median_factor=3"]) == 2
    assert "it belongs to controller 'median'" in capsys.readouterr().err
    assert main(["replay", str(log), "--controller", "zscore:width=3", "--controller", "zscore:width=2"]) == 0
    assert {"zscore:width=3", "zscore:width=2"} <= set(capsys.readouterr().out.split())
    assert main(["replay", str(log), "--set", "median_factor=3"]) == 0
    assert "median" in capsys.readouterr().out
    assert main(["gauntlet", "--controllers", "zclip"]) == 2
    assert "zclip is here 'zscore'" in capsys.readouterr().err
    assert main(["compare", "--arms", "stock,zclip", "--output", str(tmp_path / "c")]) == 2
    assert "zclip is here 'zscore'" in capsys.readouterr().err


def test_the_card_of_a_run_is_not_that_of_a_comparison(tmp_path, capsys):
    write_run(tmp_path / "clip_ledger.jsonl")
    assert main(["card", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds no comparison.json" in said
    assert "`create_model_card`" in said
    assert "damaged" not in said


@pytest.mark.parametrize("name", ["p.md", "p.json", "p.csv", "p.png", "p.html", "p.txt"])
def test_the_format_of_a_report_is_that_of_its_name(name, tmp_path, capsys):
    write_run(tmp_path / "clip_ledger.jsonl")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / name)]) == 0
    begin = {"md": b"# Run", "json": b"{", "csv": b"step,", "png": b"\x89PNG"}.get(name[2:], b"<!doctype html>")
    assert (tmp_path / name).read_bytes().lower().startswith(begin.lower())
    assert main(["report", str(tmp_path), "--output", str(tmp_path / name), "--format", "json"]) == 0
    json.loads((tmp_path / name).read_text())


@pytest.mark.parametrize("form", ["html", "md", "json", "csv", "png"])
def test_a_report_that_cannot_be_written_says_where_and_what_to_do(form, tmp_path, capsys):
    write_run(tmp_path / "clip_ledger.jsonl")
    target = tmp_path / "gone" / f"r.{form}"
    assert main(["report", str(tmp_path), "--format", form, "--output", str(target)]) == 2
    said = capsys.readouterr().err
    assert f"hf-adaclip: {target} cannot be written or read (No such file or directory)." in said
    assert "`--output`" in said


def test_half_a_report_is_none(tmp_path, monkeypatch, capsys):
    from hf_adaclip.report import run_report

    def full(report, path, **kwargs):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_run(tmp_path / "clip_ledger.jsonl")
    monkeypatch.setattr(run_report, "write_html", full)
    assert main(["report", str(tmp_path)]) == 2
    assert "a file cannot be written or read (No space left on device). Make room" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_adjustments_are_in_the_order_of_their_first_steps():
    from hf_adaclip.report.run_report import _shown
    from hf_adaclip.run.events import ClipEvent

    late = ClipEvent(150, 150, "spike", 9.0, 1.0, "Why.", "norm")
    slow = ClipEvent(56, 149, "pace_lowered", 2.0, 1.0, "Why.", "pace")
    assert _shown([late, slow]) == [slow, late]
