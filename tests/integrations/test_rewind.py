"""Going back in a Trainer: the weights are those of a run to which the data was never given."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer
from hf_adaclip.audit.verify import verify_ledger
from hf_adaclip.errors import ConfigError, TrainingTroubleError, UnsupportedSetupError
from hf_adaclip.incidents.rules import Finding
from hf_adaclip.incidents.skip_list import SKIP_FILE, SkipList
from tests.integrations.settings import Mlp, Rows, Stream, _lora, _ragged, arguments, llama

REWIND: dict[str, Any] = {
    "on_trouble": "rewind",
    "snapshot_steps": 5,
    "warmup_observations": 5,
    "incident_steps": 5,
}


class Planted(TrainerCallback):
    """Finds trouble in some steps, as a rule on incidents does: it began a step before."""

    def __init__(self, trainer: Any, steps: Any) -> None:
        self._trainer, self._steps = trainer, list(steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            clipper = self._trainer.clipper
            clipper.rewinder.judge(clipper.step, Finding("zero_loss", "Planted trouble.", 1.0))


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


def run(folder: Path, trouble: Any = (), *, resume: str | None = None, **ways: Any) -> Any:
    trainer = trainer_of(folder, trouble, **ways)
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
    "accumulation": Case((24,), [*range(10, 25)], {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
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
    "pace": Case((24,), [*range(10, 25)], {"clip": {"max_pace": 8.0, "pace_trust": 1.0, "pace_start": 2}}),
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
