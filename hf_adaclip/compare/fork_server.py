"""Runs of a script in processes that find torch and transformers loaded already: importing them takes longer than a short run trains.

Each run is still a process of its own. It is forked off a server that has imported the libraries and has done nothing else with them.
"""

import multiprocessing
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

LIBRARIES: Final = (
    *(
        "hf_adaclip.integrations.script_args",
        "datasets",
        "evaluate",
        "peft",
        "safetensors.torch",
        "sklearn.model_selection",
    ),
)
"""What the server imports, as far as it is installed; the Trainer's own dependencies come along."""

AVAILABLE: Final = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
"""Whether a process can be forked off a server safely here: macOS has libraries that break in a fork."""


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
    """Start `script flags` with its output appended to `log`. It ends when this process does, however that ends.

    Args:
        command: The script's path, or `-m` and a module, and its flags.
        log: File for stdout and stderr.
        environment: All environment variables of the process.

    Returns:
        A `multiprocessing.Process`, started: `join()`, then `exitcode`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    process = context.Process(target=_run, args=(list(command), str(log), dict(environment)))
    process.start()
    return process


def _run(command: list[str], log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    # The server has read OMP_NUM_THREADS of the process that started it.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    module = command[0] == "-m"
    sys.argv = command[module:]
    sys.path.insert(0, os.getcwd() if module else str(Path(command[0]).parent))
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_the_parent() -> None:
    """A comparison that was killed leaves no run behind that would write into the folder of the same run, started again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
