"""What a chain of seals cannot show by itself is shown by seals that are kept elsewhere, and said where there are none."""

import json
import shutil

import pytest

from hf_adaclip import AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.cli import main
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.ledger.schema import GENESIS, encode, seal_line
from tests.audit.test_ledger import CONFIG, violations, write_run
from tests.loops import make, train


def reseal(path, change):
    """Write a ledger anew with changed lines and a chain that fits."""
    head, block, out = GENESIS, [], b""
    for raw in path.read_bytes().splitlines():
        line = json.loads(raw)
        if line["kind"] != "seal":
            block += [encode(new) for new in change(line)]
            continue
        seal, head = seal_line(head, len(block), b"".join(block))
        out, block = out + b"".join(block) + seal, []
    path.write_bytes(out)


def first_scale_changed(line):
    """Something that no decision follows from, so that nothing but the chain can tell."""
    return [{**line, "loss_scale": 4.0} if line.get("step") == 0 else line]


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_a_missing_last_seal_is_never_verified(tmp_path, anchored, clean):
    path = tmp_path / "l.jsonl"
    write_run(path, clean=clean)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    if not anchored:
        (tmp_path / "l.jsonl.seal").unlink()
    report = verify_ledger(path)

    assert not report.ok
    assert report.status == ("violated" if anchored else "incomplete")
    assert main(["verify", str(path)]) == (1 if anchored else 3)
    assert "NOT verified" in report.summary()


def test_what_stands_in_a_torn_tail_is_recomputed(tmp_path):
    path = tmp_path / "l.jsonl"
    write_run(path, clean=False)
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "l.jsonl.seal").unlink()
    path.write_bytes(b"".join(lines[:-1]).replace(b'"reason":"WIDENED"', b'"reason":"WITHIN"'))
    assert any("`reason` is recorded as WITHIN" in f.message for f in violations(path))


def test_a_run_that_was_removed_as_a_whole_is_found(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    write_run(path)
    first = path.read_bytes()
    write_run(path)
    path.write_bytes(first)

    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "Contradicted by l.jsonl.seal" in out
    assert "ended cleanly" not in out
    # The next run says so in its header, where the chain keeps it.
    write_run(path)
    assert any("did not hold the seal of its line" in f.message for f in verify_ledger(path).findings)


def test_a_ledger_alone_verifies_and_says_that_nothing_anchors_it(tmp_path):
    write_run(tmp_path / "l.jsonl")
    copy = tmp_path / "elsewhere/l.jsonl"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "l.jsonl", copy)
    report = verify_ledger(copy)

    assert report.ok
    assert "No anchor: nothing outside the file confirms it" in report.summary()
    assert any("no anchor" in f.message for f in report.findings)
    assert "Anchored up to step 45 by l.jsonl.seal" in verify_ledger(tmp_path / "l.jsonl").summary()


def test_a_history_that_was_sealed_anew_is_found_by_any_seal_kept_elsewhere(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    write_run(path)
    seal = verify_ledger(path).seal
    reseal(path, first_scale_changed)
    assert "Contradicted by l.jsonl.seal" in verify_ledger(path).summary()
    (tmp_path / "l.jsonl.seal").unlink()
    assert verify_ledger(path).ok
    assert main(["verify", str(path), "--seal", seal]) == 1
    assert "Contradicted by --seal" in capsys.readouterr().out
    (tmp_path / "README.md").write_text(f"Last seal of `l.jsonl`: `{seal}`. Check it.")
    assert "Contradicted by README.md" in verify_ledger(path).summary()


def test_a_seal_that_was_kept_is_found_in_the_file(tmp_path, capsys):
    path = tmp_path / "l.jsonl"
    write_run(path, clean=False)
    seal = verify_ledger(path).seal
    (tmp_path / "l.jsonl.seal").unlink()
    assert main(["verify", str(path), "--seal", seal]) == 0
    assert "Anchored up to step 45 by --seal" in capsys.readouterr().out
    for wrong, message in (("abc", "must be the 64 hexadecimal digits"), (seal.upper(), "must be the 64")):
        assert main(["verify", str(path), "--seal", wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["verify", str(path), str(path), "--seal", seal]) == 2
    assert "must be given with one ledger" in capsys.readouterr().err


def write_with_checkpoint(folder, steps=40, save_at=20, trainer_steps=None):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, ledger=folder / "l.jsonl")
    for start, count in ((0, save_at), (save_at, steps - save_at)):
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), count, start=start)
        if not start:
            (folder / f"checkpoint-{save_at}").mkdir(parents=True, exist_ok=True)
            clipper.save_state(folder / f"checkpoint-{save_at}")
    clipper.close()
    if trainer_steps is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": trainer_steps}))
    return folder / "l.jsonl"


def test_checkpoints_beside_a_ledger_anchor_it(tmp_path):
    path = write_with_checkpoint(tmp_path, trainer_steps=40)
    (tmp_path / "l.jsonl.seal").unlink()
    report = verify_ledger(path)
    assert report.ok, report.findings
    assert report.anchors == [("checkpoint-20/clip_state.safetensors", 20)]
    assert "40 steps (trainer_state.json counts 40)" in report.summary()

    reseal(path, first_scale_changed)
    assert "Contradicted by checkpoint-20/clip_state.safetensors" in verify_ledger(path).summary()


def test_a_ledger_that_another_one_was_copied_over(tmp_path):
    path = write_with_checkpoint(tmp_path / "a")
    write_run(tmp_path / "b.jsonl")
    shutil.copy(tmp_path / "b.jsonl", path)
    assert len(verify_ledger(path).contradicted) == 2


def test_a_checkpoint_that_a_run_was_resumed_from_elsewhere_is_no_contradiction(tmp_path):
    write_with_checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a/checkpoint-20", tmp_path / "b/checkpoint-20")
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, ledger=tmp_path / "b/l.jsonl")
    clipper.load_state(tmp_path / "b/checkpoint-20")
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 20, start=20)
    clipper.close()
    report = verify_ledger(tmp_path / "b/l.jsonl")
    assert report.ok, report.findings


def test_fewer_steps_than_the_trainer_counts_are_not_verified(tmp_path):
    report = verify_ledger(write_with_checkpoint(tmp_path, trainer_steps=70))
    assert report.status == "incomplete"
    assert "trainer_state.json counts 70 steps, the ledger ends at 40" in report.summary()


def test_steps_from_before_the_ledger_are_told_by_its_header(tmp_path):
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, ledger=path)
    clipper.begins_after(30)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 40)
    clipper.close()
    for counted, status in ((70, "verified"), (71, "incomplete")):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": counted}))
        assert verify_ledger(path).status == status
    assert "counts 71 steps, the ledger ends at 40, 30 more were made before it" in verify_ledger(path).summary()


def test_no_step_is_not_verified(tmp_path):
    path = tmp_path / "l.jsonl"
    clipper = write_run(path, steps=10, faults={})
    assert clipper.step == 10
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "l.jsonl.seal").unlink()
    path.write_bytes(b"".join(lines[:2]))
    assert main(["verify", str(path)]) == 3
    assert "NOT verified as a whole: no step is under a seal" in verify_ledger(path).summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: {**h, "controller": "adaptive |\n<script>"}, "`controller` is 'adaptive |"),
        (lambda h: {**h, "controller": "static"}, "but that of the config is 'adaptive'"),
        (lambda h: {**h, "schema": True}, "the schema is True"),
        (lambda h: {**h, "schema": 1.0}, "the schema is 1.0"),
        (lambda h: {**h, "device": "cpu\n# Verified"}, "`device` is not a short text"),
        (lambda h: {**h, "versions": {"torch": "x" * 2000}}, "`versions` is not a table of short texts"),
        (lambda h: {**h, "groups": ["a\x00b"]}, "`groups` is not a list of names"),
        (lambda h: {**h, "groups": ["a", "b"]}, "`groups` names 2 things"),
        (lambda h: {**h, "num_tensors": -1}, "`num_tensors` is -1"),
        (lambda h: {**h, "first_step": True}, "`first_step` is True"),
        (lambda h: {**h, "static_threshold": -1}, "`static_threshold` is -1"),
        (lambda h: {**h, "counts": {"WITHIN": -4}}, "`counts` is not a table"),
        (lambda h: {**h, "counts": {"<b>": 4}}, "`counts` is not a table"),
        (lambda h: {**h, "initial_state": {**h["initial_state"], "level": "nan"}}, "`level` must be a number"),
        (lambda h: {**h, "initial_state": {**h["initial_state"], "count": -3}}, "`count` must not be negative"),
    ],
)
def test_a_header_that_is_sealed_anew_is_held_to_its_form(tmp_path, change, message):
    path = tmp_path / "l.jsonl"
    write_run(path, steps=12, faults={})
    reseal(path, lambda line: [change(line) if line["kind"] == "header" else line])
    assert any(message in f.message for f in violations(path)), verify_ledger(path).findings


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (5, {"time": -1.0}, "`time` is -1 s"),
        (5, {"time": "inf"}, "`time` is inf s"),
        (5, {"loss": "<b>"}, "cannot be understood"),
        (5, {"loss_scale": []}, "cannot be understood"),
        (5, {"applied_norm": -1.0}, "a norm is never negative"),
        (5, {"norm": -1.0}, "a norm is never negative"),
        (5, {"reason": "<b>bold</b>"}, "which this version does not know"),
    ],
)
def test_a_record_that_is_sealed_anew_is_held_to_what_can_be(tmp_path, step, change, message):
    path = tmp_path / "l.jsonl"
    write_run(path, steps=12, faults={})
    reseal(path, lambda line: [{**line, **change} if line.get("step") == step else line])
    assert any(message in f.message for f in violations(path)), verify_ledger(path).findings


def test_a_doubled_footer_and_two_ledgers_in_one_file(tmp_path):
    path = tmp_path / "l.jsonl"
    write_run(path, steps=12, faults={})
    content = path.read_bytes()
    reseal(path, lambda line: [line, line] if line["kind"] == "footer" else [line])
    assert any("a second footer" in f.message for f in violations(path))
    path.write_bytes(content + content)
    assert any("another ledger begins here" in f.message for f in violations(path))


def test_the_seal_beside_is_one_line_and_written_at_every_block(tmp_path):
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer, ledger=path)
    for start in range(0, 60, 20):
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 20, start=start)
        seal = json.loads((tmp_path / "l.jsonl.seal").read_bytes())
        lines = path.read_bytes().splitlines()
        assert (seal["lines"], seal["sha256"]) == (len(lines), json.loads(lines[-1])["sha256"])
    clipper.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.jsonl", "l.jsonl.seal"]


def test_a_seal_that_lags_behind_or_is_damaged_is_no_violation(tmp_path, caplog):
    path = tmp_path / "l.jsonl"
    write_run(path)
    old = (tmp_path / "l.jsonl.seal").read_bytes()
    (tmp_path / "l.jsonl.seal.tmp").mkdir()  # so that the seal cannot be written
    write_run(path)
    assert caplog.text.count("will not notice when the end of the ledger is cut off") == 1
    assert (tmp_path / "l.jsonl.seal").read_bytes() == old
    report = verify_ledger(path)
    assert report.ok, report.findings
    assert "Anchored up to step 45 by" in report.summary()
    (tmp_path / "l.jsonl.seal").write_text("{")
    report = verify_ledger(path)
    assert report.ok
    assert any("l.jsonl.seal cannot be understood" in f.message for f in report.findings)


def test_another_revision_of_a_rule_is_not_recomputed(tmp_path):
    path = tmp_path / "l.jsonl"
    write_run(path)
    reseal(path, lambda line: [{**line, "revision": 7} if line["kind"] == "header" else line])
    (tmp_path / "l.jsonl.seal").unlink()
    report = verify_ledger(path)

    assert report.status == "incomplete"
    assert "45 decision(s) could not be recomputed" in report.summary()
    assert (report.steps, report.recomputed, report.measured) == (45, 0, 1)
    assert any(f"adaptive in revision 7, not {CONTROLLERS['adaptive'].revision}" in f.message for f in report.findings)
