"""How fast weights move, against the whole of them; across checkpoints, and where nobody waits for it."""

import pytest
import torch

from hf_adaclip.gradients.movement import WINDOW, Movement
from tests.loops import HostReads


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def named(tensors):
    return {f"w{k}": tensor for k, tensor in enumerate(tensors)}


def movement_of(tensors, *, delayed=False):
    movement = Movement(named(tensors), delayed=delayed)
    movement.begin()
    return movement


def move(tensors, seed, size=0.1):
    for tensor, way in zip(tensors, weights(*(t.shape for t in tensors), seed=seed), strict=True):
        tensor.add_(way, alpha=size)


def window(movement, agree=None):
    """What is said at the end of a window; nothing before."""
    said = [movement.step(agree) for _ in range(WINDOW)]
    assert said[:-1] == [None] * (WINDOW - 1)
    return said[-1]


def of_all(before, after):
    before, after = (torch.cat([t.flatten() for t in tensors]) for tensors in (before, after))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.5])
def test_scaled_weights_have_moved_by_the_factor(factor):
    tensors = weights((64, 96), (7, 3), (40, 3, 3, 3))
    movement = movement_of(tensors)
    for tensor in tensors:
        tensor.mul_(factor)
    assert window(movement) == pytest.approx(abs(factor - 1), abs=1e-6)


def test_the_sample_tells_what_all_of_them_would():
    tensors = weights((300, 400), (400, 100), (500,))
    movement = movement_of(tensors)
    for seed in range(1, 4):
        before = [t.clone() for t in tensors]
        move(tensors, seed, size=0.05 * seed)
        assert window(movement) == pytest.approx(of_all(before, tensors), rel=0.05)  # one window at a time


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, WINDOW - 1])
def test_a_checkpoint_within_a_window_changes_nothing(delayed, steps):
    tensors = weights((64, 64), (64,))
    whole = movement_of(tensors, delayed=delayed)
    move(tensors, 1)
    window(whole)
    for _ in range(steps):
        whole.step()
    move(tensors, 2)
    kept = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    assert sorted(Movement.names(kept)) == ["w0", "w1"]
    assert Movement.of_these(kept | {"else": torch.zeros(1)}).keys() == kept.keys()
    resumed = Movement(named(tensors), delayed=delayed)
    resumed.restore(kept)
    for seed in range(3, 3 + 3 * WINDOW):
        move(tensors, seed)
        assert whole.step() == resumed.step()


def test_what_belongs_to_other_weights_is_left_aside():
    tensors = weights((64, 64))
    kept = movement_of(weights((8, 8))).tensors()
    movement = Movement(named(tensors), delayed=False)
    movement.restore(kept)
    move(tensors, 1)
    assert window(movement) > 0


def test_a_weight_of_another_size_is_not_known_and_no_error():
    tensors = weights((64, 64), (64, 64))
    movement = movement_of(tensors)
    tensors[0].data = tensors[0].data[:32]
    assert window(movement) is None
    assert window(movement) is None


def test_delayed_it_is_known_one_window_later():
    tensors = weights((64, 64))
    at_once, later = movement_of(tensors), movement_of(tensors, delayed=True)
    expected, found = [], []
    for seed in range(1, 5):
        move(tensors, seed)
        expected.append(window(at_once))
        found.append(window(later))
    assert found == [None, *expected[:-1]]


def test_ranks_may_agree_on_what_counts():
    tensors = weights((64, 64))
    movement = movement_of(tensors)
    move(tensors, 1)
    assert window(movement, lambda share: share.fill_(0.5)) == 0.5


def test_delayed_nothing_is_read_where_a_window_ends():
    movement = movement_of(weights((64, 64)), delayed=True)
    with HostReads() as reads:
        window(movement)
    assert reads.count == 0
