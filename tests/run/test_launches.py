"""How many launches a step costs on the lane of an accelerator, whatever the model's size; `scripts/bench/launches.py` counts."""

import pytest
import torch

from hf_adaclip.gradients import elementwise
from scripts.bench.launches import CARD, LIMITS, ROWS, Launches, launches, table
from scripts.docs.readme_section import read_section

MOST = 12
"""The bar, from the norms of the gradients to the arming."""
PACE = {"max_pace": 4.0}
SETTINGS = {
    "adaptive": {},
    "pace": PACE,
    "limits": LIMITS,
    "pace, limits": {**PACE, **LIMITS},
    "pace, limits, fall-back, freeze": {**PACE, **LIMITS, "on_trouble": "fallback", "freeze_after": 4},
    "skip": {"on_spike": "skip"},
    "shadow": {"shadow": True},
    "shadow with a pace": {"shadow": True, **PACE},
    "not folded": {"fold": "never"},
    "per tensor": {"granularity": "tensor"},
    "per tensor, limits": {"granularity": "tensor", **LIMITS},
    **{name: {"controller": name} for name in ("static", "zscore", "log_zscore", "ema_ratio", "quantile")},
}


@pytest.mark.parametrize("tensors", [1, 2, 40])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_at_most_twelve_launches(settings, tensors):
    names = launches(settings, tensors=tensors)
    assert len(names) <= MOST, names


@pytest.mark.parametrize("settings", [{}, {**PACE, **LIMITS}], ids=["adaptive", "pace, limits"])
def test_so_it_is_where_the_host_reads_whether_to_step(settings):
    names = launches(settings, fused_step=False)
    assert len([n for n in names if n != "_local_scalar_dense"]) <= MOST, names  # a read is none
    assert names.count("_local_scalar_dense") <= 1


@pytest.mark.parametrize("settings", [{}, PACE, LIMITS], ids=["adaptive", "pace", "limits"])
def test_a_later_step_launches_what_an_earlier_one_did(settings):
    assert launches(settings, steps=6) == launches(
        settings, steps=80
    )  # but for those in which rows are copied to the host


def test_what_is_counted():
    one = torch.ones(4)
    with Launches() as counter:
        (one.view(2, 2)[0] * 2).unbind()
        torch.empty(3)
        torch._foreach_add_([one, one.clone()], 1.0)
    assert counter.names == ["mul", "clone", "_foreach_add_"]


@pytest.mark.parametrize("controller", ["second_moment", "weight_ratio"])
def test_a_bound_on_parts_of_a_gradient_costs_little_for_each_tensor(controller, monkeypatch):
    """Only what has no form for many tensors: two norms by unit. Corrections for the bias of the start are made once for a group."""
    made = []
    correction = elementwise._correction

    def counted(beta, count):
        made.append(count)
        return correction(beta, count)

    monkeypatch.setattr(elementwise, "_correction", counted)
    few, many = (launches(ROWS[controller], tensors=n) for n in (2, 42))
    each = (len(many) - len(few)) / 40
    assert each == {"second_moment": 0, "weight_ratio": 2}[controller]
    assert len(few) <= 32
    if controller == "second_moment":
        assert len(made) == 2 * 6  # one for each of the steps that are bounded: the third to the eighth


def test_the_card_says_what_is_counted():
    assert read_section("launches", CARD) == table()
