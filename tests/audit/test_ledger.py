"""A ledger says what happened, and cannot be made to say anything else without being found out."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, LedgerError
from hf_adaclip.audit import Ledger, verify_ledger
from hf_adaclip.ledger.reader import parse_line
from hf_adaclip.ledger.schema import encode, number, parse_number
from tests.loops import make, train

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0, ring_capacity=16)


def write_run(path, config=CONFIG, steps=45, faults=None, clean=True, **kwargs):
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=path, **kwargs)
    train(
        model,
        optimizer,
        lambda m, loss: clipper.clip_(m.parameters(), loss=loss),
        steps,
        factors=faults or {20: 90.0, 30: math.nan},
    )
    clipper.close(clean=clean)
    return clipper


@pytest.fixture(scope="module")
def ledger_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "clip_ledger.jsonl"
    write_run(path)
    return path.read_bytes()


def violations(path):
    return [f for f in verify_ledger(path).findings if f.violation]


@pytest.mark.parametrize("controller", ["static", "percentile", "zscore", "adaptive"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_what_a_run_writes_verifies(tmp_path, controller, granularity):
    path = tmp_path / "l.jsonl"
    write_run(path, CONFIG.replace(controller=controller, granularity=granularity))
    report = verify_ledger(path)

    assert report.ok, report.findings
    assert (report.steps, report.recomputed, report.segments, report.closed) == (45, 45, 1, True)
    assert report.measured == 1


def test_lines_are_strict_json_with_all_fields(ledger_bytes):
    def refuse(text):
        raise AssertionError(text)

    lines = [json.loads(line, parse_constant=refuse) for line in ledger_bytes.splitlines()]
    header, footer = lines[0], lines[-2]
    steps = [line for line in lines if line["kind"] == "step"]

    assert header["kind"] == "header"
    assert header["schema"] == 1
    assert {"torch", "hf_adaclip", "python"} <= set(header["versions"])
    settled = {"max_pace": 64.0, "spectral_width": None, "agreement": True}  # an optimizer was known, and no model
    assert header["config"] == {**CONFIG.resolved().to_dict(), "ledger": header["config"]["ledger"], **settled}
    assert header["parent"] is None
    assert [s["step"] for s in steps] == list(range(45))
    assert steps[30]["norm"] == "nan"
    assert steps[30]["reason"] == "NONFINITE"
    assert steps[20]["reason"] == "SPIKE"
    assert steps[0]["applied_norm"] == pytest.approx(1.0, rel=1e-5)
    assert steps[1]["applied_norm"] is None
    assert footer["steps"] == 45
    assert sum(footer["counts"].values()) == 45


def test_datasets_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "l.jsonl"
    write_run(path, faults={20: 90.0})
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    steps = table.filter(lambda row: row["kind"] == "step")

    assert len(steps) == 45
    assert steps[20]["reason"] == "SPIKE"


@pytest.mark.slow
def test_every_single_flipped_byte_is_found(ledger_bytes, tmp_path):
    """Every position of the header's first bytes, of a record, of a seal and of the footer; the rest at random."""
    rng = np.random.default_rng(0)
    whole = len(ledger_bytes)
    lines = ledger_bytes.splitlines(keepends=True)
    record = sum(map(len, lines[:5]))
    dense = [*range(60), *range(record, record + len(lines[5])), *range(whole - len(lines[-1]) - 80, whole)]
    positions = sorted({*dense, *rng.integers(0, whole, 1000).tolist()})
    path = tmp_path / "l.jsonl"
    missed = []
    assert len(positions) >= 1000
    for position in positions:
        damaged = bytearray(ledger_bytes)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            if verify_ledger(path).ok:
                missed.append(position)
        except LedgerError:
            pass  # no ledger at all any more: exit code 2
    assert missed == []


@pytest.mark.parametrize("replacement", [b" ", b"\t", b"\r", b"x", b"}"])
def test_the_very_last_byte_counts(ledger_bytes, tmp_path, replacement):
    path = tmp_path / "l.jsonl"
    path.write_bytes(ledger_bytes[:-1] + replacement)

    assert violations(path)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_removed_doubled_and_swapped_lines_are_found_and_located(ledger_bytes, tmp_path_factory, data):
    lines = ledger_bytes.splitlines(keepends=True)
    i = data.draw(st.integers(0, len(lines) - 2), label="line")  # the last seal has a test of its own
    kind = data.draw(st.sampled_from(["remove", "double", "swap"]))
    changed = list(lines)
    if kind == "remove":
        del changed[i]
    elif kind == "double":
        changed.insert(i, lines[i])
    else:
        changed[i], changed[i + 1] = changed[i + 1], changed[i]
    path = tmp_path_factory.mktemp("damaged") / "l.jsonl"
    path.write_bytes(b"".join(changed))
    try:
        found = violations(path)
    except LedgerError:
        assert i == 0
        return

    assert found
    assert min(abs(f.line - (i + 1)) for f in found) <= 20  # within the block


def test_a_rewritten_decision_with_a_new_chain_is_still_found(ledger_bytes, tmp_path):
    """Someone who recomputes all hashes cannot make a decision follow from norms that it does not follow from."""
    from hf_adaclip.ledger.schema import GENESIS, encode, seal_line

    content = [json.loads(line) for line in ledger_bytes.splitlines()]
    spike = next(c for c in content if c.get("reason") == "SPIKE")
    spike.update(coefficient=1.0, reason="WITHIN")
    head, block, out = GENESIS, [], b""
    for line in content:
        if line["kind"] != "seal":
            block.append(encode(line))
            continue
        seal, head = seal_line(head, len(block), b"".join(block))
        out += b"".join(block) + seal
        block = []
    path = tmp_path / "l.jsonl"
    path.write_bytes(out)
    found = violations(path)

    assert any(
        "`coefficient` is recorded as 1, but the norms before it give" in f.message and f.step == 20 for f in found
    )
    assert any("`reason` is recorded as WITHIN" in f.message for f in found)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.99])
def test_a_torn_tail_is_reported_and_no_violation(ledger_bytes, tmp_path, keep):
    path = tmp_path / "l.jsonl"
    path.write_bytes(ledger_bytes[: int(len(ledger_bytes) * keep)])
    report = verify_ledger(path)

    assert report.status == "incomplete", report.findings
    assert report.unsealed
    assert not report.closed
    assert "NOT verified as a whole" in report.summary()


def test_a_line_may_be_torn_anywhere():
    line = encode(
        {"kind": "step", "norm": 1e-05, "big": 1e22, "loss_scale": None, "yes": True, "no": [False, -1], "x": "é\n"}
    )
    torn = [parse_line(1, line[:n]) for n in range(1, len(line))]
    assert [line[:n] for n, found in enumerate(torn, start=1) if not found.cut] == []
    assert parse_line(1, line).content is not None
    assert not parse_line(1, b'{"kind":?"step","norm":1').cut, "a byte that was flipped is not the end of a write"


def test_a_killed_run_can_be_continued(tmp_path):
    path = tmp_path / "l.jsonl"
    write_run(path, clean=False)
    torn = path.read_bytes() + b'{"kind":"step","step":45,"nor'
    path.write_bytes(torn)
    write_run(path)
    report = verify_ledger(path)

    assert report.ok, report.findings
    assert report.segments == 2
    messages = " ".join(f.message for f in report.findings)
    assert "torn tail of 29 bytes was cut off" in messages
    assert "did not end cleanly" in messages


@pytest.mark.parametrize("keep", [0, 1, 10, 60])
def test_a_first_write_that_was_cut_off_does_not_block_the_next_start(tmp_path, ledger_bytes, keep):
    path = tmp_path / "l.jsonl"
    path.write_bytes(ledger_bytes[:keep])
    write_run(path)
    report = verify_ledger(path)

    assert report.ok, report.findings
    assert report.steps == 45


def test_two_writers_are_not_let_at_one_file(tmp_path):
    first = Ledger(tmp_path / "l.jsonl", {"x": 1})
    with pytest.raises(LedgerError, match="by a clipper of this process that was not closed"):
        Ledger(tmp_path / "l.jsonl", {"x": 2})
    first.close()
    Ledger(tmp_path / "l.jsonl", {"x": 3}).close()


@pytest.mark.parametrize(
    "content",
    [
        b"chapter one\n",
        b'{"kind":"header"}\nchapter one\n',
        b'{"kind":"header","schema":1,"title":"a log of mine"}\n',
        b'{"kind":"header","schema":1,"title":"a log of mine"}\n{"kind":"step","x":1}\n',
        b'{"kind":"header","schema":1}\n{"kind":"seal","lines":1,"previous":"0","sha256":"0"}\n',
        b'{"kind":"seal","sha256":"1"}\nmy notes\n',
    ],
)
def test_a_file_that_is_no_ledger_is_left_alone(tmp_path, caplog, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"It is left as it is"):
        write_run(path, CONFIG.replace(ledger_required=True))
    assert path.read_bytes() == content
    clipper = write_run(path)
    assert clipper.step == 45
    assert path.read_bytes() == content
    assert "Training goes on without a ledger" in caplog.text


@pytest.mark.parametrize("added", [b"my own notes\n", b'{"kind":"step","x":1}\n', b'{"kind":"note"}\n', b"[1]", b"x"])
def test_what_others_wrote_behind_a_ledger_is_not_cut_off(tmp_path, ledger_bytes, added):
    path = tmp_path / "l.jsonl"
    path.write_bytes(ledger_bytes + added)
    write_run(path)
    assert path.read_bytes() == ledger_bytes + added


def test_a_broken_chain_is_not_continued(tmp_path, ledger_bytes):
    path = tmp_path / "l.jsonl"
    damaged = ledger_bytes.replace(b'"norm":', b'"norm": ', 1)
    path.write_bytes(damaged)
    with pytest.raises(LedgerError, match=r"the seal in line \d+ does not fit"):
        write_run(path, CONFIG.replace(ledger_required=True))
    assert path.read_bytes() == damaged


def test_a_tail_filled_with_nul_by_the_file_system_is_a_torn_one(tmp_path, ledger_bytes):
    path = tmp_path / "l.jsonl"
    path.write_bytes(ledger_bytes + b'{"kind":"step","st' + b"\0" * 4000)
    write_run(path)
    assert verify_ledger(path).ok


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x00\xff\n", b"[1,2]\n"])
def test_unreadable_input_is_an_error(tmp_path, content):
    path = tmp_path / "l.jsonl"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not a ledger of hf_adaclip"):
        verify_ledger(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(LedgerError, match="cannot be read"):
        verify_ledger(tmp_path / "missing.jsonl")
    with pytest.raises(LedgerError, match="cannot be read"):
        verify_ledger(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"header"}\n',
        b'{"kind":"header","schema":2}\n',
        b'{"kind":"step","step":NaN}\n',
        b'{"kind":"step","step":0,"step":1}\n',
        b'{"kind":"' + b"[" * 100_000 + b"\n",
        b'{"kind":"seal","lines":-1}\n',
        b'{"kind":"novel"}\n{"kind":"seal","lines":1,"previous":"0","sha256":"0"}\n',
    ],
)
def test_hostile_lines_are_findings_not_crashes(tmp_path, line):
    path = tmp_path / "l.jsonl"
    path.write_bytes(line + b'{"kind":"seal","lines":1,"previous":"x","sha256":"y"}\n')

    assert not verify_ledger(path).ok


def test_something_that_undoes_the_clipping_is_found(tmp_path):
    """The applied norm is measured at the last moment: a callback that rescales gradients afterwards shows."""
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(self_test=False), optimizer=optimizer, ledger=path)

    def clip_and_undo(model, loss):
        norm = clipper.clip_(model.parameters(), measure=True)
        for p in model.parameters():
            p.grad *= 3
        return norm

    train(model, optimizer, clip_and_undo, 5)
    clipper.close()
    found = violations(path)

    assert len(found) == 5
    assert "something changed it between clipping and the step" in found[0].message


def test_a_full_disk_does_not_stop_training_and_leaves_a_visible_gap(tmp_path, monkeypatch, caplog):
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path, {"x": 1})
    record = {"step": 0}
    ledger.steps([record])

    class FullDisk:
        closed = False

        def __getattr__(self, name):
            def fail(*args):
                raise OSError(28, "No space left on device")

            return fail

    real, ledger._file = ledger._file, FullDisk()  # type: ignore[assignment]
    ledger.steps([{"step": 1}])
    ledger.steps([{"step": 2}])
    ledger._file = real
    ledger.steps([{"step": 3}])
    ledger.close()

    steps = [json.loads(line).get("step") for line in path.read_text().splitlines() if '"step"' in line]
    assert steps == [0, 3]
    assert len([r for r in caplog.records if "could not be written" in r.message]) == 1


@given(st.floats(width=32))
@settings(deadline=None)
def test_numbers_survive_bit_for_bit(value):
    text = json.loads(json.dumps(number(value), allow_nan=False))
    back = np.float32(parse_number(text))

    assert back.tobytes() == np.float32(value).tobytes() or (math.isnan(value) and math.isnan(back))
