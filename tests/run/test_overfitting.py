"""The pace goes back to 1 once data is learned by heart, by the evaluation or by what the loss does as an epoch begins."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer
from hf_adaclip.audit.verify import verify_ledger
from hf_adaclip.run.overfitting import WINDOW, OverfitWatch


def fed(losses, watch=None):
    watch = watch or OverfitWatch()
    for loss in losses:
        watch.add(np.float32(loss))
    return watch


def noisy(level, count, slope=0.0, seed=0):
    return level + slope * np.arange(count) + 0.05 * np.random.default_rng(seed).standard_normal(count)


# -- evaluation --------------------------------------------------------------------------------------------------


def evaluated(*pairs):
    """A watch that has seen these levels of the training loss, each with the evaluation after it."""
    watch = OverfitWatch()
    for training, loss in pairs:
        fed(noisy(training, WINDOW), watch).evaluated(loss)
    return watch


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([(1.0, 1.0), (0.8, 0.9), (0.6, 0.8)], False),
        ([(1.0, 1.0), (0.8, 1.01), (0.6, 1.01)], False),  # within 2 %
        ([(1.0, 1.0), (0.8, 1.05)], False),  # once
        ([(1.0, 1.0), (0.8, 1.05), (0.7, 1.05)], True),
        ([(1.0, 1.0), (0.8, 1.05), (0.7, 0.99), (0.6, 1.02)], False),
        ([(1.0, 1.0), (0.8, 1.2)], True),
        ([(1.0, 1.0), (1.2, 1.2)], False),  # that is a training which goes badly, and not data that is known
    ],
    ids=str,
)
def test_an_evaluation_that_rises_while_the_training_loss_falls(pairs, found):
    assert (evaluated(*pairs).found is not None) == found


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((-1.0, -0.99999, -0.99999), False),
        ((-100.0, -99.999, -99.999), False),
        ((0.0, 1e-9, 1e-9), False),
        ((-1.0, -0.97, -0.96), True),
        ((-1.0, -0.8), True),
        ((2.0, -1.0, -0.9, -0.95), False),  # of the way it has come it has lost little
        ((2.0, -1.0, -0.6), True),
    ],
    ids=str,
)
def test_a_loss_that_may_be_negative_is_judged_by_the_way_it_has_come(losses, found):
    assert (evaluated(*((1.0 - 0.1 * k, loss) for k, loss in enumerate(losses))).found is not None) == found


def test_an_evaluation_before_the_first_step_may_be_the_best():
    watch = OverfitWatch()
    watch.evaluated(1.0)
    for loss in (1.05, 1.06):
        fed(noisy(0.5, WINDOW), watch).evaluated(loss)
    assert watch.found is not None
    assert watch.found.endswith("was 1 at best and is 1.06, while the training loss is 0.5064.")


def test_an_evaluation_that_rises_in_the_first_epoch_is_of_other_data():
    """Phrases are trained on and whole sentences evaluated (SST-2): nothing can be known by heart that is seen for the first time."""
    watch = OverfitWatch()
    watch.begin_epoch()
    for training, loss in ((1.0, 1.0), (0.8, 1.2), (0.6, 1.3), (0.5, 1.0), (0.5, 1.2)):
        fed(noisy(training, WINDOW), watch).evaluated(loss)
    first = watch.found
    watch.begin_epoch()
    fed(noisy(0.5, WINDOW), watch).evaluated(1.2)
    assert first is None
    assert watch.found is not None
    assert watch.found.startswith("The evaluation loss was 1 at best and is 1.2, while")


def test_an_evaluation_without_training_losses_says_nothing():
    watch = OverfitWatch()
    for loss in (1.0, 2.0, 3.0, float("nan")):
        watch.evaluated(loss)
    assert watch.found is None


# -- epochs ------------------------------------------------------------------------------------------------------


def two_epochs(first, second):
    watch = OverfitWatch()
    watch.begin_epoch()
    fed(first, watch).begin_epoch()
    return fed(second, watch)


def test_a_loss_that_drops_as_an_epoch_begins():
    found = two_epochs(noisy(1.0, 200), noisy(0.7, 200, seed=1)).found
    assert found is not None
    assert re.search(r"fell from (0\.99|1\.0)\d* to 0\.(69|70)\d* as an epoch began", found)


@pytest.mark.parametrize(
    "second",
    [
        noisy(1.0, 200, seed=1),
        noisy(0.95, 200, seed=1),  # by a twentieth
        noisy(1.2, 200, seed=1),
        np.full(200, np.nan),
    ],
    ids=["same", "little", "higher", "unknown"],
)
def test_a_loss_that_goes_on_as_it_did(second):
    assert two_epochs(noisy(1.0, 200), second).found is None


def test_what_was_about_to_fall_anyway_does_not_count():
    falling = noisy(3.0, 400, slope=-0.006)
    assert two_epochs(falling[:200], falling[200:]).found is None


@pytest.mark.parametrize("length", [30, 32, 100, 300])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_loss_that_is_falling_steeply_is_not_known_by_heart(length, share):
    # From scratch, as the pace climbs: most of the fall happens to be in the steps after the boundary.
    window = min(WINDOW, length // 3)
    steps = np.arange(-length, length)
    losses = 3 + 2.5 / (1 + np.exp((steps - window * share) / (window * 0.2))) + noisy(0.0, 2 * length)
    assert two_epochs(losses[:length], losses[length:]).found is None


@pytest.mark.parametrize("slope", [0.0, -0.001])
def test_a_drop_counts_whatever_little_the_loss_falls_besides(slope):
    first, second = noisy(1.0, 100, slope), noisy(0.8 + 100 * slope, 100, slope, seed=1)
    assert two_epochs(first, second).found is not None


def test_an_evaluation_that_is_the_best_so_far_says_that_nothing_is_learned_by_heart():
    watch = OverfitWatch()
    watch.begin_epoch()
    fed(noisy(1.0, 200), watch).evaluated(1.0)
    watch.begin_epoch()
    assert fed(noisy(0.7, 200), watch).found is None
    watch.evaluated(1.0)
    watch.begin_epoch()
    assert fed(noisy(0.4, 200), watch).found is not None


def test_epochs_that_are_too_short_to_judge_count_as_learned():
    assert two_epochs(noisy(1.0, 30), noisy(0.2, 200)).found is not None
    watch = two_epochs(noisy(1.0, 10), [])
    assert watch.found is not None
    assert watch.found.startswith("Epochs of 10 steps are too short")


def test_short_epochs_are_trusted_as_long_as_evaluations_get_better():
    watch = OverfitWatch()
    watch.begin_epoch()
    for loss in (1.0, 0.9, 0.8):
        fed(noisy(loss, 10), watch).evaluated(loss)
        watch.begin_epoch()
        assert watch.found is None
    fed(noisy(0.7, 10), watch).evaluated(0.81)
    watch.begin_epoch()
    assert watch.found is not None


def test_an_epoch_that_was_cut_short_says_nothing():
    watch = two_epochs(noisy(1.0, 30), noisy(1.0, 10, seed=1))
    watch.begin_epoch()
    assert watch.found is None


def test_a_noisy_loss_needs_more_than_chance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert two_epochs(rng.exponential(1.0, 150), rng.exponential(1.0, 150)).found is None


def test_losses_on_a_device_are_read_once_an_epoch(monkeypatch):
    reads: list[int] = []
    real = torch.Tensor.tolist

    def read(tensor):
        reads.append(1)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    watch = OverfitWatch()
    watch.begin_epoch()
    for value in noisy(1.0, 200):
        watch.add(torch.tensor(value))
    assert reads == []
    watch.begin_epoch()
    for value in noisy(0.5, 200):
        watch.add(torch.tensor(value))
    assert len(reads) == 2
    assert watch.found is not None


def test_it_goes_on_from_a_checkpoint():
    watch = evaluated((1.0, 1.0), (0.8, 1.05))
    again = OverfitWatch()
    again.restore(watch.tensor())
    fed(noisy(0.7, WINDOW), again).evaluated(1.05)
    assert again.found is not None
    third = OverfitWatch()
    third.restore(again.tensor())
    assert third.found is not None
    fresh = OverfitWatch()
    fresh.restore(OverfitWatch().tensor())
    fed(noisy(1.0, WINDOW), fresh).evaluated(3.0)
    assert fresh.found is None


@pytest.mark.parametrize("at", [150, 199, 200, 201, 230, 249, 320])
@pytest.mark.parametrize("second", [0.7, 0.97])
def test_what_is_decided_does_not_depend_on_a_checkpoint(at, second):
    losses = [*noisy(1.0, 200), *noisy(second, 200, seed=1)]

    def watched(resumed):
        watch = OverfitWatch()
        for step, loss in enumerate(losses):
            if step == at and resumed:
                kept, watch = watch.tensor(), OverfitWatch()
                watch.restore(kept)
            if step % 200 == 0:
                watch.begin_epoch()
            watch.add(torch.tensor(loss) if step % 7 else np.float32(loss))
            if step % 90 == 89:
                watch.evaluated(2.0 + step / 1000)
            if watch.found is not None:
                return step
        return None

    assert watched(True) == watched(False)


def test_a_checkpoint_of_before_losses_were_kept_is_gone_on_from():
    watch = OverfitWatch()
    watch.restore(torch.tensor([0.0, 1.0, 1.0, 0.9, 1.0, 3.0], dtype=torch.float64))
    fed(noisy(0.7, 10), watch)
    watch.begin_epoch()  # how much of the epoch went before is not known
    assert watch.found is None
    fed(noisy(0.7, WINDOW), watch).evaluated(1.05)
    assert watch.found is not None


# -- in a training -----------------------------------------------------------------------------------------------


def trainer(folder, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **sizes))
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": (ids := torch.randint(0, 64, (8,), generator=generator)), "labels": ids} for _ in range(160)]
    arguments = {"num_train_epochs": 24, "learning_rate": 1e-4, "per_device_train_batch_size": 4, **more}
    args = TrainingArguments(
        **{"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "seed": 0, **arguments}
    )
    return AdaptiveClipTrainer(model=model, args=args, train_dataset=rows[:120], eval_dataset=rows[120:])


def ledger(folder):
    lines = [json.loads(line) for line in Path(folder, "clip_ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if "pace" in line]


@pytest.mark.slow
@pytest.mark.parametrize("eval_strategy", ["epoch", "no"])
def test_a_trainer_that_learns_by_heart_goes_back_to_the_given_rate(eval_strategy, tmp_path, caplog):
    run = trainer(tmp_path, eval_strategy=eval_strategy)
    run.train()
    records = ledger(tmp_path)
    paces = [record["pace"] for record in records]
    told = [record.get("reach") == "-inf" for record in records]
    first = told.index(True)
    assert max(paces[:first]) > 2
    assert all(told[first:])
    assert set(paces[first:]) == {1.0}
    assert "learned by heart" in caplog.text
    assert "pace        1 from here on, the data counts as learned by heart: The" in run.clipper.explain()
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


@pytest.mark.slow
def test_it_stays_so_after_a_resumption(tmp_path):
    trainer(tmp_path, eval_strategy="epoch", save_strategy="steps", save_steps=600).train()
    whole = [record["pace"] for record in ledger(tmp_path)]
    assert whole[600] == 1.0
    again = trainer(tmp_path, eval_strategy="epoch", save_strategy="steps", save_steps=600)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-600"))
    assert [record["pace"] for record in ledger(tmp_path)][-len(whole[600:]) :] == whole[600:]


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_epoch_by_epoch_is_the_whole_one(tmp_path):
    """30 steps an epoch; what the loss does as one begins is judged by steps before the checkpoint and after it."""
    settings = {"num_train_epochs": 12, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 15}
    trainer(tmp_path, **settings).train()
    whole = ledger(tmp_path)
    told = [record.get("reach") == "-inf" for record in whole]
    first = told.index(True)
    boundary = first // 30 * 30
    for at in (boundary, boundary - 15):
        again = trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        rest = ledger(tmp_path)[-(360 - at) :]
        assert [(r["norm"], r["pace"]) for r in rest] == [(r["norm"], r["pace"]) for r in whole[at:]]


def test_a_loop_tells_it_by_two_calls():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clipper = AdaptiveClipper(AdaptiveClipConfig(max_pace=64.0, warmup_observations=5), optimizer=optimizer)
    for step in range(200):
        if step % 50 == 0:
            clipper.begin_epoch()
        loss = (model(torch.ones(3, 4)) - 5).square().mean()
        loss.backward()
        clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            clipper.evaluated(1.0 + step)  # it rises
    assert clipper.metrics()["clip/pace"] == 1.0
    assert clipper.state["best_reach"] == 0.0


def test_a_loss_with_little_left_ends_the_pace_and_explain_says_so(lane):
    """No epochs, no evaluations, no schedule: a loop that calls nothing but `clip_`."""
    weight = torch.nn.Parameter(torch.full((4,), 30.0))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    clipper = AdaptiveClipper({"pace_start": 1}, optimizer=optimizer)
    seen = []
    for _ in range(900):
        loss = weight.square().mean()
        loss.backward()
        clipper.clip_([weight], loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(loss), clipper.metrics()["clip/pace"]))
    assert max(pace for _, pace in seen) > 10
    assert "up to x64" not in clipper.explain()
    assert "5% of that of the first steps" in clipper.explain()
    assert seen[-1][1] == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_loop_without_a_schedule_is_not_driven_away_from_what_it_has_learned(seed):
    """Digits at the default rate of AdamW. Without an end of the pace the means below were 14 and 19, and on their way up."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    wide = torch.nn.Linear(128, 128)
    made = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), wide, torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    optimizer, order = torch.optim.AdamW(made.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)
    clipper, losses = AdaptiveClipper(optimizer=optimizer, model=made), []
    for _ in range(25):
        for rows in torch.randperm(1437, generator=order).split(32):
            loss = torch.nn.functional.cross_entropy(made(x[rows]), y[rows])
            loss.backward()
            clipper.clip_(made.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert np.mean(losses[-225:]) < 0.02
    with torch.no_grad():
        assert float((made(x[1437:]).argmax(1) == y[1437:]).float().mean()) > 0.9
