"""The spectral range with a memory: averages, what joins and leaves, and what may not get in."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_adaclip.gradients.newton_schulz import TF32_FLOOR, TOLERANCE
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.spectral import SpectralRange
from tests.gradients.test_spectral import Everything, distance, drawn
from tests.reference import spectral as reference

MEMORY = 0.9


class Run:
    """Gradients of some matrices through one range, step by step."""

    def __init__(self, shapes, width=0.0, memory=MEMORY):
        self.parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.range = SpectralRange(width, Everything(), memory)

    def step(self, matrices, **more):
        """The gradients afterwards; a matrix that is None has none."""
        present = [i for i, m in enumerate(matrices) if m is not None]
        gradients = [matrices[i].clone() for i in present]
        self.effect = self.range.act_(Gradients(self.parameters, present, gradients), **more)
        return gradients


def batches(step, shapes):
    """Gradients that have something in common from step to step."""
    return [drawn(1, r, c, 1.0) + 0.3 * drawn(100 * step + i, r, c, 0.5) for i, (r, c) in enumerate(shapes)]


@pytest.mark.parametrize("width", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("memory", [0.5, 0.95])
def test_against_exact_decompositions_over_the_steps(width, memory):
    shapes = [(24, 24), (24, 60), (40, 24), (5, 9)]
    run = Run(shapes, width, memory)
    exact = [reference.Averaged(width, memory) for _ in shapes]
    for step in range(70):
        matrices = batches(step, shapes)
        wanted = [e.step(m) for e, m in zip(exact, matrices, strict=True)]
        for found, right in zip(run.step(matrices), wanted, strict=True):
            assert distance(found, right) < TOLERANCE
        assert float(run.effect.altered) == pytest.approx(reference.altered(matrices, wanted), abs=TOLERANCE)
        assert float(run.effect.norm) == pytest.approx(
            math.sqrt(sum(float(m.norm()) ** 2 for m in matrices)), rel=1e-5
        )


def test_the_first_step_is_that_without_a_memory():
    matrix = drawn(3, 30, 50)
    [found] = Run([(30, 50)]).step([matrix])
    [alone] = Run([(30, 50)], memory=0.0).step([matrix])
    assert distance(found, alone.double().numpy()) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_not_finite_and_zeros_do_not_get_into_the_average(bad):
    shapes = [(12, 12), (12, 20)]
    run, without = Run(shapes), Run(shapes)
    for step in range(30):
        matrices = batches(step, shapes)
        if step == 11:
            spoiled = [torch.full((12, 12), bad), matrices[1]]
            found = run.step(spoiled)
            assert torch.equal(found[0].nan_to_num(7.0), spoiled[0].nan_to_num(7.0))
            assert torch.equal(found[1], without.step([batches(12, shapes)[0], matrices[1]])[1])
            continue
        found, other = run.step(matrices), without.step(matrices)
        assert all(torch.isfinite(f).all() for f in found)
        assert torch.equal(found[1], other[1])


def test_a_matrix_without_a_gradient_at_first_begins_when_it_has_one():
    """The first factor of a LoRA has none in the first step, because the second is zero."""
    run = Run([(6, 30)])
    for _ in range(15):
        [found] = run.step([torch.zeros(6, 30)])
        assert not found.any()
    matrix = drawn(4, 6, 30, 1.0)
    [found] = run.step([matrix])
    values = torch.linalg.svdvals(found.double())
    assert float(values.max() / values.min()) < (1 + TOLERANCE) / (1 - TOLERANCE)


def test_nothing_is_learned_from_a_step_that_is_left_out():
    shapes = [(12, 20)]
    run, host = Run(shapes), Run(shapes)
    for step in range(40):
        matrices = batches(step, shapes)
        if step in (5, 20, 31):  # with a gradient that would be learned from, were the step made
            run.step([drawn(9, 20, 12, 3.0).T * 100], taken=torch.tensor(False))
            host.range.begin_step()
            continue
        [found] = run.step(matrices, taken=torch.tensor(True))
        [other] = host.step(matrices)
        assert torch.equal(found, other)


def test_matrices_that_join_and_rest_keep_what_is_known_of_the_others():
    shapes = [(16, 16), (16, 16), (16, 40)]
    run, whole = Run(shapes, memory=0.95), Run(shapes, memory=0.95)
    for step in range(60):
        matrices = batches(step, shapes)
        resting = step in range(25, 30)
        found = run.step([matrices[0], None if resting else matrices[1], matrices[2]])
        other = whole.step(matrices)
        assert distance(found[0], other[0].double().numpy()) < 1e-5
        assert distance(found[-1], other[-1].double().numpy()) < 1e-5
    late = Run(shapes, memory=0.95)
    for step in range(30):
        matrices = batches(step, shapes)
        found = late.step([matrices[0], None, matrices[2]])
    new = drawn(77, 16, 16, 1.0)
    found = late.step([matrices[0], new, matrices[2]])
    assert distance(found[1], reference.soft_clipped(new, 0.0)) < TOLERANCE


def test_what_a_checkpoint_keeps_goes_on_bit_for_bit():
    shapes = [(16, 16), (24, 16), (16, 16), (4, 9)]
    whole = Run(shapes)
    for step in range(27):
        whole.step(batches(step, shapes))
    kept = whole.range.preconditioner.tensors()
    assert set(kept) == {"preconditioner", *(f"preconditioner.p{i}" for i in range(4))}
    assert all(torch.isfinite(value).all() for value in kept.values())
    again = Run(shapes)
    again.range.preconditioner.restore(kept)
    for step in range(27, 60):
        for found, other in zip(again.step(batches(step, shapes)), whole.step(batches(step, shapes)), strict=True):
            assert torch.equal(found, other)
    again.range.preconditioner.restore({})
    [*found] = again.step(batches(0, shapes))
    [*fresh] = Run(shapes).step(batches(0, shapes))
    assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))


def test_a_matrix_that_is_replaced_by_one_of_another_size_begins_anew():
    run = Run([(16, 40), (16, 16)])
    for step in range(5):
        run.step(batches(step, [(16, 40), (16, 16)]))
    kept = run.range.preconditioner.tensors()
    other = Run([(16, 40), (12, 12)])
    other.range.preconditioner.restore(kept)
    [_, found] = other.step([drawn(0, 16, 40), new := drawn(1, 12, 12, 1.0)])
    assert distance(found, reference.soft_clipped(new, 0.0)) < TOLERANCE
    assert other.range.preconditioner.tensors()["preconditioner.p1"].shape == (12, 12)


def test_what_is_kept_does_not_grow_and_holds_no_parameter():
    run = Run([(16, 40), (16, 16), (16, 16)])
    kept = run.range.preconditioner
    for step in range(12):
        matrices = batches(step, [(16, 40), (16, 16), (16, 16)])
        run.step([matrices[0], matrices[1] if step % 2 else None, None if step % 3 else matrices[2]])
    assert sorted(kept._squares) == ["p0", "p1", "p2"]
    assert len(kept._stacks) == 1
    memory = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in kept._squares.values()}
    assert sum(memory.values()) == 3 * 16 * 16 * 4


def test_a_direction_that_the_average_does_not_know_gets_no_longer_step():
    run = Run([(10, 10)])
    narrow = torch.zeros(10, 10)
    narrow[:5, :5] = drawn(1, 5, 5, 0.2)
    for _ in range(50):
        run.step([narrow])
    new = torch.zeros(10, 10)
    new[9, 9] = 3.0
    [found] = run.step([new])
    assert float(found.norm()) == pytest.approx(3.0, rel=1e-5)


def rounded_to_10_bits(x):
    """As tensor cores read float32 in TF32."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("decades", [0.5, 1.0, 3.0])
def test_products_in_tf32_are_near_those_in_float32_and_never_blow_up(monkeypatch, decades):
    """No accelerator is needed for that: operands are rounded as it rounds them."""
    bmm, baddbmm = torch.bmm, torch.baddbmm

    def rough_bmm(a, b, **more):
        return bmm(rounded_to_10_bits(a), rounded_to_10_bits(b), **more)

    def rough_baddbmm(c, a, b, **more):
        return baddbmm(c, rounded_to_10_bits(a), rounded_to_10_bits(b), **more)

    shapes = [(64, 64), (64, 192), (200, 64)]
    fine, rough, exact = Run(shapes), Run(shapes), [reference.Averaged(0.0, MEMORY) for _ in shapes]
    for step in range(25):
        matrices = [drawn(100 * step + i, rows, columns, decades) for i, (rows, columns) in enumerate(shapes)]
        fine.step(matrices)
        wanted = [e.step(m) for e, m in zip(exact, matrices, strict=True)]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bmm", rough_bmm)
            patch.setattr(torch, "baddbmm", rough_baddbmm)
            patch.setattr("hf_adaclip.gradients.preconditioner.floor_of", lambda device: TF32_FLOOR)
            found = rough.step(matrices)
        for f, w, m in zip(found, wanted, matrices, strict=True):
            assert float(f.norm()) == pytest.approx(float(m.norm()), rel=1e-4)
            assert torch.isfinite(f).all()
            if decades < 1 or step >= 10:  # there is an average by then
                assert distance(f, w) < 0.08


@pytest.mark.parametrize("how", ["old", "new", "transformers"])
def test_the_floor_goes_by_what_torch_multiplies_in_however_that_was_said(how):
    said = {
        "old": 'torch.set_float32_matmul_precision("high")',
        "new": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
        "transformers": "from transformers.utils.import_utils import enable_tf32; enable_tf32(True)",
    }
    code = f"""
import torch
from hf_adaclip.gradients.newton_schulz import FLOOR, TF32_FLOOR, floor_of
from hf_adaclip.run.shape_gate import slower
cpu, cuda = torch.device("cpu"), torch.device("cuda")
assert (floor_of(cuda), slower(cuda)) == (FLOOR, 15.0)
{said[how]}
assert (floor_of(cuda), slower(cuda)) == (TF32_FLOOR, 2.0)
assert (floor_of(cpu), slower(cpu)) == (FLOOR, 1.0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
