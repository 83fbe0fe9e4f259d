"""Incidents in a Trainer: it shows its own batches, and says which samples they are."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adaclip import AdaptiveClipTrainer, attach
from hf_adaclip.incidents.contents import load_batch
from hf_adaclip.incidents.folder import find_incidents
from tests.integrations import launching
from tests.integrations.trainers import arguments, build, dataset, model, run

pytestmark = pytest.mark.slow


class Told(TrainerCallback):
    def __init__(self):
        self.incidents = []

    def on_clip_incident(self, args, state, control, *, incident, **kwargs):
        self.incidents.append((state.global_step, incident.step))


class Planted(Trainer):
    """The loss of one step is multiplied; every batch that a loss was made of is remembered."""

    at, factor = 30, float("nan")

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("fed", {}).setdefault(self.state.global_step, []).append(
            {k: v.clone() for k, v in inputs.items()}
        )
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        inputs.pop("labels")  # as label smoothing does
        return loss * self.factor if self.state.global_step == self.at else loss


class Ours(AdaptiveClipTrainer, Planted):
    pass


def check(trainer, step=30, micro_batches=1):
    [incident] = trainer.clipper.incidents
    assert incident.step == step
    kept, fed = load_batch(incident.folder), trainer.fed[step]
    assert len(kept) == len(fed) == micro_batches
    for mine, theirs in zip(kept, fed, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    places = incident.facts["batch"]["indices"]
    rows = dataset()["input_ids"]
    for mine, where in zip(kept, places, strict=True):
        assert torch.equal(mine["input_ids"], torch.stack([rows[i] for i in where]))
    return incident


@pytest.mark.parametrize("way", ["class", "attach"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_batch_of_a_bad_step_is_kept(way, accumulation, lane, tmp_path):
    told = Told()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=8)
    trainer = build(Ours if way == "class" else Planted, tmp_path, args=args, callbacks=[told])
    if way == "attach":
        attach(trainer)
    run(trainer)
    incident = check(trainer, micro_batches=accumulation)
    assert incident.folder == tmp_path / "incidents/step-00030"
    assert find_incidents(tmp_path)[0].facts == incident.facts
    assert [step for _, step in told.incidents] == [30]
    assert incident.facts["kind"] == "nonfinite"


def test_a_spike_names_the_modules(lane, tmp_path):
    trainer = build(Ours, tmp_path)
    trainer.factor = 1e3
    run(trainer)
    incident = check(trainer)
    assert incident.kind == "spike"
    shares = incident.facts["modules"]
    assert any("layers.0" in m["name"] for m in shares)
    assert sum(m["share"] for m in shares) == pytest.approx(1, abs=1e-4)
    assert len(incident.facts["tensors"]) == 10


def test_a_healthy_run_leaves_nothing(lane, tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path)
    run(trainer)
    assert trainer.clipper.incidents == []
    assert not (tmp_path / "incidents").exists()


def test_a_training_step_that_prepares_nothing_shows_what_it_was_given(lane, tmp_path, monkeypatch):
    class Bare(Planted):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = attach(build(Bare, tmp_path))
    monkeypatch.delattr(Trainer, "_prepare_inputs")
    run(trainer)
    check(trainer)


def test_switched_off_nothing_is_kept(lane, tmp_path):
    trainer = build(Ours, tmp_path, clip={"incidents": False})
    run(trainer)
    assert not (tmp_path / "incidents").exists()


def test_in_a_later_epoch_and_with_workers_the_samples_are_known(tmp_path):
    args = arguments(tmp_path, max_steps=40, per_device_train_batch_size=32, dataloader_num_workers=2)
    trainer = build(Ours, tmp_path, args=args)
    run(trainer)
    check(trainer)


@pytest.mark.parametrize("workers", [0, 2])
def test_of_an_iterable_dataset_the_batch_is_kept_and_no_sample_is_named(workers, tmp_path):
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self):
            yield from dataset()

    args = arguments(tmp_path, dataloader_num_workers=workers, gradient_accumulation_steps=2)
    trainer: Any = Ours(model=model(), args=args, train_dataset=Stream())
    run(trainer)
    [incident] = trainer.clipper.incidents
    kept = load_batch(incident.folder)
    assert len(kept) == len(trainer.fed[30]) == 2
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(kept, trainer.fed[30], strict=True))
    assert "indices" not in incident.facts["batch"]
    assert len(incident.facts["batch"]["hashes"][0]["samples"]) == 16


@pytest.mark.skipif(
    "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__, reason="by another name in this version"
)
def test_grouped_by_length_the_samples_are_named(tmp_path):
    rows = [
        {"input_ids": row[: 8 + i % 25], "labels": row[: 8 + i % 25]} for i, row in enumerate(dataset()["input_ids"])
    ]
    args = arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=8, max_steps=80)

    def collate(some):
        longest = max(len(row["input_ids"]) for row in some)
        padded = [torch.nn.functional.pad(row["input_ids"], (0, longest - len(row["input_ids"]))) for row in some]
        return {"input_ids": torch.stack(padded), "labels": torch.stack(padded)}

    trainer = Ours(model=model(), args=args, train_dataset=rows, data_collator=collate)
    trainer.at = 70  # in the second epoch
    run(trainer)
    [incident] = trainer.clipper.incidents
    [kept], [places] = load_batch(incident.folder), incident.facts["batch"]["indices"]
    assert places != sorted(places)
    assert torch.equal(kept["input_ids"], collate([rows[i] for i in places])["input_ids"])


@pytest.mark.parametrize(
    ("batch", "accumulation", "saved", "workers"), [(16, 1, 20, 0), (32, 2, 20, 2), (32, 2, 16, 0), (24, 5, 13, 0)]
)
def test_after_a_resumption_within_an_epoch_the_right_samples_are_named(batch, accumulation, saved, workers, tmp_path):
    # Of 512 rows, epochs of 32, 8, 8 and 5 steps: the last of them within an epoch whose last window is short, the third at a beginning.
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = arguments(
        tmp_path, max_steps=40, save_strategy="steps", save_steps=saved, dataloader_num_workers=workers, **changes
    )
    first = build(Ours, tmp_path, args=args)
    first.at = -1
    run(first)
    again = build(Ours, tmp_path, args=args)
    run(again, resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    [incident] = again.clipper.incidents
    check(again, micro_batches=len(again.fed[30]))
    assert len(incident.facts["batch"]["indices"]) == len(again.fed[30])
    near = build(Ours, tmp_path / "near", args=args)
    near.at = saved  # the first step after it
    run(near, resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    check(near, step=saved, micro_batches=len(near.fed[saved]))


def test_a_resumption_that_ignores_the_data_names_the_right_samples(tmp_path):
    args = arguments(tmp_path, max_steps=40, save_strategy="steps", save_steps=20, ignore_data_skip=True)
    first = build(Ours, tmp_path, args=args)
    first.at = -1
    run(first)
    again = build(Ours, tmp_path, args=args)
    run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    check(again)


def test_of_an_epoch_that_is_gone_on_with_nothing_is_named_where_nobody_counts():
    from hf_adaclip.integrations.sample_indices import SampleIndices

    rows: Any = range(8)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=2)
    for skipped, named in ((None, None), (0, [0, 1]), (2, [4, 5])):
        samples = SampleIndices()
        samples.follow(loader)
        samples.begin_midway(skipped)
        list(loader)
        assert samples.next() == named
        list(loader)  # the epoch after it is whole
        assert samples.next() == [0, 1]
        loader = torch.utils.data.DataLoader(rows, batch_size=2)

    class StatefulDataLoader(torch.utils.data.DataLoader[int]):
        pass

    keeps: Any = StatefulDataLoader(rows, batch_size=2)
    samples = SampleIndices()
    samples.follow(keeps)
    samples.begin_midway(2)
    list(keeps)
    assert samples.next() is None


def test_the_text_is_decoded_where_somebody_can(tmp_path):
    class Bytes:
        """All of a tokenizer that matters here."""

        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

        def save_pretrained(self, folder):
            pass

    def collate(rows):
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    trainer = build(Ours, tmp_path, processing_class=Bytes(), data_collator=collate)
    run(trainer)
    incident = check(trainer)
    lines = (incident.folder / "text.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 16
    assert incident.facts["batch"]["text"] == "text.jsonl"


def test_weights_and_ledger_are_the_same_with_and_without(lane, tmp_path):
    from tests.integrations.trainers import weights

    left = []
    for on in (True, False):
        trainer = build(Ours, tmp_path / str(on), clip={"incidents": on})
        run(trainer)
        left.append(weights(trainer))
    assert torch.equal(*left)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lane"), [("trainer", "host"), ("loop", "host"), ("loop", "device")])
def test_every_rank_keeps_its_own_batch(kind, lane, tmp_path):
    ranks = launching.launch("tests.integrations.incidents_worker", [kind, lane], tmp_path)
    assert [rank["found"] for rank in ranks] == [[[30, "nonfinite", "step-00030"]]] * 2
    folder = tmp_path / "incidents/step-00030"
    for file, rank in zip(("batch.safetensors", "batch-rank1.safetensors"), ranks, strict=True):
        kept = [one["input_ids"] if kind == "trainer" else one[0] for one in load_batch(folder / file)]
        assert [one.tolist() for one in kept] == rank["fed"]
    assert ranks[0]["fed"] != ranks[1]["fed"]
    [incident] = find_incidents(tmp_path)
    assert incident.facts["world_size"] == 2
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["batch.safetensors", "batch-rank1.safetensors", "incident.json", "incident-rank1.json"]
    )
    if kind == "trainer":
        rows = dataset()["input_ids"]
        [places] = incident.facts["batch"]["indices"]
        assert [rows[i].tolist() for i in places] == ranks[0]["fed"][0]
