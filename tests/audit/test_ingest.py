"""Logs of other programs: each is read right, or refused with the row, the step or the file named; what was left out is said."""

import json
import math
import pickle

import numpy as np
import pytest

from hf_adaclip import LedgerError
from hf_adaclip.audit.advise import advise
from hf_adaclip.audit.ingest import load_series
from hf_adaclip.audit.numbers import NotANumberError, read_number
from hf_adaclip.cli import main
from tests.audit.test_ledger import CONFIG, write_run

NORMS = [0.3 + 0.01 * (i % 7) for i in range(60)]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rows(header, line, steps=range(1, 61)):
    return header + "\n" + "".join(line(s, n) + "\n" for s, n in zip(steps, NORMS, strict=False))


def state(path, entries):
    return write(path, json.dumps({"log_history": entries}))


def entries(values, first=1):
    return [{"step": first + i, "grad_norm": v, "loss": 2.0} for i, v in enumerate(values)]


def is_whole(series, steps=range(1, 61)):
    assert series.steps.tolist() == list(steps)
    np.testing.assert_allclose(series.norms, np.float32(NORMS[: len(steps)]), rtol=1e-6)
    return series


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        (" 1e-3 ", 1e-3),
        ("inf", math.inf),
        ("Infinity", math.inf),
        ("tensor(0.1234)", 0.1234),
        ("tensor(0.12, device='cuda:0')", 0.12),
        ("tensor([0.5], device='cuda:0', dtype=torch.bfloat16)", 0.5),
        ("tensor(0.5, device='cuda:0', grad_fn=<DivBackward0>)", 0.5),
        ("np.float32(0.5)", 0.5),
        ("tensor(inf)", math.inf),
        (3, 3.0),
        ("N/A", None),
        ("", None),
        (None, None),
        ("None", None),
    ],
)
def test_numbers_are_read_as_logs_write_them(text, value):
    assert read_number(text) == value


def test_nan_is_a_value_and_not_an_absence():
    assert math.isnan(read_number("nan"))
    assert math.isnan(read_number("tensor(nan)"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,234.5", "separators"),
        ("0,123", "separators"),
        ("1_000", "separators"),
        ("1 000", "separators"),
        ("12%", "percentage"),
        ("abc", "no number"),
        (True, "no number"),
        ([1.0], "no number"),
        ("١٢", "no number"),
        ("tensor([1, 2])", "no number"),
        ("__import__('os')", "no number"),
        ("0x10", "no number"),
        (10**400, "too large"),
    ],
)
def test_what_is_no_number_is_refused_with_the_reason(text, why):
    with pytest.raises(NotANumberError, match=why):
        read_number(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda f: write(f / "x.csv", rows("_step,train/global_step,train/grad_norm", lambda s, n: f"{s * 3},{s},{n}")),
        lambda f: write(
            f / "x.csv", rows("Step,bert - train/grad_norm,bert - train/grad_norm__MIN", lambda s, n: f"{s},{n},0")
        ),
        lambda f: write(f / "x.csv", rows("step;grad_norm", lambda s, n: f"{s};{n}")),
        lambda f: write(f / "x.tsv", rows("step\tgrad_norm", lambda s, n: f"{s}\t{n}")),
        lambda f: write(f / "x.csv", rows("\nstep , grad_norm ", lambda s, n: f" {s}.0 , {n} ,")),
        lambda f: write(f / "x.csv", rows("step,grad_norm", lambda s, n: f"{s},{n}"), "utf-8-sig"),
        lambda f: write(f / "x.csv", rows("step,grad_norm", lambda s, n: f"{s},{n}"), "utf-16"),
        lambda f: write(f / "x.csv", rows("step,grad_norm", lambda s, n: f"{s},\"tensor({n}, device='cuda:0')\"")),
        lambda f: write(f / "x.json", json.dumps({"log_history": entries(NORMS)}), "utf-8-sig"),
        lambda f: write(f / "x.json", json.dumps({"log_history": entries(NORMS)}), "utf-16"),
        lambda f: write(f / "x.json", json.dumps(entries(NORMS))),
        lambda f: state(f / "x.json", entries([f"tensor({n})" for n in NORMS])),
        lambda f: state(f / "checkpoint-60/trainer_state.json", entries(NORMS)).parent,
        lambda f: state(f / "checkpoint-60/trainer_state.json", entries(NORMS)).parent.parent,
        lambda f: write(f / "x.csv", rows("step,grad_norm,loss", lambda s, n: f"{s},{n},{'N/A' if s == 7 else 2}")),
    ],
)
def test_logs_that_are_read_right(tmp_path, make):
    assert is_whole(load_series(make(tmp_path))).left_out == ()


def test_repeated_headers_and_steps_of_a_resumed_run(tmp_path):
    first = rows("step,grad_norm", lambda s, n: f"{s},9", range(1, 41))
    series = is_whole(load_series(write(tmp_path / "x.csv", first + rows("step,grad_norm", lambda s, n: f"{s},{n}"))))
    assert series.left_out == ("1 row(s) repeat the header.", "40 step(s) stand there again; the later entry counts.")
    assert "1 row(s) repeat the header." in advise(series)["uncertainty"]


def test_steps_that_are_not_in_order_are_sorted(tmp_path):
    lines = rows("step,grad_norm", lambda s, n: f"{s},{n}").splitlines()
    series = is_whole(load_series(write(tmp_path / "x.csv", "\n".join([lines[0], *reversed(lines[1:])]))))
    assert series.left_out == ("The steps were not in order; they were sorted.",)


@pytest.mark.parametrize("cell", ["N/A", "", "null", "None"])
def test_cells_without_a_norm_are_left_out_and_said(tmp_path, cell):
    series = load_series(
        write(tmp_path / "x.csv", rows("step,grad_norm", lambda s, n: f"{s},{cell if s == 7 else n}"))
    )
    assert len(series) == 59
    assert series.left_out == ("1 row(s) hold no norm, or no step.",)
    assert advise(series)["not_finite"] == 0
    assert "1 norm(s) are not in the log (between steps 6 to 8)" in advise(series)["uncertainty"]


def test_null_in_a_trainer_state_is_left_out_and_minus_one_is_not_finite(tmp_path):
    values = [None if i % 2 else -1.0 if i == 10 else 0.5 for i in range(60)]
    found = advise(load_series(state(tmp_path / "x.json", entries(values))))
    assert (found["steps_known"], found["not_finite"], found["every"]) == (30, 1, 2)
    assert "30 entry(s) hold no norm, or no step." in found["uncertainty"]


def test_one_norm_alone_says_nothing_of_the_others(tmp_path, capsys):
    path = state(tmp_path / "x.json", entries([0.5], first=500))
    assert "Only one norm is known, that of step 500" in advise(load_series(path))["uncertainty"]
    assert main(["advise", str(path)]) == 0
    assert "every step" not in capsys.readouterr().out.lower()


def test_gaps_are_named(tmp_path):
    path = state(tmp_path / "x.json", [*entries(NORMS), *entries(NORMS, first=500)])
    text = advise(load_series(path))["uncertainty"]
    assert text == "439 norm(s) are not in the log (between steps 60 to 500). Between them every step is known."
    sparse = [{"step": s, "grad_norm": 1.0} for s in (*range(10, 200, 10), *range(400, 600, 10))]
    assert (
        "20 norm(s) are not in the log (between steps 190 to 400)"
        in advise(load_series(state(path, sparse)))["uncertainty"]
    )


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("step,grad_norm\n1,0.5\n2,1,234.5\n", "row 3 has 3 instead"),
        ('step,grad_norm\n1,0.5\n2,"1,234.5"\n', "`grad_norm` in row 3: '1,234.5' has separators"),
        ("step;grad_norm\n1;0,5\n", "`grad_norm` in row 2: '0,5' has separators"),
        ("step,grad_norm\n1,5%\n", "`grad_norm` in row 2: '5%' is a percentage"),
        ("step,grad_norm\n1,0.5\n2,-3\n", "`grad_norm` in row 3: '-3' is negative"),
        ("step,grad_norm\n1.5,0.5\n", "`step` in row 2: '1.5' is no number of steps"),
        ("step,grad_norm\n-1,0.5\n", "`step` in row 2: '-1' is no number of steps"),
        ("step,grad_norm\nnan,0.5\n", "`step` in row 2"),
        ("step,grad_norm,loss\n1,0.5,x\n", "`loss` in row 2: 'x' is no number"),
        ("step,grad_norm,step\n1,0.5,2\n", "must have one column `step`, but has 2"),
        ("Step,a - train/grad_norm,b - train/grad_norm\n1,2,3\n", "must hold one run, but has columns of 2"),
        ("time,value\n1,2\n", "its columns are time, value"),
        ("\n \n", "but is empty instead"),
    ],
)
def test_a_csv_that_cannot_be_read_names_the_row_and_the_column(tmp_path, text, where):
    with pytest.raises(LedgerError) as caught:
        load_series(write(tmp_path / "x.csv", text))
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (True, "`grad_norm` in step 3: True is no number"),
        ({"a": 1}, "`grad_norm` in step 3"),
        ("1,5", "`grad_norm` in step 3: '1,5' has separators"),
        (-2, "`grad_norm` in step 3: -2 is negative"),
    ],
)
def test_a_trainer_state_that_cannot_be_read_names_the_step(tmp_path, value, where):
    with pytest.raises(LedgerError) as caught:
        load_series(state(tmp_path / "x.json", [*entries(NORMS[:2]), *entries([value], first=3)]))
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04rest", "a zip archive (or an Excel sheet"),
        (b"PAR1rest", "a Parquet file"),
        (b"\x1f\x8brest", "compressed by gzip; unpack it first"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"\x93NUMPY\x01", "a NumPy array"),
        (b"", "is empty"),
        (b"\xff\x00\x81", "is not UTF-8"),
    ],
)
def test_files_of_another_kind_are_called_by_their_name(tmp_path, start, what):
    path = tmp_path / "x.csv"
    path.write_bytes(start)
    with pytest.raises(LedgerError) as caught:
        load_series(path)
    assert what in str(caught.value)


# -- folders ------------------------------------------------------------------------------------------------------


def test_the_last_of_several_checkpoints_holds_the_history_of_all(tmp_path):
    for count in (20, 60, 9):
        state(tmp_path / f"checkpoint-{count}/trainer_state.json", entries(NORMS[:count]))
    series = is_whole(load_series(tmp_path))
    assert series.left_out == ("Read from checkpoint-60, the last of 3 checkpoints, which holds the history of all.",)


def test_checkpoints_of_two_runs_are_refused_by_name(tmp_path):
    state(tmp_path / "checkpoint-20/trainer_state.json", entries([9.0] * 20))
    state(tmp_path / "checkpoint-60/trainer_state.json", entries(NORMS))
    with pytest.raises(LedgerError, match=r"checkpoint-20 and checkpoint-60 differ at step 1\. Name one"):
        load_series(tmp_path)


def events(folder, steps, wall, values=NORMS, tag="train/grad_norm"):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), filename_suffix=f".{wall}")
    for step, value in zip(steps, values, strict=False):
        writer.add_scalar(tag, value, step, walltime=wall + step)
    writer.close()


@pytest.mark.parametrize("folders", [("runs/a", "runs/b"), ("runs", "runs")])
def test_a_resumed_run_in_several_event_files_is_read_as_one(tmp_path, folders):
    events(tmp_path / folders[0], range(1, 41), 1000, [9.0] * 30 + [5.0] * 10)
    events(tmp_path / folders[1], range(31, 61), 5000, NORMS)
    events(tmp_path / "runs/hparams", range(1, 3), 9000, tag="hparam/metric")
    series = load_series(tmp_path)
    assert series.steps.tolist() == list(range(1, 61))
    assert series.norms[:30].tolist() == [9.0] * 30
    np.testing.assert_allclose(series.norms[30:], np.float32(NORMS[:30]), rtol=1e-6)
    assert "10 step(s) were done again after a resumption; the later ones count." in series.left_out


@pytest.mark.parametrize("folders", [("runs/a", "runs/b"), ("runs", "runs")])
def test_several_runs_in_a_folder_are_refused_by_name(tmp_path, folders):
    events(tmp_path / folders[0], range(1, 41), 1000)
    events(tmp_path / folders[1], range(1, 41), 5000)
    with pytest.raises(
        LedgerError, match=r"must hold one run, but holds several: .*\.1000 .*\(steps 1 to 40\); .*\.5000"
    ):
        load_series(tmp_path)


# -- our own ------------------------------------------------------------------------------------------------------


def test_advice_on_a_ledger_goes_by_its_static_threshold(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    write_run(path, CONFIG.replace(static_threshold=2.0))
    assert advise(load_series(path))["max_grad_norm"] == 2.0
    assert main(["advise", str(path)]) == 0
    assert "A static 2 altered" in capsys.readouterr().out
    assert main(["advise", str(path), "--max-grad-norm", "1"]) == 0
    assert "A static 1 altered" in capsys.readouterr().out
