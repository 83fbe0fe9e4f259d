"""Run on several ranks by test_rewind.py: trouble that only rank 1 knows of, or the data left out from the start."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from hf_adaclip.incidents.rules import Finding
from hf_adaclip.incidents.skip_list import SKIP_FILE, SkipList
from tests.integrations.launching import leave
from tests.integrations.test_rewind import CASES, Planted, run, state_of

WAYS = {
    "as it comes": {},
    "accumulation": CASES["accumulation"].ways,
    "pace": CASES["pace"].ways,
    "across an epoch's end": CASES["across an epoch's end"].ways,
    "loss": {"clip": {"controller": "adaptive", "divergence_spreads": 9.0}},
}


class OfOneRank(Planted):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 22:
            clipper = self._trainer.clipper
            clipper.rewinder.judge(clipper.step, Finding("zero_loss", "Planted trouble.", 1.0, 1))


def main(kind, way, folder):
    torch.set_num_threads(1)
    ways = dict(WAYS[way])
    trouble = OfOneRank if kind == "back" else None
    if kind == "never":
        ways["clip"] = {**ways.get("clip", {}), "on_trouble": "continue"}
        if int(os.environ["RANK"]) == 0:  # the others are told
            SkipList(frozenset(range(10, 25))).write(folder)
    trainer = run(folder, planted=trouble, **ways)
    rank = trainer.args.process_index
    state = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state_of(trainer))).hexdigest()
    history = [] if trainer.clipper.rewinder is None else [list(r) for r in trainer.clipper.rewinder.history]
    steps = json.loads((folder / SKIP_FILE).read_text())["steps"] if rank == 0 else None
    (folder / f"rank{rank}.json").write_text(json.dumps({"state": state, "history": history, "steps": steps}))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
