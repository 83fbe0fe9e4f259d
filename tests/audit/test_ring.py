"""Rows on their way to the host: each of them once, in order, however looks and drains follow one another."""

import pytest
import torch

from hf_adaclip.run.ring import COLUMNS, LOOK_EVERY, DeviceRing, HostRing


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("capacity", [5, LOOK_EVERY, 64])
@pytest.mark.parametrize("drained", [{30}, {13, 14, 40}, {24}, set()], ids=str)
@pytest.mark.parametrize("num_tensors", [0, 3])
def test_every_row_comes_once_and_in_order(kind, capacity, drained, num_tensors):
    device = torch.device("cpu")
    ring = HostRing(capacity) if kind == "host" else DeviceRing(capacity, num_tensors, device)
    seen: list[list[float]] = []
    norms: list[list[float]] = []
    waits: list[int] = []

    def take(rows):
        seen.extend(rows.values)
        norms.extend(rows.norms or [])

    for step in range(100):
        if ring.full or step in drained:
            take(ring.drain())
        else:
            take(ring.look())
        waits.append(step - len(seen))
        of_tensors = torch.full((num_tensors,), float(step)) if num_tensors else None
        ring.append(tuple(torch.tensor(float(step)) for _ in COLUMNS[:-1]), of_tensors)
        ring.set_applied(torch.tensor(-float(step)))
    assert len(ring) == 100 - len(seen)
    take(ring.drain())

    assert [row[0] for row in seen] == list(range(100))
    assert [row[-1] for row in seen] == [-float(s) for s in range(100)]
    assert norms == ([[float(s)] * num_tensors for s in range(100)] if num_tensors else [])
    assert max(waits) <= (0 if kind == "host" else 2 * LOOK_EVERY)
