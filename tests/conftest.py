"""Shared fixtures. Randomness comes from `rng`, never from global state; models are built from configs, never downloaded."""

import gc
import hashlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("ADACLIP_TEST_DEVICES", ""))

import numpy as np
import pytest
import torch

from tests.lanes import LANES, on_lane

torch.set_num_threads(1)


@pytest.fixture
def rng(request):
    """A generator whose seed is the test's own name, so that tests do not depend on each other's order."""
    return np.random.default_rng(seed_of(request.node.nodeid))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=LANES)
def lane(request):
    """The test on both lanes."""
    with on_lane(request.param):
        yield request.param


@pytest.fixture
def on_device():
    """The test on the lane of an accelerator."""
    with on_lane("device"):
        yield


def pytest_collection_finish(session):
    # Every `Trainer.train` collects garbage, and most of that goes over the modules that all tests have imported.
    gc.collect()
    gc.freeze()


def seed_of(text: str) -> int:
    """A number from the whole text, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
