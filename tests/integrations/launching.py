"""Starting a worker module on several gloo processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hf_adaclip.compare import fork_server

ROOT = Path(__file__).parent.parent.parent


def leave():
    """What a worker does last: a library's threads that are still there make the interpreter abort on its way out, now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(module, arguments, folder, processes=2, *, warm=fork_server.AVAILABLE, **environment):
    """Run `python -m module *arguments folder` on several ranks; returns what each rank left in `folder/rank{r}.json`.

    Args:
        warm: Fork the ranks off a server that has imported the libraries, which takes longer than they train. Otherwise torchrun starts
            them, for workers that a library must find in its environment as it is imported.
    """
    folder.mkdir(exist_ok=True)
    command = ["-m", module, *arguments, str(folder)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    if warm:
        _fork(command, folder, processes, variables)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*torchrun, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]


def _fork(command, folder, processes, variables):
    # The ranks meet at a store of this process, whose port the system chooses: two tests at a time cannot get in each other's way.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    variables |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    variables |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    ranks = [
        fork_server.start(command, log, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + 500
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > end:
            break
        ranks[0].join(0.05)
    for rank in ranks:  # those that wait for one that has failed
        rank.kill()
        rank.join()
    said = "\n".join(log.read_text()[-3000:] for log in logs if log.is_file())
    assert [rank.exitcode for rank in ranks] == [0] * processes, said
