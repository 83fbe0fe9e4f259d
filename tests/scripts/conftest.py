import importlib
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from hf_adaclip import CONTROLLERS

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def after_ten(clip):
    """A controller by name as one that decides after ten norms; anything else for `--clip` as it is."""
    return f"{clip}:warmup_observations=10" if clip in CONTROLLERS else clip


@pytest.fixture
def here(monkeypatch):
    """Runs a script in this process, which saves the seconds that its imports take; other tests start scripts as users do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(name, listed):
        AcceleratorState._reset_state(True)
        try:
            return importlib.import_module(name).main([str(part) for part in listed])
        finally:
            AcceleratorState._reset_state(True)

    return call
