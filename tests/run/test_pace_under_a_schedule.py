"""An estimate that falls takes the pace back at a rate that stays; once the schedule brings the rate down, the best one counts."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.run.run_plan import RunPlan
from tests.integrations.trainers import as_loaded
from tests.lanes import LANES, on_lane

STEPS, PEAK, LATE = 64, 1e-3, 48


def constant(step):
    return 1.0


def linear(step):
    return 1 - step / (2 * STEPS)


def warmed_up(step):
    return min((step + 1) / 16, linear(step))


def late(step):
    """A rate that stays until the estimate has fallen, and comes down in one step."""
    return 1.0 if step < LATE else 0.5


def train(schedule, *, folder, lane="host", saved_at=None, saved=None, plan=None, loaded=False, **settings):
    """A way of 12 steps at the given rate to the ground of a bowl; the pace of each step, and what a resumption needs."""
    torch.manual_seed(0)
    weights = nn.ParameterList([nn.Parameter(torch.zeros(40, 40)), nn.Parameter(torch.zeros(400))])
    goals = [0.012 * torch.sign(torch.randn_like(w)) for w in weights]
    if loaded:
        as_loaded(weights)
    optimizer = torch.optim.Adam(weights.parameters(), lr=PEAK, betas=(0.5, 0.99))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    given = {"pace_start": 1, "spectral_width": math.inf, "agreement": False, "max_threshold": 1.0, **settings}
    with on_lane(lane):
        ledger = folder / "clip_ledger.jsonl"
        clipper = AdaptiveClipper(
            AdaptiveClipConfig(**given), optimizer=optimizer, model=weights, ledger=ledger, plan=plan
        )
    begin = 0
    if saved is not None:
        begin, tensors, state, schedule_state = saved
        weights.load_state_dict(tensors)
        optimizer.load_state_dict(state)
        rates.load_state_dict(schedule_state)
        clipper.load_state(folder)
    seen, kept = [], None
    for step in range(begin, STEPS):
        if step == saved_at:
            clipper.save_state(folder)
            kept = (step, *copy.deepcopy((weights.state_dict(), optimizer.state_dict(), rates.state_dict())))
        loss = 1 + sum((w - goal).square().sum() for w, goal in zip(weights, goals, strict=True))
        loss.backward()
        clipper.clip_(weights.parameters(), loss=loss.detach())
        seen.append(clipper.metrics()["clip/pace"])
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    clipper.close()
    return seen, kept


@pytest.fixture(params=LANES)
def lane(request):
    return request.param


@pytest.mark.parametrize(
    "settings", [{}, {"granularity": "tensor", "max_pace": 16.0}, {"spectral_width": 0.0}], ids=str
)
def test_the_best_stays_once_the_rate_comes_down_and_a_third_of_it_where_it_does_not(tmp_path, lane, settings):
    ends = {}
    for schedule in (constant, linear, warmed_up):
        seen, _ = train(schedule, folder=tmp_path, lane=lane, **settings)
        (tmp_path / "clip_ledger.jsonl").unlink()
        ends[schedule] = seen[-1] / max(seen)
        assert max(seen) > 4.5
    assert ends[constant] < 0.4
    assert ends[linear] == ends[warmed_up] == 1.0


def test_what_was_best_before_the_rate_came_down_does_not_count(tmp_path, lane):
    """Else the pace would rise in the very step in which a decay begins."""
    stays, _ = train(constant, folder=tmp_path / "one", lane=lane)
    falls, _ = train(late, folder=tmp_path / "two", lane=lane)
    assert falls[: LATE + 1] == stays[: LATE + 1]
    assert falls[LATE] < max(falls) / 3  # it was back already
    assert max(falls[LATE:]) == falls[LATE]


def test_the_ledger_has_what_the_pace_went_by_and_is_verified(tmp_path):
    train(linear, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    reaches = [row["reach"] for row in rows if row.get("reach") is not None]
    assert len(reaches) == STEPS
    assert reaches[1:] == sorted(reaches[1:])
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


@pytest.mark.parametrize("at", [1, 12, 30, 52])
def test_a_resumption_goes_on_bit_for_bit(tmp_path, lane, at):
    for schedule in (linear, late):
        folder = tmp_path / schedule.__name__
        whole, saved = train(schedule, folder=folder, lane=lane, saved_at=at)
        rest, _ = train(schedule, folder=folder, lane=lane, saved=saved)
        assert rest == whole[at:]


def test_over_several_epochs_the_last_estimate_of_the_first_one_rules_and_not_the_best(tmp_path, lane):
    def of(epoch):
        plan = RunPlan(epochs=STEPS / epoch, epoch_steps=epoch, steps=STEPS)
        return train(linear, folder=tmp_path / str(epoch), lane=lane, plan=plan, loaded=True)[0]

    free, _ = train(linear, folder=tmp_path, lane=lane)
    rising, fallen = of(8), of(16)
    assert rising[:9] == free[:9]
    assert 3.0 < rising[-1] == max(rising) < max(free)
    assert fallen[:16] == free[:16]
    assert fallen[15] > 8.0  # the estimate is -14
    assert set(fallen[17:]) == {1.0}
