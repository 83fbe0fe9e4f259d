"""Shared fixtures. Randomness comes from `rng`, never from global state; models are built from configs, never downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("ADACLIP_TEST_DEVICES", ""))

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def rng(request):
    """A generator whose seed is the test's own name, so that tests do not depend on each other's order."""
    return np.random.default_rng(abs(hash_of(request.node.nodeid)) % 2**32)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def hash_of(text: str) -> int:
    """A stable hash (Python's own differs between processes)."""
    return int.from_bytes(text.encode()[-8:].rjust(8, b"\0"), "little") ^ len(text)
