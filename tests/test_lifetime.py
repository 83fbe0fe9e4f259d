"""The end of a clipper: closed, dropped, replaced by a notebook's cell that is run again, or gone with the interpreter."""

import json
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from accelerate import Accelerator

from hf_adaclip import AdaptiveClipper
from hf_adaclip.audit import verify_ledger


def cell(path, steps=70, accelerator=None, **settings):
    """What stands in a cell of a notebook; the clipper is never closed."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, accelerator=accelerator, ledger=path, **settings)
    for _ in range(steps):
        model(torch.ones(2, 4)).square().mean().backward()
        clipper.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return clipper, optimizer


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if '"kind":"step"' in line]


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_clipper_that_is_dropped_loses_no_row(lane, accelerated, tmp_path):
    path = tmp_path / "l.jsonl"
    clipper, optimizer = cell(path, accelerator=Accelerator(cpu=True) if accelerated else None)
    gone = weakref.ref(clipper)
    del clipper
    assert (
        gone() is None
    )  # at once, and not when the garbage is collected: the optimizer and the accelerator still live
    assert steps_in(path) == list(range(70))
    report = verify_ledger(path)
    assert report.ok
    assert not report.closed
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_step_that_was_armed_does_not_keep_a_clipper(tmp_path):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    model(torch.ones(2, 4)).sum().backward()
    clipper.clip_(model.parameters(), measure=True)
    gone = weakref.ref(clipper)
    del clipper
    assert gone() is None
    optimizer.step()
    assert steps_in(tmp_path / "l.jsonl") == [0]


CELL = """
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
if accelerator is not None:
    model, optimizer = accelerator.prepare(model, optimizer)
clipper = AdaptiveClipper("adaptive", optimizer=optimizer, accelerator=accelerator, ledger=path)
for _ in range(steps):
    model(torch.ones(2, 4)).square().mean().backward()
    norm = clipper.clip_(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_cell_that_is_run_again_goes_on_in_the_same_ledger(lane, accelerated, tmp_path):
    path = tmp_path / "l.jsonl"
    notebook = {
        "torch": torch,
        "AdaptiveClipper": AdaptiveClipper,
        "accelerator": Accelerator(cpu=True) if accelerated else None,
        "path": path,
    }
    for steps in (30, 7, 20):
        notebook["steps"] = steps
        exec(CELL, notebook)
    notebook["clipper"].close()
    assert steps_in(path) == [*range(30), *range(7), *range(20)]
    assert verify_ledger(path).ok


def test_a_state_is_found_after_a_cell_was_run_again(tmp_path):
    """The clipper that a new one replaces does not take its place among the accelerator's state files."""
    accelerator = Accelerator(cpu=True)
    clipper = AdaptiveClipper("adaptive", accelerator=accelerator)
    clipper = AdaptiveClipper("adaptive", accelerator=accelerator)  # made while the first still lives
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    clipper.clip_([parameter])
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "clip_state.safetensors").is_file()
    again = AdaptiveClipper("adaptive", accelerator=Accelerator(cpu=True))
    assert again.load_state(tmp_path)


def test_several_clippers_keep_the_order_in_which_they_were_made(tmp_path):
    accelerator = Accelerator(cpu=True)
    first, second = (AdaptiveClipper("adaptive", accelerator=accelerator) for _ in range(2))
    parameter = torch.nn.Parameter(torch.ones(3))
    for clipper, times in ((second, 3), (first, 7)):  # used in the other order
        for _ in range(times):
            parameter.grad = torch.ones(3)
            clipper.clip_([parameter])
    accelerator.save_state(str(tmp_path))
    for name, steps in (("clip_state.safetensors", 7), ("clip_state_1.safetensors", 3)):
        assert (tmp_path / name).is_file()
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "clip_state.safetensors").write_bytes((tmp_path / name).read_bytes())
        reader = AdaptiveClipper("adaptive")
        assert reader.load_state(folder)
        assert reader.step == steps


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise RuntimeError('boom')", "sys.exit(3)"])
def test_rows_are_written_at_the_interpreters_end(end, tmp_path):
    script = f"""
        import sys, torch
        from hf_adaclip import AdaptiveClipper
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        clipper = AdaptiveClipper("adaptive", optimizer=optimizer, ledger={str(tmp_path / "l.jsonl")!r})
        for _ in range(100):
            model(torch.ones(2, 4)).square().mean().backward()
            clipper.clip_(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        {end}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert steps_in(tmp_path / "l.jsonl") == list(range(100))
    assert verify_ledger(tmp_path / "l.jsonl").ok
