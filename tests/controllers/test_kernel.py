"""Many operations in one launch: the same bits as operation by operation, and the same training where no kernel can be made."""

import ctypes
import itertools
import shutil
import subprocess
import unittest.mock
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.controllers import CONTROLLERS, Observation, build_controller
from hf_adaclip.controllers.numerics import fused, kernel
from hf_adaclip.controllers.numerics.fused import Fused
from hf_adaclip.controllers.numerics.kernel import cuda_source
from hf_adaclip.controllers.numerics.ops import ops_of, tensor_ops
from hf_adaclip.run.plan import GlobalRule, GroupRule
from tests.loops import make, train, weights
from tests.streams import eventful, losses

CPU = torch.device("cpu")
LIMITS = {
    "min_threshold": 0.05,
    "max_threshold": 3.0,
    "max_widening_step": 1.5,
    "max_widening_100": 3.0,
    "max_skipped": 3,
    "divergence_spreads": 4.0,
    "divergence_steps": 5,
    "on_trouble": "fallback",
    "freeze_after": 250,
}
SHORT = {"warmup_observations": 10}
SETTINGS = {
    "adaptive": {},
    "ceiling": {"ceiling_share": 1.0},
    "pace": {"max_pace": 8.0, "ceiling_share": 1.0},
    "limits": LIMITS,
    "pace, limits": {"max_pace": 8.0, **LIMITS},
    "skip": {"on_spike": "skip"},
    "shadow": {"shadow": True},
    "late": {"one_step_late": True},
} | {name: {"controller": name} for name in CONTROLLERS if name not in ("percentile", "median", "mean_sd", "adaptive")}
# What a C compiler needs to know of CUDA.
PRELUDE = """
#include <math.h>
#include <stdbool.h>
#include <string.h>
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline int __float_as_int(float a) { int i; memcpy(&i, &a, 4); return i; }
static inline float __int_as_float(int i) { float a; memcpy(&a, &i, 4); return a; }
struct index { int x; };
static struct index blockIdx, blockDim = {1}, threadIdx;
#define __global__
#define step kernel_of_a_step  // the C library has a `step` of its own
"""
LOOP = """
extern "C" void all(void** a, double* numbers, int lanes) {
  for (threadIdx.x = 0; threadIdx.x < lanes; threadIdx.x++) step(%s, lanes);
}
"""


def rule_of(settings, shape):
    config = AdaptiveClipConfig(**{**SHORT, **settings}).resolved()
    controller = build_controller(config)
    if shape:
        return GroupRule(controller)
    return GlobalRule(
        controller, shadow=config.shadow, leaves_out="skip" in settings.values(), paced=config.max_pace > 1
    )


def stream(rng, shape, reach):
    """What a run sees: calm, spikes, zeros, no numbers; a loss that is not always known."""
    lanes = shape[0] if shape else 1
    norms = np.stack([eventful(np.random.default_rng(int(rng.integers(1 << 30)))) for _ in range(lanes)], axis=1)
    for norm, loss in zip(norms.astype(np.float32), losses(rng).astype(np.float32), strict=False):
        yield Observation(
            torch.tensor(norm).reshape(shape),
            torch.tensor(loss),
            torch.tensor(0.25),
            reach=torch.tensor(np.float32(rng.random() * 9)) if reach else None,
        )


def leaves(tree):
    if isinstance(tree, list):  # of rows
        tree = torch.stack(tree)
    if isinstance(tree, tuple):
        return [leaf for child in tree for leaf in leaves(child)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def bits(tree):
    """The bits of all values, but that a NaN is a NaN."""
    return [np.nan_to_num(t.float().numpy(), nan=12345.0).tobytes() for t in leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_launch_gives_the_bits_of_tensor_operations(settings, shape, rng):
    rule = rule_of(settings, shape)
    state = plain = rule.controller.init(tensor_ops(CPU), shape)
    made = Fused(rule, CPU, shape)
    for step, seen in enumerate(stream(rng, shape, "max_pace" in settings)):
        more = [seen.norm.max()] if shape else []
        plain, *want = rule(plain, seen, *more)
        state, *got = made(state, seen, *more)
        for a, b in zip(leaves((state, *got)), leaves((plain, *want)), strict=True):
            assert a.shape == torch.broadcast_shapes(b.shape, shape), step
            assert bits((a,)) == bits((b.expand(a.shape),)), step
    assert made.launches == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C compiler")
@pytest.mark.parametrize("settings", [SETTINGS["pace, limits"], SETTINGS["log_zscore"], SETTINGS["zscore"]], ids=str)
def test_the_text_of_the_cuda_kernel_gives_these_bits_too(settings, rng, tmp_path, monkeypatch):
    texts = []

    def compiled(program, arguments, device):
        text = cuda_source(program, arguments)
        texts.append(text)
        pointers = [
            f"*(double*)a[{i}]" if a.by_value else f"(const {a.leaf.kind}*)a[{i}]" for i, a in enumerate(arguments)
        ]
        count = len(arguments)
        loop = LOOP % ", ".join([*pointers, f"(float*)a[{count}]", f"(bool*)a[{count + 1}]"])
        source, library = tmp_path / f"{len(texts)}.cc", tmp_path / f"{len(texts)}.so"
        source.write_text(PRELUDE + text + loop)
        subprocess.run(["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", source, "-o", library], check=True)
        run_all = ctypes.CDLL(str(library)).all

        def launch(values, lanes):
            results = (
                torch.empty((program.kinds.count("float"), lanes)),
                torch.empty((program.kinds.count("bool"), lanes), dtype=torch.bool),
            )
            pointers = (ctypes.c_void_p * (count + 2))(*(v.data_ptr() for v in (*values, *results)))
            run_all(pointers, None, lanes)
            return results

        return launch

    monkeypatch.setattr(fused, "build", compiled)
    fused._kernel_of.cache_clear()
    rule = rule_of(settings, ())
    state = plain = rule.controller.init(tensor_ops(CPU), ())
    made = Fused(rule, CPU, ())
    for seen in stream(rng, (), "max_pace" in settings):
        plain, want = rule(plain, seen)
        state, got = made(state, seen)
        assert bits((state, got)) == bits((plain, want))
    assert made.launches == 1
    assert len(texts) == 1
    fused._kernel_of.cache_clear()


def test_nothing_in_the_text_can_be_joined_into_a_multiply_add():
    """Every sum, product and quotient is a call that is rounded by itself; no bare one is left for a compiler to contract."""
    table = kernel._CUDA
    for name in ("add", "sub", "mul", "div", "sqrt"):
        assert table[name].startswith(f"__f{name}_rn("), name
    for name, text in table.items():
        inside = text.replace("+ 127", "").replace("- 127", "").replace("-{}", "")
        assert not set("+-*/") & set(inside), name


# -- where no kernel can be made ------------------------------------------------------------------------------------


def run(steps=60, **settings):
    model, optimizer = make()
    clipper = AdaptiveClipper(AdaptiveClipConfig(**{**SHORT, **settings}), optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), steps, factors={30: 100.0})
    state = {name: torch.as_tensor(value).clone() for name, value in clipper.state.items()}
    clipper.close()
    return weights(model), state


def fails(program, arguments, device):
    raise OSError("no compiler")


def differs(program, arguments, device):
    def launch(values, lanes):
        floats, bools = right(values, lanes)
        assert floats is not None
        floats[0] += 1e-6
        return floats, bools

    right = BUILD(program, arguments, device)
    return launch


BUILD = kernel.build


@pytest.mark.parametrize("settings", [{}, {"max_pace": 4.0}, LIMITS], ids=str)
@pytest.mark.parametrize("build", [fails, differs])
def test_without_a_kernel_the_training_is_the_same_and_one_line_says_so(
    build, settings, on_device, monkeypatch, caplog
):
    with_kernel = run(**settings)
    assert not [r for r in caplog.records if "small launches" in r.getMessage()]

    monkeypatch.setattr(fused, "build", build)
    monkeypatch.setattr(fused, "_failed", {})
    fused._kernel_of.cache_clear()
    without = run(**settings)
    fused._kernel_of.cache_clear()
    said = [r.getMessage() for r in caplog.records if "small launches" in r.getMessage()]

    assert torch.equal(with_kernel[0], without[0])
    assert {n: bits((v,)) for n, v in with_kernel[1].items()} == {n: bits((v,)) for n, v in without[1].items()}
    assert len(said) == 1
    assert ("no compiler" if build is fails else "differs") in said[0]


@pytest.mark.parametrize("controller", ["percentile", "median", "mean_sd"])
def test_a_long_window_is_left_to_torch_without_a_word(controller, on_device, caplog):
    run(controller=controller)
    assert not [r for r in caplog.records if "launches" in r.getMessage()]


def test_a_state_that_comes_from_elsewhere_is_taken_up(rng):
    """Loaded, carried over, or gone back to: not only the one that the last launch left."""
    rule = rule_of({}, ())
    made, first = Fused(rule, CPU, ()), rule.controller.init(tensor_ops(CPU), ())
    seen = list(stream(rng, (), reach=False))[:40]
    states = [first]
    for each in seen:
        states.append(made(states[-1], each)[0])
    again = type(states[20])(*(v.clone() for v in states[20]))
    for each, want in zip(seen[20:], states[21:], strict=True):
        again, _ = made(again, each)
        assert bits(again) == bits(want)
    back, _ = made(states[5], seen[5])  # the states of before are as they were
    assert bits(back) == bits(states[6])


def test_a_function_that_branches_on_a_value_is_not_taken_for_one_that_does_not(rng):
    def branches(state, norm):
        ops = ops_of(norm)
        return state, norm + ops(1.0) if norm > ops(1.0) else norm

    made = Fused(branches, CPU, ())
    assert [float(made((), torch.tensor(v))[1]) for v in (0.5, 2.0)] == [0.5, 3.0]
    assert made.launches is None


def test_different_controllers_for_different_tensors_are_a_launch_each(rng):
    config = AdaptiveClipConfig(**SHORT, parameter_rules={"a": {"controller": "zscore"}, "b": "exclude"})
    controller: Any = build_controller(config, [(None, 3), ("a", 2), ("b", 1)])
    state = plain = controller.init(tensor_ops(CPU), (6,))
    for seen in itertools.islice(stream(rng, (6,), reach=False), 200):
        decision, state = controller.update(state, seen)
        with unittest.mock.patch.object(fused, "_kernel_of", return_value=None):
            apart = build_controller(config, [(None, 3), ("a", 2), ("b", 1)])
            want, plain = apart.update(plain, seen)
        assert bits((decision, state)) == bits((want, plain))
    assert [made.launches for made in controller._launches.values()] == [1, 1]
