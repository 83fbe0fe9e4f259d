"""The batch of an incident once more through a script's model: the same numbers, and the sample that carries the norm."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hf_adaclip.cli import main
from hf_adaclip.incidents.folder import find_incidents
from hf_adaclip.incidents.replay import asked, replay
from tests.integrations import launching, replay_script
from tests.integrations.replay_script import AT, BAD, PLACE

pytestmark = pytest.mark.slow
SCRIPT = replay_script.__file__


def answer(capsys, folder, *options, step=AT, script=(SCRIPT, "llama"), flags=()):
    capsys.readouterr()  # of the training
    code = main(["incident", str(folder), str(step), "--json", *options, "--replay", *script, str(folder), *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "vit", "attach-llama"])
def test_from_the_weights_of_the_step_it_gives_what_was_recorded_and_names_the_sample(
    kind, accumulation, tmp_path, capsys
):
    changes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    replay_script.make_trainer(kind, tmp_path, **changes).train()
    before, arguments, path = files(tmp_path), list(sys.argv), list(sys.path)
    flags = [f"{k}={v}" for k, v in changes.items()]
    found = answer(capsys, tmp_path, "--bisect", script=(SCRIPT, kind), flags=flags)
    assert found["weights"] == str(tmp_path / "checkpoint-40")
    assert (found["steps_before"], found["micro_batches"]) == (0, accumulation)
    if kind == "vit":
        assert (found["replayed"]["norm"], found["recorded"]["norm"]) == ("nan", "nan")
    else:
        for key in ("loss", "norm"):
            assert found["replayed"][key] == pytest.approx(found["recorded"][key], rel=1e-4)
        for now, then in zip(found["replayed"]["modules"], found["recorded"]["modules"], strict=True):
            assert now["share"] == pytest.approx(then["share"], abs=1e-3)
    assert found["samples_in_all"] == len(found["samples"]) == 8
    worst, next_one = found["samples"][:2]
    assert worst["index"] == BAD
    assert worst["micro_batch"] * (8 // accumulation) + worst["sample"] == PLACE
    if kind == "vit":
        assert [one["norm"] for one in found["samples"]].count("nan") == 1 == [worst["norm"]].count("nan")
    else:
        assert worst["norm"] > 5 * next_one["norm"]
        assert worst["share"] > 0.9
        assert " the " in next_one["text"]
        assert worst["text"] == "\xc8" * 32
    assert files(tmp_path) == before  # nothing is written
    assert (sys.argv, sys.path, asked()) == (arguments, path, None)


def test_a_stock_script_from_an_earlier_checkpoint_or_from_the_beginning(tmp_path, capsys):
    replay_script.make_trainer("llama", tmp_path, save_steps=30).train()
    found = answer(capsys, tmp_path, "--bisect", script=(SCRIPT, "stock-llama"))
    assert (Path(found["weights"]).name, found["steps_before"]) == ("checkpoint-30", 10)
    assert found["samples"][0]["index"] == BAD
    (tmp_path / "checkpoint-30").rename(tmp_path / "kept")
    (tmp_path / "checkpoint-50").rename(tmp_path / "checkpoint-41")  # after the step
    found = answer(capsys, tmp_path)
    assert found["weights"] is None
    assert found["replayed"]["loss"] == pytest.approx(5.5, abs=0.3)
    assert "samples" not in found
    assert Path(answer(capsys, tmp_path, "--checkpoint", str(tmp_path / "kept"))["weights"]).name == "kept"

    assert main(["incident", str(tmp_path), str(AT), "--bisect", "--replay", SCRIPT, "llama", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "weights: those that the script begins with" in said
    assert "8 of 8 samples, each alone" in said
    assert f" {BAD} " in said


def test_a_run_that_goes_on_from_a_stock_checkpoint_counts_as_its_checkpoints_do(tmp_path, capsys):
    replay_script.make_trainer("stock-llama", tmp_path, max_steps=10, save_steps=10).train()
    trainer = replay_script.make_trainer("llama", tmp_path, save_steps=10)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    [incident] = find_incidents(tmp_path)
    assert (incident.step, incident.facts["trainer_step"]) == (AT - 10, AT)
    assert incident.facts == trainer.clipper.incidents[0].facts
    found = answer(capsys, tmp_path, "--bisect", step=AT - 10)
    assert (Path(found["weights"]).name, found["steps_before"]) == ("checkpoint-40", 0)
    assert found["replayed"]["norm"] == pytest.approx(found["recorded"]["norm"], rel=1e-4)
    assert found["samples"][0]["index"] == BAD


def test_a_loop_answers_by_one_line(tmp_path, capsys):
    replay_script.train_in_a_loop(tmp_path)
    found = answer(capsys, tmp_path, "--bisect", script=(SCRIPT, "loop"))
    assert found["replayed"]["norm"] == pytest.approx(found["recorded"]["norm"], rel=1e-4)
    assert found["samples"][0]["index"] == BAD
    [incident] = find_incidents(tmp_path)
    again = replay(
        replay_script.llama(), incident.folder, lambda model, batch: model(**batch).loss, bisect=True, rank=0
    )
    assert again["samples"][0]["index"] == BAD


def test_the_batches_of_several_ranks_give_the_step_together_and_one_by_one(tmp_path, capsys):
    launching.launch("tests.integrations.replay_script", ["ranks"], tmp_path)
    found = answer(capsys, tmp_path, "--bisect")
    assert (found["ranks"], found["world_size"], found["micro_batches"]) == ([0, 1], 2, 2)
    for key in ("loss", "norm"):
        assert found["replayed"][key] == pytest.approx(found["recorded"][key], rel=1e-3)
    worst = found["samples"][0]
    assert (worst["rank"], worst["index"], worst["sample"]) == (1, BAD, PLACE - 4)
    calm = answer(capsys, tmp_path, "--rank", "0", "--bisect")
    assert (calm["ranks"], calm["micro_batches"], len(calm["samples"])) == ([0], 1, 4)
    assert calm["replayed"]["norm"] < found["replayed"]["norm"] / 10
    alone = answer(capsys, tmp_path, "--rank", "1")
    assert alone["replayed"]["norm"] > found["replayed"]["norm"]
    (tmp_path / "incidents/step-00040/incident-rank1.json").unlink()
    assert main(["incident", str(tmp_path), "40", "--rank", "1", "--replay", SCRIPT, "llama", str(tmp_path)]) == 2
    assert "every node keeps its own" in capsys.readouterr().err


def test_of_hashes_alone_the_samples_are_taken_from_the_dataset(tmp_path, capsys, monkeypatch):
    clip = {"incident_batch": "hash", "max_pace": 1.0, "spectral_width": None, "agreement": False}
    replay_script.make_trainer("llama", tmp_path, clip=clip).train()
    [incident] = find_incidents(tmp_path)
    assert not (incident.folder / "batch.safetensors").exists()
    found = answer(capsys, tmp_path, "--bisect")
    assert found["replayed"]["norm"] == pytest.approx(found["recorded"]["norm"], rel=1e-4)
    assert found["samples"][0]["index"] == BAD

    facts = json.loads((incident.folder / "incident.json").read_text())
    facts["batch"]["hashes"][0]["sha256"] = "0" * 64
    (incident.folder / "incident.json").write_text(json.dumps(facts))
    code = main(["incident", str(tmp_path), str(AT), "--replay", SCRIPT, "llama", str(tmp_path)])
    assert code == 2
    assert "have other hashes" in capsys.readouterr().err
    del facts["batch"]["indices"]
    (incident.folder / "incident.json").write_text(json.dumps(facts))
    assert main(["incident", str(tmp_path), str(AT), "--replay", SCRIPT, "llama", str(tmp_path)]) == 2
    assert "`incident_batch` is 'hash'" in capsys.readouterr().err


def test_what_cannot_be_replayed_is_said(tmp_path, capsys, monkeypatch):
    replay_script.make_trainer("llama", tmp_path).train()
    run = ["incident", str(tmp_path)]

    def refused(*arguments):
        assert main([*run, *arguments]) == 2
        return capsys.readouterr().err

    assert "must come with `--replay SCRIPT`" in refused("40", "--bisect")
    assert "`STEP` must be given" in refused("--replay", SCRIPT)
    assert "`SCRIPT` must follow" in refused("40", "--replay")
    assert "'nowhere.py' is no file" in refused("40", "--replay", "nowhere.py")
    assert "ended without one" in refused("40", "--replay", SCRIPT, "nothing", "x")
    assert "was ended before its first step" in refused("40", "--replay", SCRIPT, "stubborn", str(tmp_path))
    assert not (tmp_path / "trained").exists()
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # afterwards everybody may again
    assert "one of 0 to 0, but is 1" in refused("40", "--rank", "1", "--replay", SCRIPT, "llama", str(tmp_path))
    assert "none is none" in refused("40", "--checkpoint", "none", "--replay", SCRIPT)
    assert "must hold the model's whole weights" in refused(
        "40", "--checkpoint", str(tmp_path / "incidents"), "--replay", SCRIPT, "llama", str(tmp_path)
    )
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.is_fsdp_enabled", True, raising=False)
        patched.setenv("WORLD_SIZE", "2")
        assert "must run in one process" in refused("40", "--replay", SCRIPT, "llama", str(tmp_path))
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    assert "ended with status 3" in refused("40", "--replay", str(script))
    assert torch.is_grad_enabled()


def test_of_many_samples_halving_finds_the_bad_ones():
    from hf_adaclip.incidents.samples import MOST_ALONE, bisect

    looks = []

    def measure(number, rows):
        looks.append(len(rows["x"]))
        return 0.0, float(rows["x"].mean())

    x = torch.rand(5000)
    x[[7, 4100]] = 900.0
    other = torch.rand(3000)
    other[2999] = float("nan")
    found = bisect([{"x": x, "lengths": 1}, {"x": other}], measure)
    assert [(s.micro_batch, s.row) for s in found[:1]] == [(1, 2999)]
    assert {(s.micro_batch, s.row) for s in found[1:3]} == {(0, 7), (0, 4100)}
    assert len(looks) <= MOST_ALONE + 1


def test_samples_of_odd_batches():
    from hf_adaclip.incidents.samples import count_of, rows_of

    two = torch.zeros(2, 3)
    batch = {"x": two, "words": ["a", "b"], "nested": [{"y": two}], "number": torch.tensor(3), "name": "z"}
    assert count_of(batch) == 2
    row = rows_of(batch, 1, 2)
    assert (row["x"].shape, row["words"], row["nested"][0]["y"].shape, row["name"]) == ((1, 3), ["b"], (1, 3), "z")
    assert count_of({"input_ids": two, "pixel_values": torch.zeros(7, 3)}) == 2
    assert rows_of({"input_ids": two, "pixel_values": torch.zeros(7, 3)}, 0, 1)["pixel_values"].shape == (7, 3)
    assert count_of((two, torch.zeros(2))) == 2
    assert count_of({"a": two, "b": torch.zeros(7)}) == count_of("text") == count_of({}) == 0
