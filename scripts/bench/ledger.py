"""How long it takes to verify and to replay a long ledger, in what memory, and how many bytes a step takes.

python -m scripts.bench.ledger                  # one million steps
python -m scripts.bench.ledger --steps 100000 --json
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hf_adaclip import AdaptiveClipConfig
from hf_adaclip.audit import Ledger, verify_ledger
from hf_adaclip.audit.ingest import load_series
from hf_adaclip.audit.replay import replay
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR, host_number
from hf_adaclip.ledger.records import Summary, state_to_json
from hf_adaclip.run.counts import RunStatistics
from hf_adaclip.run.recorder import Recorder, ledger_header


def write_ledger(path: Path, steps: int) -> None:
    """A ledger as a run writes it, without the training: noise with a spike every thousand steps."""
    config = AdaptiveClipConfig()
    controller, statistics = build_controller(config), RunStatistics()
    state = controller.init(SCALAR, ())
    rng = np.random.default_rng(0)
    norms = np.exp(0.15 * rng.standard_normal(steps)).astype(np.float32)
    norms[500::1000] *= 50
    losses = (2 + rng.random(steps)).astype(np.float32)
    cpu = torch.device("cpu")
    header = ledger_header(
        config,
        state=state,
        static_threshold=1.0,
        device=cpu,
        num_tensors=0,
        groups=(),
        parts=(),
        restarted=None,
        first_step=0,
        statistics=statistics,
        parent=None,
    )
    recorder = Recorder(
        capacity=256,
        num_tensors=0,
        ops=SCALAR,
        device=cpu,
        statistics=statistics,
        first_step=0,
        ledger=Ledger(path, header),
    )
    with np.errstate(all="ignore"):
        for norm, loss in zip(norms, losses, strict=True):
            decision, state = controller.update(state, Observation(norm, loss, host_number(1.0)))
            if recorder.full:
                recorder.flush()
            recorder.record(norm, Summary(*decision), loss, loss_scale=None, scaled=False, norms=None)
    recorder.flush()
    assert recorder.ledger is not None
    footer = {"steps": steps, "counts": statistics.counts_by_name(), "final_state": state_to_json(state)}
    recorder.ledger.close(footer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="records (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip_ledger.jsonl"
        write_ledger(path, arguments.steps)
        start = time.perf_counter()
        report = verify_ledger(path)
        verified = time.perf_counter()
        memory_verify = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        series = load_series(path)
        replay(series, AdaptiveClipConfig(controller="zscore"))
        replayed = time.perf_counter()
        found = {
            "steps": arguments.steps,
            "verified": report.ok and report.recomputed == arguments.steps,
            "verify_seconds": round(verified - start, 1),
            "replay_seconds": round(replayed - verified, 1),
            "bytes_per_step": round(path.stat().st_size / arguments.steps, 1),
            "peak_mib_after_verify": round(memory_verify),
            "peak_mib_after_replay": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    print(json.dumps(found) if arguments.json else "\n".join(f"{k:24s} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
