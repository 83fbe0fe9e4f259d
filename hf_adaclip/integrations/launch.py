"""`hf-adaclip run -- COMMAND`, and what the variable `HF_ADACLIP` does in the processes that inherit it.

`hf_adaclip_autoload` waits for `transformers.Trainer` in every process that imports torch; here is what happens then. A Trainer is attached
as its `train` begins, when whoever built it is done with it. Nothing is edited and nothing written but what a run of ours writes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.errors import ConfigError, HfAdaclipError, UnsupportedSetupError
from hf_adaclip.flat import clip_names

VARIABLE: Final = "HF_ADACLIP"
NOTES: Final = "HF_ADACLIP_NOTES"
"""Of a launcher to its processes: the file in which they write a line for every Trainer."""
_FORWARDED: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def attach_by_environment(trainer: Any) -> None:
    """Give a Trainer whose `train` begins the clipping that `HF_ADACLIP` names, and say so on stderr.

    Args:
        trainer: A `transformers.Trainer`. One that clips adaptively already is left as it is.

    Raises:
        ConfigError: The variable is wrong, or so is `max_grad_norm`.
        UnsupportedSetupError: The setup is not supported.
    """
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin

    kind = type(trainer).__name__
    if isinstance(trainer, AdaptiveClipMixin):
        if not getattr(trainer, "_attached_by_tool", False):
            say(trainer, f"{kind} clips adaptively by itself ({trainer.clip_config.controller}): left as it is")
        return
    try:
        attach_and_say(trainer, os.environ[VARIABLE])
    except HfAdaclipError as error:
        say(trainer, f"{kind} is refused: {error}")
        raise


def attach_and_say(trainer: Any, clip: ClipArgument) -> None:
    """Attach for somebody who has written no Trainer call, and so has to be told.

    Raises:
        ConfigError: `max_grad_norm` is none that lets clipping act.
        UnsupportedSetupError: The setup is not supported.
    """
    from hf_adaclip.integrations.attaching import attach

    kind = type(trainer).__name__
    attach(trainer, clip=clip)
    trainer._attached_by_tool = True
    config = trainer.clip_config
    say(trainer, f"attached to {kind}: controller {config.controller}, ledger {config.ledger}")


def say(trainer: Any, text: str) -> None:
    """A line on stderr, from the main process only, and a note to the launcher where there is one."""
    if not trainer.is_world_process_zero():
        return
    print(f"hf-adaclip: {text}", file=sys.stderr, flush=True)
    if os.environ.get(NOTES):
        # Gone when this process outlives the launcher, which then asks no more.
        with contextlib.suppress(OSError), open(os.environ[NOTES], "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def run_command(command: Sequence[str], clip: str = "adaptive") -> int:
    """Run a command in which every `transformers.Trainer` clips adaptively, its children's too. Signals are forwarded.

    Args:
        command: Program and arguments.
        clip: As in `HF_ADACLIP`: a controller or preset, `NAME:FIELD=VALUE,...`, or the path of a config's JSON.

    Returns:
        The command's exit status, 128 + N where signal N ended it; 1 where it ended well and no Trainer was attached.

    Raises:
        ConfigError: `clip` is wrong, or there is no such program.
        UnsupportedSetupError: Processes would not find the package.
    """
    clip = portable(clip)
    _check_found()
    with tempfile.TemporaryDirectory(prefix="hf_adaclip-") as folder:
        notes = Path(folder) / "notes"
        environment = {**os.environ, VARIABLE: clip, NOTES: str(notes)}
        status = _wait_for(command, environment)
        attached = notes.is_file()
    if attached:
        return status
    print(
        f"hf-adaclip: 0 Trainers were attached, and the command's status is {status}. It has to call `transformers.Trainer.train` in a "
        "Python environment where hf_adaclip is installed.",
        file=sys.stderr,
    )
    return status or 1


def portable(clip: str) -> str:
    """The same text for a process that starts in another folder: the path of a file becomes absolute.

    Raises:
        ConfigError: It is nothing that `clip=` takes, or a setting is wrong.
    """
    AdaptiveClipConfig.resolve(clip)
    return clip if clip.partition(":")[0] in clip_names() else str(Path(clip).resolve())


def _check_found() -> None:
    if not any(e.value.startswith("hf_adaclip_autoload:") for e in entry_points(group="torch.backends")):
        raise UnsupportedSetupError(
            "hf_adaclip must be installed for `run`, but its entry point is not found. Install it by pip in the command's environment."
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        raise UnsupportedSetupError(
            "`TORCH_DEVICE_BACKEND_AUTOLOAD` must not be 0 for `run`, but it is: torch then calls no entry point. Unset it."
        )


def _wait_for(command: Sequence[str], environment: dict[str, str]) -> int:
    with _forwarding() as processes:
        try:
            process = subprocess.Popen(command, env=environment)
        except OSError as error:
            raise ConfigError(
                f"`COMMAND` must be a program that can be run, but {command[0]!r} cannot: {error.strerror}."
            ) from error
        processes.append(process)
        status = process.wait()
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _forwarding() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Pass signals on to the process that is put into the list, instead of dying of them."""
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        from_terminal = number in (signal.SIGINT, getattr(signal, "SIGQUIT", None)) and _in_foreground()
        if not from_terminal:  # a terminal signals all processes of its foreground group, the command's among them
            for process in processes:
                process.send_signal(number)

    numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):  # no terminal, or a system without
        return False
