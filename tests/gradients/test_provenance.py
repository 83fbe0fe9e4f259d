"""Weights that were drawn, and weights that were trained."""

import pytest
import torch
from torch import nn

from hf_adaclip.gradients.matrices import hidden_matrices
from hf_adaclip.gradients.provenance import BEYOND, frozen_beside, loaded_weights, look_trained
from tests.integrations.trainers import as_loaded

DRAWN = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "uniform": lambda w: nn.init.uniform_(w, -0.3, 0.3),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "orthogonal": nn.init.orthogonal_,
    "zeros": nn.init.zeros_,
    "eye": lambda w: nn.init.eye_(w) if w.dim() == 2 else nn.init.dirac_(w),
    "blocks of their own scale": lambda w: nn.init.normal_(w).mul_(
        torch.tensor([1.0, 2.0]).repeat_interleave(len(w) // 2)[:, None]
    ),
}
SHAPES = ((64, 64), (256, 64), (64, 1024), (16, 300), (48, 48))


def drawn(kind, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.empty(shape) for shape in SHAPES]
    with torch.no_grad():
        for tensor in tensors:
            DRAWN[kind](tensor)
    return [t.to(dtype) for t in tensors]


def over_edge(matrix):
    rows, columns = matrix.shape
    s = torch.linalg.svdvals(matrix.double())
    return float(s[0] / (s.square().sum() / (rows * columns)).sqrt() / (rows**0.5 + columns**0.5))


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_drawn_looks_new(kind, dtype):
    assert not look_trained(drawn(kind, dtype))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("beyond", [1.1 * BEYOND, 4.0])
def test_a_direction_far_beyond_the_others_looks_trained_at_every_scale(beyond, scale):
    matrices = drawn("normal")
    for k, matrix in enumerate(matrices):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        while over_edge(matrix) < beyond and s[0] < 1e3:
            s[0] *= 1.05
            matrix = (u * s) @ v
        matrices[k] = matrix * scale
    expected = sorted(over_edge(m) for m in matrices)[len(matrices) // 2] > BEYOND
    assert look_trained(matrices) is expected is True


def test_a_training_that_learns_leaves_its_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    assert not look_trained(hidden_matrices([model]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    way = torch.randn(32, 2) @ torch.randn(2, 32)
    for _ in range(200):
        x = torch.randn(64, 32)
        loss = (model(x) - torch.tanh(x @ way)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert look_trained(hidden_matrices([model]))
    assert len(loaded_weights([model])) == 2
    model.requires_grad_(False)
    assert loaded_weights([model]) == []


def test_what_cannot_tell_says_nothing():
    assert not look_trained([])
    assert not look_trained([torch.ones(8, 8), torch.ones(64, 64, device="meta")])
    kernel = torch.ones(32, 16, 3, 3)
    assert look_trained([kernel])  # one direction alone
    assert not look_trained([torch.zeros(32, 32)])
    assert look_trained([torch.zeros(32, 32), kernel])
    assert not look_trained([torch.full((32, 32), float("nan"))])


def test_frozen_matrices_that_were_trained_and_packed_ones_stand_beside():
    model = as_loaded(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 2)))
    assert not frozen_beside([model])
    model[0].requires_grad_(False)  # positions that are computed are no sign of an earlier training
    model[1].bias.requires_grad_(False)
    assert not frozen_beside([model])
    model[1].requires_grad_(False)
    assert frozen_beside([model])
    model[1].weight = nn.Parameter(torch.zeros(8, 4), requires_grad=False)
    assert not frozen_beside([model])
    model[1].weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert frozen_beside([model])


def beside(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 8), *modules)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.int32], ids=str)
def test_a_table_of_numbers_is_no_packed_weight(dtype):
    model = beside()
    model.relative_position_index = nn.Parameter(torch.ones(16, 16, dtype=dtype), requires_grad=False)
    assert not frozen_beside([model])


def test_a_matrix_that_was_computed_is_no_earlier_training():
    fixed = nn.Linear(64, 64)
    fixed.weight = nn.Parameter(torch.ones(64, 64).tril(), requires_grad=False)
    assert look_trained([fixed.weight])
    assert not frozen_beside([beside(fixed)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_packed_weights_in_buffers_stand_beside(dtype):
    model = beside()
    for layer in [m for m in model if isinstance(m, nn.Linear)]:
        layer.register_buffer("qweight", torch.ones(8, 64, dtype=dtype))
    assert frozen_beside([model])


def test_a_whole_model_that_is_called_embedder_has_hidden_matrices():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 1)
    model = nn.Module()
    model.embedder = encoder
    patches = nn.Conv2d(3, 32, 4)
    model.patch_embeddings = nn.ModuleList([nn.Sequential(patches)])
    found = {id(p) for p in hidden_matrices([model])}
    layer = encoder.layers[0]
    assert {id(layer.linear1.weight), id(layer.self_attn.in_proj_weight)} <= found
    assert id(patches.weight) not in found
