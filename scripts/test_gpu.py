"""Run the GPU tests and write down what came out, with date, versions, device and command: `make test-gpu`."""

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """A pytest plugin that keeps the outcome of every test."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the call itself, and whatever kept it from being called."""
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.outcome == "passed" else str(report.longrepr)[-2000:]
            self.tests.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 2),
                    **({"text": text} if text else {}),
                }
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("model_cards/gpu/tests.json"), help="result file (default: %(default)s)"
    )
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()
    os.environ.setdefault("ADACLIP_TEST_DEVICES", "0")
    # What makes cuBLAS deterministic; it has to be there before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    recorder = Recorder()
    code = int(pytest.main(["-m", "gpu", "tests/gpu", "-q", *options.pytest], plugins=[recorder]))

    import torch

    from hf_adaclip.run.versions import environment

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    counts = {o: sum(t["outcome"] == o for t in recorder.tests) for o in ("passed", "failed", "skipped")}
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "make test-gpu",
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "versions": environment(),
        "counts": counts,
        "tests": recorder.tests,
    }
    if gpu is None:
        print("There is no CUDA device here, so nothing was tested and nothing is written down.", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {counts}")
    return code


if __name__ == "__main__":
    sys.exit(main())
