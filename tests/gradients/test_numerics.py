"""Threads, defaults of torch, and gradients of every kind: the norm is the same number, or the error says why there is none."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.gradients import collect, global_norm, tensor_norms


@pytest.fixture
def default():
    """Sets a default of torch for the test."""
    yield lambda kind, value: getattr(torch, f"set_default_{kind}")(value)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_threads_take_a_hundred_norms_each(dtype):
    gradients = [
        torch.randn(300_000 + 50_000 * i, generator=torch.Generator().manual_seed(i)).mul(1 + i).to(dtype)
        for i in range(8)
    ]
    wanted = [float(g.double().norm()) for g in gradients]

    def work(i):
        return [float(tensor_norms([gradients[i]])[0]) for _ in range(100)]

    with ThreadPoolExecutor(8) as pool:
        for found, want in zip(pool.map(work, range(8)), wanted, strict=True):
            assert found == pytest.approx([want] * 100, rel=3e-5)


@pytest.mark.slow
def test_runs_in_threads_are_the_runs_one_after_another(lane):
    def work(seed):
        return repr(decisions("adaptive", torch.bfloat16, seed=seed, size=20_000, steps=32))

    alone = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == alone


# -- defaults --------------------------------------------------------------------------------------------------------


def decisions(controller, dtype=torch.float32, *, seed=0, size=40, steps=40, ledger=None, folder=None, **settings):
    """A short run on given gradients; everything that was decided, recorded and saved, and the weights."""
    g = torch.Generator("cpu").manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu").to(dtype)  # noqa: E731
    parameters = [torch.nn.Parameter(draw(size, 7)), torch.nn.Parameter(draw(size))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=False)
    config = AdaptiveClipConfig(controller=controller, warmup_observations=10, **settings)
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=ledger)
    clipper.self_test()
    rows = []
    for step in range(steps):
        for p in parameters:
            p.grad = draw(*p.shape) * (100 if step == 25 else float("nan") if step == 30 else 0.01)
        norm = clipper.clip_(parameters, loss=0.1 * step, measure=True)
        rows.append(
            (norm.item(), *(global_norm(tensor_norms([p.grad])).item() for p in parameters if p.grad is not None))
        )
        with torch.device("cpu"):  # torch's own counts of steps
            optimizer.step()
    if folder is not None:
        clipper.save_state(folder)
        again = AdaptiveClipper(config, optimizer=optimizer)
        assert again.load_state(folder)
        rows.append([v.tolist() for v in again.state.values()])
    clipper.close()
    return rows, {k: v.tolist() for k, v in clipper.state.items()}, clipper.statistics.counts_by_name()


def steps_of(ledger):
    """Its records, without the time."""
    lines = [line for line in ledger.read_text().splitlines() if '"kind":"step"' in line]
    return [line[: line.index('"time"')] + line[line.index('"applied_norm"') :] for line in lines]


KINDS = [
    ("adaptive", {}),
    ("adaptive", {"granularity": "tensor"}),
    ("adaptive", {"max_pace": 8.0, "pace_start": 3}),
    ("adaptive", {"divergence_spreads": 8.0}),
    ("percentile", {}),
    ("mean_sd", {}),
    ("log_zscore", {}),
    ("weight_ratio", {}),
    ("second_moment", {}),
]


@pytest.mark.parametrize(("controller", "settings"), KINDS, ids=str)
def test_nothing_depends_on_the_default_dtype(lane, default, tmp_path, controller, settings):
    wanted = None
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        if dtype is torch.float64 and controller == "second_moment":
            continue  # torch's own AdamW counts its steps in float64 then, and steps otherwise in the last bit
        default("dtype", dtype)
        folder = tmp_path / str(i)
        folder.mkdir()
        found = repr(decisions(controller, ledger=folder / "l.jsonl", folder=folder, **settings))
        report = verify_ledger(folder / "l.jsonl")
        assert report.ok, report.findings
        wanted = wanted or (found, steps_of(folder / "l.jsonl"))
        assert found == wanted[0], dtype
        assert steps_of(folder / "l.jsonl") == wanted[1]


@pytest.mark.parametrize(("controller", "settings"), KINDS, ids=str)
def test_nothing_is_made_on_the_default_device(lane, default, tmp_path, controller, settings):
    wanted = repr(decisions(controller, folder=tmp_path, **settings))
    default("device", "meta")  # where a tensor has no values: nothing would come of one that is made there
    assert repr(decisions(controller, folder=tmp_path, **settings)) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_large_half_precision_norm_is_float32_under_any_default(default, dtype):
    gradient = torch.randn(600, 600, dtype=torch.float32).to(torch.bfloat16)
    default("dtype", dtype)
    norm = global_norm(tensor_norms([gradient]))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-5)


def test_a_norm_in_inference_mode_leaves_a_buffer_that_can_be_used_outside():
    gradient = torch.ones(1 << 17, dtype=torch.bfloat16)

    def work(inference):
        with torch.inference_mode(inference):
            return float(tensor_norms([gradient])[0])

    with ThreadPoolExecutor(1) as pool:  # a new thread, whose buffer is not made yet
        assert [pool.submit(work, inference).result() for inference in (True, False)] == pytest.approx([2**8.5] * 2)


# -- kinds of gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("conjugated", [False, True])
def test_a_complex_gradient_is_that_of_its_real_view(lane, dtype, conjugated):
    p = torch.nn.Parameter(torch.ones(6, 5, dtype=dtype))
    q = torch.nn.Parameter(torch.ones(3))
    values = torch.randn(6, 5, dtype=dtype)
    p.grad, q.grad = values.clone().conj() if conjugated else values.clone(), torch.full((3,), 2.0)
    want = (values.abs().double().square().sum() + 12).sqrt().item()
    clipper = AdaptiveClipper("static", static_threshold=1.0)
    clipper.self_test([p, q])
    norm = clipper.clip_([p, q])

    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(p.grad, (values.conj() if conjugated else values) / want, rtol=1e-5, atol=1e-7)
    assert q.grad.tolist() == pytest.approx([2 / want] * 3, rel=1e-5)


def train_complex(clip, real, controller, **settings):
    """The same weights as complex numbers or as pairs of real ones, on the same gradients."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(12, 4, 2, generator=g)  # noqa: E731
    start = draw()
    p = torch.nn.Parameter(start if real else torch.view_as_complex(start))
    optimizer = torch.optim.Adam([p], lr=1e-2, foreach=False)
    clipper = AdaptiveClipper(
        AdaptiveClipConfig(controller=controller, warmup_observations=5, **settings), optimizer=optimizer
    )
    norms = []
    for step in range(30):
        grad = draw() * (50 if step == 20 else 1)
        p.grad = grad if real else torch.view_as_complex(grad)
        norms.append(clipper.clip_([p]).item() if clip else 0)
        optimizer.step()
    return norms, p.detach() if real else torch.view_as_real(p.detach())


@pytest.mark.parametrize(
    ("controller", "settings"),
    [("adaptive", {}), ("adaptive", {"max_pace": 8.0, "pace_start": 2}), ("weight_ratio", {}), ("second_moment", {})],
    ids=str,
)
def test_a_complex_run_is_the_real_one(lane, controller, settings):
    norms, weights = train_complex(True, False, controller, **settings)
    wanted, wanted_weights = train_complex(True, True, controller, **settings)
    assert norms == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shapes", [[(0, 3), (4,)], [(4,), (0,)], [(0,)]], ids=str)
def test_empty_tensors_count_nothing(lane, shapes):
    for controller in ("adaptive", "weight_ratio"):
        parameters = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        for p in parameters:
            p.grad = torch.full_like(p, 3.0)
        clipper = AdaptiveClipper(controller, static_threshold=1e9)
        clipper.self_test(parameters)
        assert clipper.clip_(parameters).item() == (6.0 if len(shapes) > 1 else 0.0)


def test_gradients_of_another_dtype_than_their_parameters(lane):
    """bfloat16 weights with float32 gradients, as torch's `grad_dtype` and many frameworks make them."""
    for controller in ("adaptive", "weight_ratio", "second_moment"):
        p = torch.nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
        p.grad_dtype = None
        optimizer = torch.optim.AdamW([p], lr=1e-3)
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.zeros_like(p, dtype=torch.float32),
            "exp_avg_sq": torch.full_like(p, 1e-6, dtype=torch.float32),
        }
        config = AdaptiveClipConfig(controller=controller, warmup_observations=2, static_threshold=0.5)
        clipper = AdaptiveClipper(config, optimizer=optimizer)
        for _ in range(4):
            p.grad = torch.ones(8, 4)
            assert clipper.clip_([p]).item() == pytest.approx(32**0.5, rel=1e-6)
            assert p.grad.dtype == torch.float32
            assert float(p.grad.norm()) < 0.51 or controller == "adaptive"


def test_a_tied_parameter_is_scaled_once(lane):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 2.0)
    norm = AdaptiveClipper("static", static_threshold=2.0).clip_([p, p])
    assert norm.item() == 4.0
    assert p.grad.tolist() == pytest.approx([1.0] * 4, rel=1e-5)


def with_gradient(make, dtype=torch.float32):
    p = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    p.grad_dtype = None
    p.grad = make()
    return p


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.ones(4, dtype=torch.int64), "one of them is int64 on cpu"),
        (lambda: torch.ones(4).to(torch.float8_e4m3fn), "one of them is float8_e4m3fn on cpu"),
        (lambda: torch.ones(4, dtype=torch.bool), "one of them is bool on cpu"),
        (lambda: torch.ones(4).to_sparse(), r"one of them is sparse \(sparse_coo\)"),
    ],
)
def test_gradients_that_have_no_norm_are_refused(make, says):
    with pytest.raises(UnsupportedSetupError, match=rf"`parameters` must have .*gradients.*{says}"):
        AdaptiveClipper("adaptive").clip_([with_gradient(make)])


def test_compressed_and_meta_gradients_are_refused():
    p = torch.nn.Parameter(torch.zeros(4, 4).to_sparse_csr())
    p.grad = torch.eye(4).to_sparse_csr()
    with pytest.raises(UnsupportedSetupError, match=r"sparse \(sparse_csr\)"):
        collect([p])
    meta = torch.nn.Parameter(torch.zeros(4, device="meta"))
    meta.grad = torch.zeros(4, device="meta")
    with pytest.raises(UnsupportedSetupError, match="that hold values, but one of them is float32 on meta instead"):
        AdaptiveClipper("adaptive").clip_([meta])


def test_frozen_whole_numbers_and_meta_weights_beside_trainable_ones_are_no_matter(lane):
    whole = torch.nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    meta = torch.nn.Parameter(torch.ones(4, device="meta"))
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    clipper = AdaptiveClipper("adaptive")
    clipper.self_test([whole, meta, p])
    assert clipper.clip_([whole, meta, p]).item() == 2.0


# -- arguments -------------------------------------------------------------------------------------------------------


def test_what_is_no_iterable_of_tensors_is_named_with_the_way_out():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    every = r"\[p for g in optimizer.param_groups for p in g\[\"params\"\]\]"
    for given, says in (
        (model, r"is a module \(Linear\) instead. Pass `model.parameters\(\)`"),
        (torch.nn.Sequential(model), r"holds a module \(Linear\)"),
        (model.named_parameters(), "holds pairs of names and tensors"),
        (optimizer.param_groups, f"holds param_groups of an optimizer instead. Pass `{every}`"),
        (optimizer, rf"is an optimizer \(AdamW\) instead. Pass `{every}`"),
        (model.state_dict(), r"is a mapping, as state_dict\(\) gives"),
        (dict(model.named_parameters()), "is a mapping"),
        ([list(model.parameters())], "holds a list in place of a tensor"),
        ([model.weight, None], "holds None"),
        (None, "is None"),
        ("weight", "holds 'w'"),
        (3, "is int"),
        ([np.ones(3)], "holds ndarray"),
    ):
        for clip in (AdaptiveClipper("adaptive").clip_, AdaptiveClipper("adaptive").self_test):
            if given is None and clip.__name__ == "self_test":
                continue
            fresh = model.named_parameters() if "pairs" in says else given
            with pytest.raises(ConfigError, match=rf"`parameters` must be an iterable of tensors, but {says}"):
                clip(fresh)


def test_gradients_or_values_of_a_state_dict_in_place_of_parameters_are_an_error():
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    for given in ([p.grad for p in model.parameters()], model.state_dict().values()):
        with pytest.raises(ConfigError, match="`parameters` must be trainable, but none of the 2 tensors"):
            AdaptiveClipper("adaptive").clip_(given)


def test_containers_of_parameters_are_iterables():
    p = torch.nn.Parameter(torch.ones(4))
    for given in (torch.nn.ParameterList([p]), {p}, (p,), {p: 1}, p):
        p.grad = torch.ones(4)
        assert AdaptiveClipper("adaptive").clip_(given).item() == 2.0


@pytest.mark.parametrize(
    ("loss", "recorded"),
    [
        (2, 2.0),
        (2.5, 2.5),
        (True, 1.0),
        (10**400, float("inf")),
        (1e300, float("inf")),
        (np.float64(2.5), 2.5),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (np.int64(3), 3.0),
        (torch.tensor(2.5), 2.5),
        (torch.tensor([[2.5]]), 2.5),
        (torch.tensor(2.5, dtype=torch.float64), 2.5),
        (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
        (torch.tensor(3), 3.0),
        (torch.tensor(2.5, requires_grad=True), 2.5),
        (float("nan"), float("nan")),
        (torch.tensor(float("inf")), float("inf")),
    ],
    ids=repr,
)
def test_a_loss_of_any_kind_is_recorded(lane, tmp_path, loss, recorded):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    clipper = AdaptiveClipper("adaptive", ledger=tmp_path / "l.jsonl")
    clipper.clip_([p], loss=loss)
    clipper.close()
    text = (tmp_path / "l.jsonl").read_text()
    want = "null" if recorded != recorded else '"inf"' if recorded == float("inf") else recorded
    assert f'"loss":{want},' in text


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (torch.ones(3), r"a Tensor of shape \[3\] and dtype float32 instead: pass its mean, `loss.mean\(\)`"),
        (torch.ones(0), r"a Tensor of shape \[0\] and dtype float32 instead\."),
        (torch.ones((), dtype=torch.complex64), r"a Tensor of shape \[\] and dtype complex64"),
        (torch.ones((), device="meta"), "a Tensor of shape"),
        (np.ones(3), r"a ndarray of shape \[3\] and dtype float64 instead: pass"),
        (np.array("x"), "a ndarray of shape"),
        (1j, "complex instead"),
        ("0.5", "str instead"),
        ([0.5], "list instead"),
        ({"loss": 0.5}, "dict instead"),
    ],
    ids=repr,
)
def test_what_is_not_one_real_number_is_no_loss_and_nothing_has_happened(lane, loss, says):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 7.0)
    for settings in ({"controller": "static"}, {"controller": "weight_ratio"}, {"divergence_spreads": 5.0}):
        clipper = AdaptiveClipper(AdaptiveClipConfig(**settings))
        with pytest.raises(ConfigError, match=f"`loss` must be one real number, but is {says}"):
            clipper.clip_([p], loss=loss)
        assert p.grad.tolist() == [7.0] * 4
        assert clipper.step == 0


def test_a_pace_needs_a_learning_rate():
    from transformers.optimization import Adafactor

    model = torch.nn.Linear(4, 4)
    config = AdaptiveClipConfig(max_pace=4.0)
    with pytest.raises(ConfigError, match=r"`optimizer` must have a learning rate when `max_pace` > 1, but Adafactor"):
        AdaptiveClipper(config, optimizer=Adafactor(model.parameters()))
    given = Adafactor(model.parameters(), lr=1e-3, relative_step=False, warmup_init=False)
    before = copy.deepcopy(model.state_dict())
    clipper = AdaptiveClipper(config, optimizer=given)
    model(torch.ones(2, 4)).square().mean().backward()
    clipper.clip_(model.parameters())
    given.step()
    assert not torch.equal(before["weight"], model.weight)
