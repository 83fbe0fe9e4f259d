"""A bad reward in GRPO: the incident holds what was generated for it, and with the preset `rl` it leaves no trace."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from hf_adaclip import attach
from hf_adaclip.cli import main
from hf_adaclip.incidents.contents import load_batch
from hf_adaclip.incidents.folder import find_incidents

pytestmark = pytest.mark.slow
pytest.importorskip("trl")
AT = 50


class Weights(TrainerCallback):
    """Of every step."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters()]).clone())


class Judge:
    """Counts a letter; in one generation the worst completion is worth too much."""

    __name__ = "judge"

    def __init__(self, bad, at=AT):
        self.bad, self.at, self.calls = bad, at, []

    def __call__(self, completions, **kwargs):
        self.calls.append(list(completions))
        rewards = [float(text.count("a")) for text in completions]
        if len(self.calls) == self.at + 1:
            rewards[rewards.index(min(rewards))] = self.bad
        return rewards


def train(folder, clip, bad, *, at=AT, **settings):
    """The Trainer, its judge, and the weights after every step."""
    from scripts.study.grpo import make_trainer

    judge, weights = Judge(bad, at), Weights()
    settings = {"scale_rewards": "none", "max_steps": 60, "logging_steps": 4, **settings}
    trainer = make_trainer(folder, judge, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(weights)
    if clip is not None:
        attach(trainer, clip=clip)
    trainer.train()
    return trainer, judge, weights.seen


def rewards_after(trainer, step):
    late = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry and entry["step"] > step]
    return sum(late) / len(late)


def test_the_completions_and_rewards_of_a_bad_step_are_kept_and_its_weights_are(lane, tmp_path, capsys):
    trainer, judge, weights = train(tmp_path, "rl", 1e6)
    [incident] = trainer.clipper.incidents
    assert (incident.step, incident.kind) == (AT, "skipped")
    assert torch.equal(weights[AT], weights[AT - 1])
    assert not torch.equal(weights[AT - 1], weights[AT - 2])
    assert not torch.equal(weights[AT + 1], weights[AT])

    [kept] = load_batch(incident.folder)
    words, generated = trainer.processing_class, judge.calls[AT]
    completions = words.batch_decode(kept["completion_ids"], skip_special_tokens=True)
    assert sorted(completions) == sorted(generated)
    rows = [json.loads(line) for line in (incident.folder / "generations.jsonl").read_text().splitlines()]
    assert sorted(row["completion"] for row in rows) == sorted(generated)
    [bad] = [row for row in rows if row["rewards"]["judge"] == 1e6]
    assert all(row["rewards"]["judge"] == row["completion"].count("a") for row in rows if row is not bad)
    assert bad["advantage"] > 1e5
    assert (
        completions[int(kept["advantages"].argmax())] == bad["completion"]
    )  # in another order than they were judged in
    assert "completion_ids" in (incident.folder / "text.jsonl").read_text()
    capsys.readouterr()
    assert main(["incident", str(tmp_path), str(AT)]) == 0
    assert f"judge 1e+06 {bad['completion']}" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 0
    assert "Completions and rewards" in (tmp_path / "report.html").read_text()


def test_a_replay_of_a_policys_step_generates_nothing_and_names_the_completion(tmp_path, capsys):
    script = tmp_path / "grpo.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.integrations.test_incidents_grpo import AT, train\n"
        "train(Path(sys.argv[1]), None, 1e6, save_strategy='steps', save_steps=AT)\n"
    )
    train(tmp_path / "run", "rl", 1e6, save_strategy="steps", save_steps=AT)
    [incident] = find_incidents(tmp_path / "run")
    capsys.readouterr()
    where = [str(tmp_path / "run"), str(AT), "--bisect", "--json"]
    assert main(["incident", *where, "--replay", str(script), str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("loss", "norm"):
        assert found["replayed"][key] == pytest.approx(found["recorded"][key], rel=1e-3)
    kept = load_batch(incident.folder)[0]
    assert len(found["samples"]) == 8
    # Its advantage is the only one above 0, and 3 others are of its group.
    assert found["samples"][0]["sample"] == int(kept["advantages"].abs().argmax())


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1e6])
def test_no_reward_leaves_weights_that_are_no_numbers(bad, tmp_path):
    trainer, _, weights = train(tmp_path, "rl", bad)
    assert weights[-1].isfinite().all()
    if bad == bad:  # of NaN TRL makes 0
        assert torch.equal(weights[AT], weights[AT - 1])
        assert [incident.step for incident in trainer.clipper.incidents] == [AT]


def test_stock_is_set_back_by_a_step_that_the_preset_leaves_out(tmp_path):
    # With clipping out of the way, as with a `max_grad_norm` far above the norms: one step, and Adam's memory of it.
    settings = {"learning_rate": 3e-3, "max_grad_norm": 1e9, "max_steps": 90, "lr_scheduler_type": "constant"}
    stock, _, moved = train(tmp_path / "stock", None, 1e6, at=30, **settings)
    ours, _, kept = train(tmp_path / "ours", "rl", 1e6, at=30, **settings)
    assert torch.equal(kept[30], kept[29])
    assert not torch.equal(moved[30], moved[29])
    assert rewards_after(ours, 60) > 6 > 3 > rewards_after(stock, 60)


def test_all_steps_on_a_broken_generation_are_left_out(tmp_path):
    settings = {"num_iterations": 8, "learning_rate": 1e-2, "max_steps": 70}
    ours, _, kept = train(tmp_path, "rl", 1e6, at=7, **settings)
    assert all(torch.equal(kept[step], kept[55]) for step in range(56, 64))
    assert not torch.equal(kept[64], kept[63])
    assert [incident.step for incident in ours.clipper.incidents] == [56, 57, 58]  # of a series the first three


def test_in_a_healthy_run_the_preset_clips_as_stock_does(tmp_path):
    stock, _, _ = train(tmp_path / "stock", "static", 0.0, at=-2, learning_rate=3e-3)
    ours, _, _ = train(tmp_path / "ours", "rl", 0.0, at=-2, learning_rate=3e-3)
    assert ours.clipper.statistics.metrics()["clip/skipped_total"] == 0
    assert ours.clipper.incidents == stock.clipper.incidents == []
    assert rewards_after(ours, 40) > rewards_after(stock, 40) - 1


def test_without_the_logs_of_the_trainer_there_are_no_rewards_and_no_harm(tmp_path):
    from hf_adaclip.integrations.generations import Generations

    said: list[str] = []
    generations = Generations(object(), private=False, excuse=said.append)
    generations.note(3)
    private = Generations(SimpleNamespace(_logs={"completion": ["x"]}), private=True, excuse=said.append)
    private.note(3)
    odd = Generations(
        SimpleNamespace(_logs={"completion": ["x"], "rewards": {"r": ["?"]}}), private=False, excuse=said.append
    )
    odd.note(3)
    incident: Any = SimpleNamespace(step=3, folder=tmp_path)
    for one in (generations, private, odd):
        one.write(incident)
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1
