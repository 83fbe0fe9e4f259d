"""The spectral range against an exact singular value decomposition: values, directions, norms, and what is left alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_adaclip.gradients.matrices import HiddenMatrices, hidden_matrices
from hf_adaclip.gradients.newton_schulz import FLOOR, TOLERANCE, clipped_directly, inverse_root, quintics
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.spectral import SpectralRange
from tests.reference import spectral as reference

WIDTHS = (0.05, 0.3, 1.0, 3.0)


class Everything(HiddenMatrices):
    """Takes every parameter for a hidden matrix."""

    def __init__(self):
        super().__init__(list)
        self._names: dict[int, str] = {}

    def among(self, parameters):
        return [self._names.setdefault(id(p), f"p{len(self._names)}") for p in parameters]


def clipped(*matrices, width, change=True):
    """Gradients after the range, and what it says that it has done."""
    parameters = [nn.Parameter(torch.zeros_like(m)) for m in matrices]
    gradients = [m.clone() for m in matrices]
    effect = SpectralRange(width, Everything()).act_(
        Gradients(parameters, list(range(len(matrices))), gradients), change=change
    )
    return gradients, effect


def drawn(seed: int, rows: int, columns: int, decades: float = 2.0) -> torch.Tensor:
    """A matrix whose singular values go over so many decades, in random directions."""
    rng = np.random.default_rng(seed)
    side = min(rows, columns)
    u, v = np.linalg.qr(rng.normal(size=(rows, side)))[0], np.linalg.qr(rng.normal(size=(columns, side)))[0]
    return torch.from_numpy((u * np.logspace(0, -decades, side)) @ v.T).float()


def distance(found, wanted):
    return float(np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192), (33, 7), (2, 50)])
@pytest.mark.parametrize("decades", [0.5, 2.0, 5.0])
def test_singular_values_land_where_an_exact_decomposition_puts_them(shape, width, decades):
    matrix = drawn(1, shape[0], shape[1], decades)
    [found], effect = clipped(matrix, width=width)
    wanted = reference.soft_clipped(matrix, width)
    assert distance(found, wanted) < TOLERANCE
    assert float(effect.altered) == pytest.approx(reference.altered([matrix], [wanted]), abs=TOLERANCE)
    assert float(effect.norm) == pytest.approx(float(matrix.norm()), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    width=st.floats(0.02, 20.0),
    decades=st.floats(0.0, 6.0),
    size=st.floats(-10.0, 10.0),
)
def test_norm_directions_and_size_of_any_matrix(seed, rows, columns, width, decades, size):
    matrix = drawn(seed, rows, columns, decades) * 10.0**size
    [found], _ = clipped(matrix, width=width)
    assert float(found.norm()) == pytest.approx(float(matrix.norm()), rel=1e-5)
    assert distance(found, reference.soft_clipped(matrix, width)) < TOLERANCE
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(np.linalg.qr(rng.normal(size=(rows, rows)))[0]).float()
    p = torch.from_numpy(np.linalg.qr(rng.normal(size=(columns, columns)))[0]).float()
    [turned], _ = clipped(q @ matrix @ p, width=width)
    assert distance(turned, (q.double() @ found.double() @ p.double()).numpy()) < 2e-3


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (8, 300)])
def test_width_0_makes_all_values_equal_that_are_not_lost_in_rounding(shape):
    matrix = drawn(2, shape[0], shape[1], 1.5)
    [found], _ = clipped(matrix, width=0.0)
    values = torch.linalg.svdvals(found.double())
    assert float(values.max() / values.min()) < (1 + TOLERANCE) / (1 - TOLERANCE)
    assert distance(found, reference.soft_clipped(matrix, 0.0)) < TOLERANCE
    [noisy], _ = clipped(drawn(2, shape[0], shape[1], 6.0), width=0.0)  # what is below the floor is not blown up
    assert float(torch.linalg.svdvals(noisy.double())[-1]) < 0.1 * float(torch.linalg.svdvals(noisy.double())[0])


def test_a_smaller_width_takes_more_from_the_largest_value():
    matrix = drawn(3, 48, 32)
    shares = [
        float(torch.linalg.svdvals(clipped(matrix, width=w)[0][0])[0]) for w in (0.0, 0.1, 0.5, 2.0, 10.0, math.inf)
    ]
    assert shares == sorted(shares)


def test_width_infinity_changes_nothing_bit_for_bit():
    matrices = [drawn(4, 20, 30), torch.full((3, 3), math.nan), torch.zeros(4, 4), torch.randn(5, 5).bfloat16()]
    found, effect = clipped(*matrices, width=math.inf)
    for before, after in zip(matrices, found, strict=True):
        assert after.numpy(force=True).tobytes() if after.dtype != torch.bfloat16 else True
        assert torch.equal(before.nan_to_num(7), after.nan_to_num(7))
    assert float(effect.altered) == 0


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_zeros_and_what_is_not_finite_pass_through_and_spoil_no_other_matrix(width):
    good = drawn(5, 16, 16)
    bad = [torch.zeros(16, 16), torch.full((16, 16), math.nan), torch.full((16, 16), math.inf), good * 1e-30]
    found, effect = clipped(good, *bad, width=width)
    [alone], _ = clipped(good, width=width)
    assert torch.equal(found[0], alone)
    for before, after in zip(bad, found[1:], strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))
    assert float(effect.norm) == pytest.approx(float(good.norm()), rel=1e-5)
    assert 0 <= float(effect.altered) <= 1


def test_a_factor_before_is_a_factor_after():
    matrix = drawn(6, 40, 24)
    [found], _ = clipped(matrix, width=0.3)
    [scaled], _ = clipped(matrix * 0.125, width=0.3)
    assert torch.equal(found * 0.125, scaled)


def test_shapes_are_stacked_and_each_matrix_is_worked_on_as_if_alone():
    matrices = [
        drawn(i, shape[0], shape[1]) for i, shape in enumerate([(64, 64)] * 3 + [(192, 64)] * 2 + [(64, 192), (8, 64)])
    ]
    together, effect = clipped(*matrices, width=0.25)
    for matrix, found in zip(matrices, together, strict=True):
        [alone], _ = clipped(matrix, width=0.25)
        assert distance(found, alone.double().numpy()) < 1e-5
    assert float(effect.altered) == pytest.approx(reference.altered(matrices, together), abs=1e-3)


def test_nothing_is_changed_where_only_the_effect_is_asked_for():
    matrix = drawn(7, 12, 20)
    [same], would = clipped(matrix, width=0.1, change=False)
    _, done = clipped(matrix, width=0.1)
    assert torch.equal(same, matrix)
    assert float(would.altered) == float(done.altered) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_other_precisions_come_back_in_their_own(dtype):
    matrix = drawn(8, 48, 64, 1.5).to(dtype)
    [found], _ = clipped(matrix, width=0.5)
    assert found.dtype == dtype
    assert distance(found.double(), reference.soft_clipped(matrix.double(), 0.5)) < TOLERANCE


@pytest.mark.parametrize("width", [0.0, 0.25, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (512, 256)])
def test_half_precision_against_float64(width, shape):
    """What accelerators run: bfloat16 from its own direction of the algorithm."""
    matrix = drawn(
        9, shape[0], shape[1], 1.5 if width else 0.5
    )  # of smaller values 8 bits leave too little to make them equal
    found = clipped_directly((matrix / matrix.norm())[None], width)[0].double()
    found = found * (matrix.double().norm() / found.norm())
    assert distance(found, reference.soft_clipped(matrix, width)) < 1.5 * TOLERANCE


@pytest.mark.parametrize("smallest", [FLOOR, 0.01, 0.1, 0.5, 0.94])
def test_polynomials_take_their_interval_to_within_the_tolerance_of_1(smallest):
    x = np.linspace(smallest, 1, 20001)
    for a, b, c in quintics(smallest):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() <= TOLERANCE


def test_the_inverse_root_is_one():
    gram = torch.from_numpy(np.cov(np.random.default_rng(0).normal(size=(30, 100)))).float()
    gram = (gram / gram.trace())[None]
    root = inverse_root(gram.clone(), 0.5)[0].double()
    exact = gram[0].double() + 0.25 / 30 * torch.eye(30, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(root @ exact @ root)
    assert float(eigenvalues.max() / eigenvalues.min()) < (1 + TOLERANCE) ** 2 / (1 - TOLERANCE) ** 2


# -- which parameters ------------------------------------------------------------------------------------------------


def names(model):
    of = {id(p): n for n, p in model.named_parameters()}
    return {of[id(p)] for p in hidden_matrices([model])}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.one = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv2d(4, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.row = nn.Linear(16, 1)
        self.empty = nn.Linear(0, 4)
        self.two = nn.Linear(16, 8)
        self.head = nn.Linear(8, 10)


def test_hidden_matrices_of_a_plain_model():
    assert names(Plain()) == {"one.weight", "conv.weight", "two.weight", "head.weight"}


def test_tied_weights_are_an_embedding():
    model = Plain()
    model.head.weight = nn.Parameter(torch.zeros(10, 8))
    model.embed.weight = model.head.weight
    assert names(model) == {"one.weight", "conv.weight", "two.weight"}


def test_hidden_matrices_of_models_of_transformers():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = names(LlamaForCausalLM(LlamaConfig(vocab_size=20, **small)))
    assert len(llama) == 8
    assert all(".layers.0." in n or n == "lm_head.weight" for n in llama)
    bert = names(BertForSequenceClassification(BertConfig(vocab_size=20, **small)))
    assert "classifier.weight" in bert
    assert not [n for n in bert if "embed" in n]
    vit = names(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **small)))
    assert "classifier.weight" in vit
    assert not [n for n in vit if "embed" in n]
    gpt2 = names(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)))
    assert gpt2 == {f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    t5 = names(
        T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    )
    assert t5
    assert not [n for n in t5 if "shared" in n or "lm_head" in n or "embed" in n]


def test_lora_factors_are_hidden_matrices_and_its_embedding_is_not():
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **small))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    found = names(model) & trainable
    assert len(found) == 3
    assert all("q_proj.lora_" in n or "lm_head" in n for n in found)


def test_a_parameter_that_is_made_later_is_looked_up():
    model = Plain()
    matrices = HiddenMatrices(lambda: [model])
    assert matrices.among([model.one.weight, model.head.weight]) == ["one.weight", "head.weight"]
    model.one = nn.Linear(8, 16)
    assert matrices.among([model.one.weight, model.head.weight, model.one.bias]) == ["one.weight", "head.weight", None]


def test_models_are_gone_through_once_though_parts_are_asked_for_in_turn(monkeypatch):
    """The range asks for all parameters, the agreement for those of one group after the other, in every step."""
    model, looks = Plain(), []

    def look(models):
        looks.append(1)
        return hidden_matrices(models)

    monkeypatch.setattr("hf_adaclip.gradients.matrices.hidden_matrices", look)
    matrices, everything = HiddenMatrices(lambda: [model]), list(model.parameters())
    for _ in range(3):
        for part in (everything, [p for p in everything if p.dim() > 1], [p for p in everything if p.dim() == 1]):
            matrices.among(part)
    for p in everything:
        matrices.among([p])
    assert len(looks) == 1
    vectors_first = HiddenMatrices(lambda: [model])
    for _ in range(3):
        vectors_first.among([p for p in everything if p.dim() == 1])
        vectors_first.among(everything)
    assert len(looks) == 3


def test_convolution_kernels_are_flattened():
    kernel = torch.randn(6, 4, 3, 3)
    model = Plain()
    gradients = Gradients([model.conv.weight], [0], [kernel.clone(memory_format=torch.channels_last)])
    SpectralRange(0.5, HiddenMatrices(lambda: [model])).act_(gradients)
    wanted = reference.soft_clipped(kernel.flatten(1), 0.5).reshape(kernel.shape)
    assert distance(gradients.tensors[0], wanted) < TOLERANCE
