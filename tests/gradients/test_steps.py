"""Between clipping and the end of `optimizer.step()`: it raises, runs hooks twice, is that of another optimizer, computes new gradients."""

import gc

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ClippingDefeatedError, ConfigError
from hf_adaclip.gradients import StepGuard
from tests.gradients.test_guard import equal, snapshot
from tests.loops import HostReads, guards_of, make, weights

PACED = AdaptiveClipConfig(max_pace=64.0, pace_start=4, spectral_width=None, agreement=False)
PLAIN = AdaptiveClipConfig("static", static_threshold=1.0)


def backward(model, step=0, factor=1.0):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - x[:, :1] * 2).square().mean() * factor
    loss.backward()
    return loss.detach()


def said(caplog, text):
    return sum(text in record.getMessage() for record in caplog.records)


# -- a step that raises ------------------------------------------------------------------------------------------


def failing(base, **settings):
    class Failing(base):  # type: ignore[valid-type, misc]
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    return lambda model: Failing(model.parameters(), **settings)


@pytest.mark.parametrize(
    "build",
    [failing(torch.optim.SGD, lr=1e-3), failing(torch.optim.AdamW, lr=1e-3, fused=True, weight_decay=0.1)],
    ids=["sgd", "adamw"],
)
def test_a_step_that_raises_leaves_rate_and_decay_as_they_were(lane, build):
    model, _ = make()
    optimizer = build(model)
    group = optimizer.param_groups[0]
    given = (group["lr"], group["weight_decay"])
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)
    for step in range(8):
        backward(model, step)
        clipper.clip_(model.parameters())
        optimizer.fails = step in (0, 1, 5)
        for _ in range(2 if optimizer.fails else 1):  # tried again too
            try:
                optimizer.step()
            except RuntimeError:
                assert (group["lr"], group["weight_decay"]) == given
        optimizer.zero_grad()
        assert (group["lr"], group["weight_decay"]) == given
    assert "step" not in vars(optimizer)


def test_what_raises_on_a_fused_step_in_a_hook_of_somebody_else_is_put_right_too(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: 1 / 0)
    for step in range(3):
        backward(model, step)
        clipper.clip_(model.parameters())
        if step == 2:
            handle.remove()
            optimizer.step()
        else:
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 3e-3


def test_a_rate_that_somebody_sets_meanwhile_is_kept():
    model, optimizer = make(fused=False)
    guard = StepGuard(optimizer)
    group = optimizer.param_groups[0]
    backward(model)
    guard.arm(skip=None, pace=3.0)
    guard._before_step(optimizer, (optimizer,), {})
    assert group["lr"] == pytest.approx(9e-3)
    group["lr"] = 0.5  # a scheduler, before anything was put back
    guard._after_step(optimizer, (optimizer,), {})
    assert group["lr"] == 0.5


def test_a_bad_step_that_raised_is_left_out_when_it_is_tried_again(lane):
    model, _ = make()
    optimizer = failing(torch.optim.SGD, lr=0.1)(model)
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    before = weights(model)
    for factor in (1.0, float("nan")):
        backward(model, factor=factor)
        clipper.clip_(model.parameters())
        optimizer.fails = True
        if factor == 1.0:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        else:
            optimizer.step()  # does not even get to where it fails
        optimizer.zero_grad()
    assert torch.equal(before, weights(model))


# -- hooks that run twice, late, or not at all --------------------------------------------------------------------


class Calling(torch.optim.AdamW):
    """Torch runs the hooks of this one twice, once for each `step`, when a plain AdamW was made before."""

    def step(self, closure=None):
        self.rates = [group["lr"] for group in self.param_groups]
        value = super().step(closure)
        self.rates += [group["lr"] for group in self.param_groups]
        return value


def test_a_step_that_calls_super_is_paced_and_measured_once(lane, tmp_path):
    model, _ = make()
    optimizer = Calling(model.parameters(), lr=1e-2, weight_decay=0.0)
    twin, _ = make()
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    clippers = [AdaptiveClipper(PACED, optimizer=o) for o in (optimizer, plain)]
    for step in range(12):
        for m, o, clipper in ((model, optimizer, clippers[0]), (twin, plain, clippers[1])):
            backward(m, step)
            clipper.clip_(m.parameters(), measure=True)
            o.step()
            o.zero_grad()
        pace = float(clippers[0].state["pace"])
        assert optimizer.rates == pytest.approx([1e-2 * pace] * 2)  # until the outermost has ended
        assert optimizer.param_groups[0]["lr"] == 1e-2
        assert torch.equal(weights(model), weights(twin))


def undo(optimizer, args, kwargs):
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad.mul_(100)


@pytest.mark.parametrize("since", [0, 7])
def test_a_hook_that_was_registered_later_does_not_escape(lane, since):
    """It runs before the measurement all the same, and the check is made again for it."""
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    states = []

    def train():
        for step in range(12):
            if step == since:
                optimizer.register_step_pre_hook(undo)
            backward(model, step)
            clipper.clip_(model.parameters(), measure=False)
            states.append(weights(model))
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(ClippingDefeatedError, match="hooks on the optimizer"):
        train()
    assert len(states) == since + 1
    assert torch.equal(states[-1], weights(model))


def test_a_hook_of_all_optimizers_is_found_too(lane):
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    backward(model)
    clipper.clip_(model.parameters())
    optimizer.step()
    handle = torch_optimizer.register_optimizer_step_pre_hook(undo)
    try:
        clipper.clip_(model.parameters())
        with pytest.raises(ClippingDefeatedError):
            optimizer.step()
    finally:
        handle.remove()


def test_a_gradient_that_gets_smaller_on_its_way_is_told_of(lane, caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    for step in range(3):
        backward(model, step)
        clipper.clip_(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    assert said(caplog, "something makes it smaller in between") == 1


def test_a_step_that_nobody_prepared_is_told_of_once_and_counted(lane, caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    optimizer.step()  # before the first: a loop may build state, or please a scheduler
    for step in range(6):
        backward(model, step)
        clipper.clip_(model.parameters())
        optimizer.step()
        if step > 3:
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without gradients nothing moves
    assert said(caplog, "has made a step without it after 5 steps with it") == 1
    assert said(caplog, "without it") == 1
    assert guards_of(clipper).unarmed == 2


def test_two_clippers_on_one_optimizer_do_not_accuse_each_other(lane, caplog):
    model, optimizer = make()
    clippers = [AdaptiveClipper(PLAIN, optimizer=optimizer) for _ in range(2)]
    for turn in (0, 0, 1, 1, 0):
        backward(model)
        clippers[turn].clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert not caplog.records


# -- closures ----------------------------------------------------------------------------------------------------


def test_a_closure_that_computes_gradients_anew_is_refused_before_anything_moves(lane):
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        model, _ = make()
        optimizer = kind(model.parameters(), lr=0.1)
        clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            return backward(model)

        closure()
        clipper.clip_(model.parameters())
        before = weights(model)
        for given in ({"closure": closure}, {}):
            with pytest.raises(ClippingDefeatedError, match="Call `clip_` in the closure"):
                optimizer.step(*(() if given else (closure,)), **given)
        assert torch.equal(before, weights(model))


def test_a_closure_that_only_gives_the_loss_is_fine_and_its_value_comes_back(lane, caplog):
    model, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    for factor in (1.0, float("nan"), 1.0):
        loss = backward(model, factor=factor)
        clipper.clip_(model.parameters())
        assert torch.equal(optimizer.step(lambda loss=loss: loss + 1).isnan(), loss.isnan())
        optimizer.zero_grad()
    assert not said(caplog, "`optimizer`")
    assert clipper.metrics()["clip/skipped"] == 1


@pytest.mark.parametrize("kind", ["LBFGS", "SGD", "AdamW"])
def test_clipping_in_the_closure_is_torchs_and_nobody_is_warned(lane, kind, caplog):
    settings = {
        "LBFGS": {"lr": 0.1, "max_iter": 5},
        "SGD": {"lr": 0.1, "momentum": 0.9},
        "AdamW": {"lr": 0.01, "fused": True},
    }
    results = []
    for ours in (True, False):
        model, _ = make()
        optimizer = getattr(torch.optim, kind)(model.parameters(), **settings[kind])
        clipper = AdaptiveClipper(PLAIN.replace(static_threshold=0.5), optimizer=optimizer) if ours else None

        def closure(model=model, optimizer=optimizer, clipper=clipper):
            optimizer.zero_grad()
            loss = backward(model)
            if clipper is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                clipper.clip_(model.parameters())
            return loss

        for _ in range(25):
            optimizer.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)
    assert not [record for record in caplog.records if "optimizer" in record.getMessage()]


def test_a_pace_that_could_not_act_is_refused():
    model, _ = make()
    optimizer = torch.optim.LBFGS(model.parameters())
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)

    def closure():
        optimizer.zero_grad()
        loss = backward(model)
        clipper.clip_(model.parameters())
        return loss

    with pytest.raises(ConfigError, match="`max_pace` must be 1 with LBFGS"):
        optimizer.step(closure)


def test_a_bad_step_in_the_closure_is_left_out_and_the_pace_acts_there(lane):
    model, _ = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)

    def step(factor):
        def closure():
            optimizer.zero_grad()
            loss = backward(model, factor=factor)
            clipper.clip_(model.parameters())
            rates.append(float(optimizer.param_groups[0]["lr"]))
            return loss

        optimizer.step(closure)
        assert optimizer.param_groups[0]["lr"] == 1e-2

    rates: list[float] = []
    for _ in range(3):
        step(1.0)
    assert rates == pytest.approx([1e-2 * 1e-3, 1e-2 * 1e-3, 1e-2 * 1e-3], rel=1e3)
    assert rates[0] != 1e-2
    before = snapshot(model, optimizer)
    step(float("nan"))
    assert equal(before, snapshot(model, optimizer))


# -- another optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [60, 61, 90])
def test_an_optimizer_made_anew_is_told_of_at_once_and_a_bad_step_destroys_nothing(lane, fused, bad, caplog):
    model, optimizer = make(fused=fused)
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    for step in range(100):
        if step == 60:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        if step == 61:
            assert said(caplog, "`optimizer` must be the one that steps on these gradients") == 1
        backward(model, step, float("nan") if step == bad else 1.0)
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert weights(model).isfinite().all()
    assert said(caplog, "`optimizer` must be the one that steps on these gradients") == 1


class Foreign:
    """Steps, and is no torch optimizer."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-3)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def test_one_that_is_no_torch_optimizer_is_found_by_its_absence(lane, caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    for step in range(60):
        if step == 20:
            optimizer = Foreign(model.parameters())
        backward(model, step, float("nan") if step == 50 else 1.0)
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert weights(model).isfinite().all()
    assert said(caplog, "its `step` was not called in 20 steps") == 1


def test_one_optimizer_of_two_that_was_not_named(lane, caplog):
    model, _ = make()
    known = torch.optim.AdamW(model[0].parameters(), lr=1e-3, fused=True)
    forgotten = torch.optim.AdamW(model[2].parameters(), lr=1e-3, fused=True)
    clipper = AdaptiveClipper(PLAIN, optimizer=known)
    for step in range(10):
        backward(model, step, float("nan") if step == 5 else 1.0)
        clipper.clip_(model.parameters())
        for optimizer in (known, forgotten):
            optimizer.step()
            optimizer.zero_grad()
    assert weights(model).isfinite().all()
    assert said(caplog, "another one, AdamW, has made a step on them") == 1


@pytest.mark.parametrize("settings", [{}, {"controller": "second_moment"}], ids=str)
def test_the_optimizer_of_an_accelerator_is_followed(lane, settings, caplog):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    clipper = AdaptiveClipper(AdaptiveClipConfig(**settings), accelerator=accelerator)
    for step in range(40):
        if step == 20:
            optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
        backward(model, step, float("nan") if step in (20, 30) else 1.0)
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert weights(model).isfinite().all()
    assert guards_of(clipper).optimizers == [optimizer.optimizer]
    assert guards_of(clipper).consumed == 19
    assert said(caplog, "guarded from here on") == 1
    accelerator.free_memory()


def test_a_wrapper_around_the_one_that_is_known_is_no_stranger(lane, caplog):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups[0]["params"], {"lr": 1.0})

        def step(self, closure=None):
            return self.inner.step(closure)

    for outer in (True, False):
        model, inner = make()
        wrapper = Wrapper(inner)
        clipper = AdaptiveClipper(PLAIN, optimizer=wrapper if outer else inner)
        for step in range(30):
            backward(model, step, float("nan") if step == 20 else 1.0)
            clipper.clip_(model.parameters())
            wrapper.step()
            inner.zero_grad()
        assert weights(model).isfinite().all()
    assert not said(caplog, "`optimizer`")


def test_a_loop_that_leaves_steps_out_by_itself_is_not_warned(lane, caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(PLAIN.replace(max_consecutive_nonfinite=1000), optimizer=optimizer)
    for step in range(120):
        bad = step % 7 == 3 or 30 <= step < 60
        backward(model, step, float("nan") if bad else 1.0)
        norm = clipper.clip_(model.parameters())
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    assert not said(caplog, "`optimizer`")
    assert not said(caplog, "without it")


def test_two_models_with_a_clipper_each_do_not_meet(lane, caplog):
    pairs = [make(), make()]
    clippers = [AdaptiveClipper(PLAIN, optimizer=optimizer) for _, optimizer in pairs]
    for step in range(5):
        for (model, _), clipper in zip(pairs, clippers, strict=True):
            backward(model, step, float("nan") if step == 3 else 1.0)
            clipper.clip_(model.parameters())
        for _, optimizer in reversed(pairs):
            optimizer.step()
            optimizer.zero_grad()
    assert not said(caplog, "`optimizer`")


def test_nothing_of_it_reads_the_device_or_outlives_the_clipper(on_device):
    model, optimizer = make(weight_decay=0.1)
    clipper = AdaptiveClipper(PACED.replace(self_test=False), optimizer=optimizer)
    reads = []
    for step in range(12):
        backward(model, step)
        with HostReads() as seen:
            if step < 11:
                clipper.clip_(model.parameters(), measure=False)
            optimizer.step()
        reads.append(seen.count)
        optimizer.zero_grad()
        if step == 10:
            clipper.close()
            del clipper
            gc.collect()
    assert len(set(reads[1:])) == 1
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


# -- weight decay ------------------------------------------------------------------------------------------------


def _adafactor(p):
    from transformers.optimization import Adafactor

    return Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False, weight_decay=0.1)


DECOUPLED = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, foreach=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, foreach=False),
    "adamw-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-3, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3, weight_decay=0.1),
    "adafactor-transformers": _adafactor,
    "adamw-subclass": lambda p: type("Mine", (torch.optim.AdamW,), {})(p, lr=1e-3, weight_decay=0.1),
}
COUPLED = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3, weight_decay=0.1),
}


def _others():
    optimi, po, bnb = (pytest.importorskip(n) for n in ("optimi", "pytorch_optimizer", "bitsandbytes"))
    made = {}
    for package, names in {
        optimi: ("AdamW", "Lion", "Adan", "StableAdamW", "Ranger"),
        bnb.optim: ("AdamW", "Adam", "Lion"),
        po: ("Lion", "AdaBelief", "Lamb", "StableAdamW", "GaLore", "Tiger", "Adan", "SOAP", "ScheduleFreeAdamW"),
    }.items():
        for name in names:
            kind = getattr(package, name)
            extra = {"decouple_wd": True} if name == "Ranger" else {}
            made[f"{package.__name__}-{name}"] = lambda p, kind=kind, extra=extra: kind(
                list(p), lr=1e-3, weight_decay=0.1, **extra
            )
    return made


OTHERS = _others()


def step_of_zeros(build, pace, lane, times=2):
    """What a step on gradients of zero takes off the weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 4, bias=False))
    optimizer = build(list(model.parameters()))
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    guard = StepGuard(optimizer)
    before = weights(model)
    for _ in range(times):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if pace is not None:
            guard.arm(
                skip=torch.tensor(False) if lane == "device" else False,
                pace=torch.tensor(pace) if lane == "device" else pace,
            )
        optimizer.step()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1] * len(optimizer.param_groups)
    return (before - weights(model)) / before


@pytest.mark.parametrize("lane", ["host", "device"])
@pytest.mark.parametrize("kind", [*DECOUPLED, *OTHERS])
def test_decoupled_decay_takes_the_same_off_the_weights_whatever_the_pace(kind, lane):
    build = {**DECOUPLED, **OTHERS}[kind]
    plain = step_of_zeros(build, None, lane)
    assert plain.abs().max() > 5e-5
    for pace in (64.0, 0.1):
        assert torch.allclose(step_of_zeros(build, pace, lane), plain, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("lane", ["host", "device"])
@pytest.mark.parametrize("kind", COUPLED)
def test_coupled_decay_is_part_of_the_gradient_and_goes_with_it(kind, lane):
    build = COUPLED[kind]
    paced, plain = step_of_zeros(build, 8.0, lane, times=1), step_of_zeros(build, None, lane, times=1)
    assert torch.allclose(paced, 8 * plain, rtol=1e-2)


def test_a_step_that_is_left_out_on_the_device_does_not_decay_either():
    model, optimizer = make(weight_decay=0.1)
    guard = StepGuard(optimizer)
    before = weights(model)
    for skip in (True, False):
        backward(model)
        guard.arm(skip=torch.tensor(skip), pace=torch.tensor(64.0))
        optimizer.step()
        assert torch.equal(before, weights(model)) is skip


def test_a_decay_that_is_not_known_is_told_of_once_and_only_where_it_acts(caplog):
    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    for decay in (0.0, 0.1):
        optimizer = Own([torch.nn.Parameter(torch.ones(2))], {"lr": 1.0, "weight_decay": decay})
        guard = StepGuard(optimizer)
        for _ in range(3):
            guard.arm(skip=None, pace=2.0)
            optimizer.step()
        assert said(caplog, "`weight_decay` of Own may be multiplied by the pace") == (decay > 0)


# -- what calls of `step` mean to others ---------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False], ids=["scheduler first", "clipper first"])
def test_a_scheduler_has_no_reason_to_complain_of_a_step_left_out(lane, early, recwarn):
    model, optimizer = make(fused=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if early else None
    clipper = AdaptiveClipper(PACED, optimizer=optimizer)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1)
    kept = vars(optimizer).get("step")
    for step in range(4):
        backward(model, step, float("nan") if step in (0, 2) else 1.0)
        clipper.clip_(model.parameters())
        assert optimizer.step() is None
        scheduler.step()
        optimizer.zero_grad()
        assert vars(optimizer).get("step") is kept
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_step_that_somebody_has_kept_the_method_of_runs_on_nothing(lane):
    """Accelerate does that, with a loss scaler."""
    model, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = optimizer.step
    clipper = AdaptiveClipper(PLAIN, optimizer=optimizer)
    for step in range(4):
        before = snapshot(model, optimizer)
        backward(model, step, float("nan") if step == 2 else 1.0)
        clipper.clip_(model.parameters())
        kept()
        assert equal(before, snapshot(model, optimizer)) is (step == 2)
        optimizer.zero_grad()
    assert "step" not in vars(optimizer)
