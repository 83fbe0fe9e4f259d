"""How fast weights move, against the whole of them; across checkpoints, and where nobody waits for it."""

import pytest
import torch

from hf_adaclip.gradients.movement import Movement
from tests.loops import HostReads


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def move(tensors, seed, size=0.1):
    for tensor, way in zip(tensors, weights(*(t.shape for t in tensors), seed=seed), strict=True):
        tensor.add_(way, alpha=size)


def of_all(before, after):
    before, after = (torch.cat([t.flatten() for t in tensors]) for tensors in (before, after))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.5])
def test_scaled_weights_have_moved_by_the_factor(factor):
    tensors = weights((64, 96), (7, 3), (40, 3, 3, 3))
    movement = Movement(tensors, delayed=False)
    movement.begin()
    for tensor in tensors:
        tensor.mul_(factor)
    assert movement.end() == pytest.approx(abs(factor - 1), abs=1e-6)


def test_the_sample_tells_what_all_of_them_would():
    tensors = weights((300, 400), (400, 100), (500,))
    movement = Movement(tensors, delayed=False)
    movement.begin()
    for seed in range(1, 4):
        before = [t.clone() for t in tensors]
        move(tensors, seed, size=0.05 * seed)
        assert movement.end() == pytest.approx(of_all(before, tensors), rel=0.05)  # one window at a time


def test_before_a_window_has_begun_nothing_is_known():
    tensors = weights((8, 8))
    movement = Movement(tensors, delayed=False)
    assert movement.end() is None
    move(tensors, 1)
    assert movement.end() > 0


@pytest.mark.parametrize("delayed", [False, True])
def test_a_checkpoint_within_a_window_changes_nothing(delayed):
    tensors = weights((64, 64), (64,))
    whole, found = Movement(tensors, delayed=delayed), []
    whole.begin()
    move(tensors, 1)
    found.append(whole.end())
    move(tensors, 2)
    kept = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    resumed = Movement(tensors, delayed=delayed)
    resumed.restore(kept)
    move(tensors, 3)
    a, b = whole.end(), resumed.end()
    assert a == b
    assert a is not None
    move(tensors, 4)
    assert whole.end() == resumed.end()


def test_what_belongs_to_other_weights_is_left_aside():
    movement = Movement(weights((64, 64)), delayed=False)
    movement.restore({"moved_from": torch.zeros(3)})
    assert movement.end() is None


def test_delayed_it_is_known_one_window_later():
    tensors = weights((64, 64))
    at_once, later = Movement(tensors, delayed=False), Movement(tensors, delayed=True)
    at_once.begin()
    later.begin()
    expected, found = [], []
    for seed in range(1, 5):
        move(tensors, seed)
        expected.append(at_once.end())
        found.append(later.end())
    assert found == [None, *expected[:-1]]


def test_ranks_may_agree_on_what_counts():
    tensors = weights((64, 64))
    movement = Movement(tensors, delayed=False)
    movement.begin()
    move(tensors, 1)
    assert movement.end(lambda share: share.fill_(0.5)) == 0.5


def test_delayed_the_first_look_reads_nothing():
    tensors = weights((64, 64))
    movement = Movement(tensors, delayed=True)
    movement.begin()
    with HostReads() as reads:
        movement.end()
    assert reads.count == 0
