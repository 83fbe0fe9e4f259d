"""Going back in a Trainer: the weights are those of a run to which the data was never given."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipMixin, AdaptiveClipper, AdaptiveClipTrainer, attach
from hf_adaclip.audit.verify import verify_ledger
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.incidents.rules import Finding
from hf_adaclip.incidents.skip_list import SKIP_FILE, SkipList
from tests.integrations import launching
from tests.integrations.settings import Mlp, Rows, Stream, _lora, _ragged, arguments, llama

REWIND: dict[str, Any] = {
    "on_trouble": "rewind",
    "snapshot_steps": 5,
    "warmup_observations": 5,
    "incident_steps": 5,
    "pace_start": 5,  # not by the number of steps that are planned, of which a run that is cut off has others
}


class Planted(TrainerCallback):
    """Finds trouble in some steps, as a rule on incidents does: it began a step before."""

    def __init__(self, trainer: Any, steps: Any) -> None:
        self._trainer, self._steps = trainer, list(steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            clipper = self._trainer.clipper
            clipper.rewinder.judge(clipper.step, Finding("zero_loss", "Planted trouble.", 1.0, 1))


def trainer_of(
    folder: Path,
    trouble: Any = (),
    *,
    clip: dict[str, Any] | None = None,
    model: Any = llama,
    rows: Any = None,
    more: Any = None,
    callbacks: Any = (),
    kind: Any = AdaptiveClipTrainer,
    **args: Any,
) -> Any:
    set_seed(0)
    made, settings = model(), arguments(folder, **{"max_steps": 40, "lr_scheduler_type": "cosine", **args})
    trainer = kind(
        model=made,
        args=settings,
        train_dataset=Rows(256) if rows is None else rows(),
        eval_dataset=Rows(16),
        clip=AdaptiveClipConfig(**{**REWIND, **(clip or {})}),
        callbacks=list(callbacks),
        **({} if more is None else more(made, settings)),
    )
    trainer.add_callback(Planted(trainer, trouble))
    return trainer


def run(folder: Path, trouble: Any = (), *, resume: str | None = None, planted: Any = None, **ways: Any) -> Any:
    trainer = trainer_of(folder, trouble, **ways)
    if planted is not None:
        trainer.add_callback(planted(trainer, ()))
    set_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def skipping(folder: Path, steps: Any, samples: Any = (), **ways: Any) -> Any:
    folder.mkdir(exist_ok=True)
    SkipList(frozenset(steps), frozenset(samples)).write(folder)
    return run(folder, clip={**ways.pop("clip", {}), "on_trouble": "continue"}, **ways)


def weights(trainer: Any) -> list[torch.Tensor]:
    return [*trainer.model.state_dict().values()]


def state_of(trainer: Any) -> list[torch.Tensor]:
    """Weights, and all that the optimizer remembers."""
    state = trainer.optimizer.state_dict()["state"]
    more = [v for values in state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return [*weights(trainer), *more, *(v for v in clip_state(trainer))]


def clip_state(trainer: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(v) for v in trainer.clipper.state.values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(-7), y.nan_to_num(-7)) for x, y in zip(a, b, strict=True))


def left_out(folder: Path) -> list[int]:
    content = json.loads((folder / SKIP_FILE).read_text())
    assert content["samples"] == []
    return list(content["steps"])


@dataclass(frozen=True)
class Case:
    """One way to train and to get into trouble.

    Attributes:
        trouble: Steps at which it is found.
        undone: Steps that are then left out.
        ways: As for `trainer_of`.
    """

    trouble: tuple[int, ...]
    undone: list[int]
    ways: dict[str, Any] = field(default_factory=dict)


def _normal() -> Any:
    return Mlp(normal=True)


CASES = {
    "as it comes": Case((24,), [*range(10, 25)]),
    "from the first snapshot": Case((4,), [*range(5)]),
    "in the last step": Case((39,), [*range(25, 40)]),
    "twice for the same place": Case((24, 26), [*range(10, 27)]),
    "at two places": Case((19, 38), [*range(5, 20), *range(25, 39)]),
    "in a step that is time for a snapshot": Case((24,), [*range(10, 25)], {"clip": {"snapshot_steps": 5}}),
    "accumulation": Case(
        (24,), [*range(10, 25)], {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    ),
    "accumulation, in the first epoch's last window": Case(
        (10,),
        [*range(11)],
        {
            "gradient_accumulation_steps": 3,
            "max_steps": -1,
            "num_train_epochs": 2,
            "clip": {"snapshot_steps": 5},
            "rows": lambda: Rows(256),
        },
    ),
    "across an epoch's end": Case((20,), [*range(5, 21)], {"rows": lambda: Rows(128)}),
    "across an epoch's end, with accumulation": Case(
        (20,), [*range(5, 21)], {"rows": lambda: Rows(136), "gradient_accumulation_steps": 2}
    ),
    "pace": Case((34,), [*range(20, 35)], {"clip": {"max_pace": 8.0, "pace_trust": 1.0, "pace_start": 2}}),
    "LoRA": Case((24,), [*range(10, 25)], {"model": _lora}),
    "buffers, and a parameter without a gradient": Case((24,), [*range(10, 25)], {"model": _normal}),
    "per tensor": Case((24,), [*range(10, 25)], {"clip": {"granularity": "tensor"}}),
    "limits": Case((24,), [*range(10, 25)], {"clip": {"max_widening_100": 2.0, "divergence_spreads": 9.0}}),
    "a controller that leaves out": Case((24,), [*range(10, 25)], {"clip": {"controller": "log_zscore"}}),
    "batches of like lengths": Case(
        (24,),
        [*range(10, 25)],
        {"train_sampling_strategy": "group_by_length", "rows": lambda: Rows(320, ragged=True), "more": _ragged},
    ),
    "two loader processes": Case((24,), [*range(10, 25)], {"dataloader_num_workers": 2}),
    "an iterable dataset": Case((24,), [*range(10, 25)], {"rows": Stream}),
    "SGD": Case((24,), [*range(10, 25)], {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}),
    "adafactor": Case((24,), [*range(10, 25)], {"optim": "adafactor"}),
    "a schedule of the moments, too": Case(
        (24,),
        [*range(10, 25)],
        {
            "more": lambda model, args: {
                "optimizers": (
                    optimizer := torch.optim.AdamW(model.parameters(), lr=1e-3),
                    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=50),
                )
            }
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_a_run_that_was_never_given_the_data(name, tmp_path):
    case = CASES[name]
    back = run(tmp_path / "back", case.trouble, **case.ways)
    assert left_out(tmp_path / "back") == case.undone
    never = skipping(tmp_path / "never", case.undone, **case.ways)
    assert equal(state_of(back), state_of(never))
    assert back.state.global_step == never.state.global_step
    assert back.lr_scheduler.get_last_lr() == never.lr_scheduler.get_last_lr()
    assert torch.equal(torch.tensor(back.state.epoch), torch.tensor(never.state.epoch))
    for folder, segments in ((tmp_path / "back", 1 + len(case.trouble)), (tmp_path / "never", 1)):
        report = verify_ledger(folder / "clip_ledger.jsonl")
        assert report.status == "verified", report.findings
        assert (report.segments, report.closed) == (segments, True)
    rows = [json.loads(line) for line in (tmp_path / "never/clip_ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("reason") == "LEFT_OUT"] == case.undone
    told = [row for row in back.state.log_history if "clip/rewound_to" in row]
    assert len(told) == len(case.trouble)


def test_the_steps_that_are_undone_did_matter(tmp_path):
    plain, back = run(tmp_path / "plain"), run(tmp_path / "back", [24])
    assert not equal(weights(plain), weights(back))
    paced = CASES["pace"]
    paced = run(tmp_path / "paced", paced.trouble, **paced.ways)
    rows = [json.loads(line) for line in (tmp_path / "paced/clip_ledger.jsonl").read_text().splitlines()]
    paces = {row["step"]: row["pace"] for row in rows if row["kind"] == "step"}
    assert paces[19] > 1.5
    assert paces[35] < 1.3


class Spoiling(AdaptiveClipTrainer):
    """Goes up its loss, a long way, in two steps."""

    bad: Any = ()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # The same value with another gradient; but what is no number is none.
        return loss + (self.factor - 1.0) * (loss - loss.detach()) if self.state.global_step in self.bad else loss

    factor = -300.0


@pytest.mark.parametrize("way", ["a loss that stays high", "the rules on incidents", "a budget of steps"])
def test_trouble_is_found_and_undone(lane, way, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Spoiling, "bad", (41, 42))
    clip: dict[str, Any] = {"controller": "static", "static_threshold": "inf", "snapshot_steps": 10}
    ways: dict[str, Any] = {"kind": Spoiling, "max_steps": 90, "optim": "sgd", "learning_rate": 1.0}
    if way == "a loss that stays high":
        clip |= {"divergence_spreads": 4.0, "divergence_steps": 6, "incident_steps": 5}
    elif way == "a budget of steps":
        monkeypatch.setattr(Spoiling, "factor", float("nan"))
        clip |= {"max_skipped": 1}
    else:
        clip |= {"incident_steps": 6}
    back = run(tmp_path / "back", clip=clip, **ways)
    undone = left_out(tmp_path / "back")
    assert {41, 42} <= set(undone), undone
    assert undone[0] % 10 == 0
    assert undone[0] <= 31
    assert len(undone) < 65
    assert len(back.clipper.rewinder.history) == 1
    never = skipping(tmp_path / "never", undone, clip={k: v for k, v in clip.items() if k != "max_skipped"}, **ways)
    assert equal(weights(back), weights(never))
    line = next(r.getMessage() for r in caplog.records if "were put back" in r.getMessage())
    for said in (f"step {undone[-1]}", f"before step {undone[0]}", f"steps {undone[0]} to {undone[-1]} left out"):
        assert said in line, line


def test_a_spike_and_a_step_that_is_left_out_are_no_reason(lane, tmp_path, monkeypatch):
    monkeypatch.setattr(Spoiling, "bad", (41,))
    for factor in (1e4, float("nan")):
        monkeypatch.setattr(Spoiling, "factor", factor)
        back = run(tmp_path / str(factor), kind=Spoiling, max_steps=60, clip={"divergence_spreads": 6.0})
        assert back.clipper.rewinder.history == []
        assert back.clipper.incidents
        assert not (tmp_path / str(factor) / SKIP_FILE).exists()


# -- what was evaluated and saved in the meantime ------------------------------------------------------------------

EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


class Metric(TrainerCallback):
    """Puts numbers of its own in the place of the evaluated loss, by step: the best ones are in the steps that are undone."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_loss"] = 0.1 if 11 <= state.global_step <= 24 else 5.0 - 0.01 * state.global_step


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*checkpoint-*")}


def test_what_was_evaluated_and_saved_in_the_meantime_is_put_back(tmp_path):
    patience = EarlyStoppingCallback(early_stopping_patience=7)
    back = run(tmp_path, [24], callbacks=[Metric(), patience], **EVALUATED)
    # Without it the evaluations of step 26 would be one worse than the best too many.
    assert back.state.global_step == 40
    assert back.state.best_metric == pytest.approx(4.6)
    assert back.state.best_model_checkpoint == str(tmp_path / "checkpoint-40")
    assert patience.early_stopping_patience_counter == 0
    undone = {f"undone-checkpoint-{n}" for n in range(12, 25, 2)}
    assert folders(tmp_path) == undone | {f"checkpoint-{n}" for n in (*range(2, 11, 2), *range(26, 41, 2))}
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-40")
    told = json.loads((tmp_path / "checkpoint-40/trainer_state.json").read_text())["log_history"]
    [row] = [row for row in told if "clip/rewound_to" in row]
    assert (row["clip/rewound_to"], row["clip/left_out"], row["step"]) == (10, 15, 25)


def test_the_number_of_checkpoints_stays_limited_and_a_best_one_that_is_gone_is_forgotten(tmp_path, caplog):
    back = run(tmp_path, [24], callbacks=[Metric()], save_total_limit=2, **EVALUATED)
    assert back.state.global_step == 40
    # The best of before was deleted for one that was undone.
    assert "the next evaluation is the best again" in caplog.text
    assert back.state.best_model_checkpoint == str(tmp_path / "checkpoint-40")
    ours = {name for name in folders(tmp_path) if not name.startswith("undone-")}
    assert ours == {"checkpoint-38", "checkpoint-40"}
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-40")


@pytest.mark.parametrize("checkpoint", [10, 25, 30])
def test_a_run_that_is_resumed_leaves_out_the_same(checkpoint, tmp_path):
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    back = run(tmp_path, [24], **saved)
    assert {f"checkpoint-{n}" for n in (5, 10, 25, 30)} <= folders(tmp_path)
    again = run(tmp_path, resume=str(tmp_path / f"checkpoint-{checkpoint}"), **saved)
    assert equal(state_of(back), state_of(again))
    if checkpoint == 10:  # in the middle of the steps that are left out, too
        last = run(tmp_path, resume=str(tmp_path / "checkpoint-15"), **saved)
        assert equal(state_of(back), state_of(last))
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.status == "verified", report.findings


def test_a_run_that_is_resumed_goes_back_too(tmp_path):
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 15}
    run(tmp_path / "back", max_steps=15, lr_scheduler_type="constant", **saved)
    checkpoint = str(tmp_path / "back/checkpoint-15")
    back = run(tmp_path / "back", [29], resume=checkpoint, lr_scheduler_type="constant", **saved)
    undone = left_out(tmp_path / "back")
    assert undone == [*range(15, 30)]
    never = skipping(tmp_path / "never", undone, lr_scheduler_type="constant")
    assert equal(state_of(back), state_of(never))
    report = verify_ledger(tmp_path / "back/clip_ledger.jsonl")
    assert report.status == "verified", report.findings


# -- the end of going back -----------------------------------------------------------------------------------------


def test_training_ends_when_it_went_back_too_often(tmp_path, caplog):
    back = run(tmp_path, [14, 20, 26, 32], clip={"max_rewinds": 2}, save_strategy="steps", save_steps=100)
    assert back.state.global_step == 27
    assert len(back.clipper.rewinder.history) == 3
    said = next(r.getMessage() for r in caplog.records if "`max_rewinds` (2) is spent" in r.getMessage())
    assert "went back 2 time(s) before, and left out steps" in said
    # What is kept are the weights of before, and whoever goes on has left out the rest.
    assert "checkpoint-27" in folders(tmp_path)
    first = back.clipper.rewinder.history[-1].first
    early = run(tmp_path / "early", max_steps=first, lr_scheduler_type="cosine")
    assert left_out(tmp_path)[-1] == 26
    del early


def test_nothing_to_go_back_to_ends_it_too(tmp_path, caplog):
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 15}
    run(tmp_path, max_steps=15, **saved)
    back = run(tmp_path, [15], resume=str(tmp_path / "checkpoint-15"), **saved)
    assert back.state.global_step == 16
    assert "there is no snapshot or checkpoint from before" in caplog.text


@pytest.mark.parametrize("clip", [{}, {"max_pace": 8.0, "pace_start": 2, "pace_trust": 1.0}], ids=["plain", "pace"])
def test_a_checkpoint_does_where_no_snapshot_is_old_enough(clip, tmp_path):
    """Trouble right after a run is gone on with, which began before."""
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "constant"}
    run(tmp_path / "back", max_steps=30, clip=clip, **saved)
    back = run(tmp_path / "back", [30], resume=str(tmp_path / "back/checkpoint-30"), clip=clip, **saved)
    undone = left_out(tmp_path / "back")
    assert undone == [*range(10, 31)]
    assert {f"undone-checkpoint-{n}" for n in (20, 30)} | {"checkpoint-10", "checkpoint-40"} == folders(
        tmp_path / "back"
    )
    never = skipping(tmp_path / "never", undone, clip=clip, **saved)
    assert equal(state_of(back), state_of(never))
    report = verify_ledger(tmp_path / "back/clip_ledger.jsonl")
    assert report.num_violations == 0, report.findings


def test_an_attached_trainer_goes_back_too(tmp_path):
    trainer = trainer_of(tmp_path / "whole", [24])
    set_seed(0)
    trainer.train()
    set_seed(0)
    plain = Trainer(
        model=llama(),
        args=arguments(tmp_path / "attached", max_steps=40, lr_scheduler_type="cosine"),
        train_dataset=Rows(256),
    )
    attached = attach(plain, AdaptiveClipConfig(**REWIND))
    attached.add_callback(Planted(attached, [24]))
    set_seed(0)
    attached.train()
    assert equal(weights(trainer), weights(attached))
    assert left_out(tmp_path / "attached") == [*range(10, 25)]


# -- samples, files and settings -------------------------------------------------------------------------------------


class Seen(AdaptiveClipTrainer):
    """Notes the rows that it is trained on."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.__dict__.setdefault("seen", []).extend(map(tuple, inputs["input_ids"].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


class Numbered(Rows):
    """Rows that differ from each other."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= len(self):
            raise IndexError(i)
        tokens = [i % 32, i // 32, *[(i + k) % 32 for k in range(10)]]
        return {"input_ids": tokens, "labels": tokens, "attention_mask": [1] * 12}


SAMPLED: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "two loader processes": {"dataloader_num_workers": 2},
    "batches of like lengths": {"train_sampling_strategy": "group_by_length"},
    "in order": {"train_sampling_strategy": "sequential"},
}


@pytest.mark.parametrize("ways", SAMPLED.values(), ids=SAMPLED)
def test_samples_are_left_out_and_the_order_of_the_others_stays(ways, tmp_path):
    # Lengths are grouped anew in every epoch, by random numbers that the batches of before have moved on.
    epochs = 1 if ways.get("train_sampling_strategy") == "group_by_length" else 2
    ways = {"kind": Seen, "rows": lambda: Numbered(100), "max_steps": -1, "num_train_epochs": epochs, **ways}
    clip = {"on_trouble": "continue"}
    plain = run(tmp_path / "plain", clip=clip, **ways)
    bad = [5, 42, 99, 1000]
    some = skipping(tmp_path / "some", [], bad, **ways)
    rows = [tuple(Numbered(100)[i]["input_ids"]) for i in bad[:3]]
    assert set(rows) <= set(plain.seen)
    assert some.seen == [row for row in plain.seen if row not in rows]
    assert some.state.global_step == epochs * 13
    assert len(some.seen) == epochs * 97


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must be an object with steps and samples"),
        ("{", "must be a readable JSON file"),
        ('{"steps": [1], "sample": []}', "no other keys than steps and samples, but .* has 'sample'"),
        ('{"steps": 3}', "`steps` .* list of whole numbers"),
        ('{"steps": [1.5]}', "`steps` .* has 1.5"),
        ('{"samples": [-1]}', "`samples` .* has -1"),
        ('{"steps": [true]}', "`steps` .* has True"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(content, said, tmp_path):
    (tmp_path / SKIP_FILE).write_text(content)
    with pytest.raises(ConfigError, match=said):
        run(tmp_path)


def test_samples_of_an_iterable_dataset_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="iterable dataset, whose samples have no position"):
        skipping(tmp_path, [], [3], rows=Stream)


def test_the_loss_that_is_logged_is_that_of_the_other_steps(tmp_path):
    ways: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 20}
    some = skipping(tmp_path / "some", [6, 7, 10, 11, 12, 13, 14], logging_steps=5, **ways)
    each = skipping(tmp_path / "each", [6, 7, 10, 11, 12, 13, 14], **ways)
    by_step = {row["step"]: row["loss"] for row in each.state.log_history if "loss" in row}
    logged = {row["step"]: row["loss"] for row in some.state.log_history if "loss" in row}
    assert logged[10] == pytest.approx(sum(by_step[n] for n in (6, 9, 10)) / 3, rel=1e-4)
    assert logged[15] == pytest.approx(by_step[10], rel=1e-4)


def _lbfgs(model: Any, args: Any) -> dict[str, Any]:
    return {"optimizers": (torch.optim.LBFGS(model.parameters()), None)}


class _Hoarding(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.slow = torch.zeros(3)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (_lbfgs, "LBFGS"),
        (lambda model, args: {"optimizers": (_Hoarding(model.parameters(), lr=0.1), None)}, "`slow`"),
    ],
)
def test_what_cannot_be_put_back_is_refused(more, why, tmp_path):
    with pytest.raises(UnsupportedSetupError, match=f"`on_trouble` must not be 'rewind'.*{why}"):
        trainer_of(tmp_path, more=more)


_GRPO: Any = type("GRPOTrainer", (Trainer,), {"__module__": "trl.trainer.grpo_trainer"})


class _OfPolicies(AdaptiveClipMixin, _GRPO):
    pass


def test_other_loops_are_refused(tmp_path):
    with pytest.raises(UnsupportedSetupError, match="an older policy has written"):
        trainer_of(tmp_path, kind=_OfPolicies)
    pytest.importorskip("lightning")
    from hf_adaclip.integrations.lightning import AdaptiveClip

    with pytest.raises(UnsupportedSetupError, match="`on_trouble` must not be 'rewind' in Lightning"):
        AdaptiveClip(AdaptiveClipConfig(**REWIND))


def test_weights_that_are_spread_over_ranks_are_refused(monkeypatch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    monkeypatch.setattr("hf_adaclip.drivers.going_back.distributed_type", lambda accelerator: "FSDP")
    with pytest.raises(UnsupportedSetupError, match=r"spread over ranks \(FSDP2, tensor parallelism\)"):
        AdaptiveClipper(AdaptiveClipConfig(**REWIND), accelerator=accelerator, optimizer=optimizer)


def test_deepspeed_and_settings_without_trouble_are_refused():
    with pytest.raises(ConfigError, match="`on_trouble` must not be 'rewind' under DeepSpeed"):
        AdaptiveClipConfig(on_trouble="rewind", one_step_late=True)
    with pytest.raises(ConfigError, match="`on_trouble` must not be 'rewind' in shadow mode"):
        AdaptiveClipConfig(on_trouble="rewind", shadow=True)
    with pytest.raises(ConfigError, match=r"`max_skipped` or `divergence_spreads`, or `incidents=True`"):
        AdaptiveClipConfig(on_trouble="rewind", incidents=False)
    AdaptiveClipConfig(on_trouble="rewind", incidents=False, max_skipped=3)


# -- the ledger ------------------------------------------------------------------------------------------------------


def _forged(lines: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    header = next(line for line in lines if "rewound" in line)
    seals = [line for line in lines if line["kind"] == "seal"]
    if how == "another seal":
        header["parent"]["sha256"] = seals[1]["sha256"]
    elif how == "another step":
        header["parent"]["step"] = header["rewound"]["first"] = 5
    elif how == "another state":
        header["initial_state"]["level"] = 0.5
    elif how == "a seal of nowhere":
        header["parent"]["sha256"] = "ab" * 32
    elif how == "no parent":
        header["parent"] = None
    else:
        header["rewound"]["last"] = 30
    return lines


@pytest.mark.parametrize(
    "how", ["another seal", "another step", "another state", "a seal of nowhere", "no parent", "another end"]
)
def test_a_forged_parent_is_found(how, tmp_path):
    from hf_adaclip.ledger.schema import GENESIS, encode, seal_line

    run(tmp_path, [24])
    path = tmp_path / "clip_ledger.jsonl"
    lines = _forged([json.loads(line) for line in path.read_text().splitlines()], how)
    head, block, written = GENESIS, [], b""
    for line in lines:  # sealed anew as a whole: what is found follows from the content
        if line["kind"] != "seal":
            block.append(encode(line))
            continue
        seal, digest = seal_line(head, len(block), b"".join(block))
        for other in lines:
            if how != "another seal" and (other.get("parent") or {}).get("sha256") == line["sha256"]:
                other["parent"]["sha256"] = digest
        written, head, block = written + b"".join(block) + seal, digest, []
    path.write_bytes(written)
    (tmp_path / "clip_ledger.jsonl.seal").unlink()
    report = verify_ledger(path)
    assert report.status == "violated", report.findings


@pytest.mark.slow
@pytest.mark.parametrize("way", ["as it comes", "accumulation", "pace", "across an epoch's end", "loss"])
def test_ranks_go_back_together(way, tmp_path):
    """What only one of them knows of, all of them undo, in the next step in which they ask each other."""
    worker = "tests.integrations.rewind_worker"
    back = launching.launch(worker, ["back", way], tmp_path / "back")
    never = launching.launch(worker, ["never", way], tmp_path / "never")
    for ranks in (back, never):
        assert ranks[0]["state"] == ranks[1]["state"]
    assert [len(rank["history"]) for rank in back] == [1, 1]
    assert back[0]["steps"] == [*range(10, 25)]
    assert back[0]["state"] == never[0]["state"]
    assert verify_ledger(tmp_path / "back/clip_ledger.jsonl").status == "verified"


def test_the_report_says_it_in_words(tmp_path):
    from hf_adaclip.report.run_facts import answer, load_run, summary

    run(tmp_path, [24])
    report = load_run(tmp_path)
    said = (
        "Training went back once, and left out the data in between: after step 24 to before step 10 (Planted trouble)."
    )
    assert said in answer(report)
    assert summary(report)["undone"] == [{"first": 10, "last": 24, "reason": "Planted trouble."}]
    assert report.repeated == 0
    skipping(tmp_path / "never", [3, 4])
    assert "left out 2 steps (0 not finite)" in answer(load_run(tmp_path / "never"))
