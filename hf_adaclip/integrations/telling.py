"""Who hears of what goes wrong in a Trainer: its callbacks, and the alerts of W&B and trackio where these are its reporters.

The log has it too (`run.alerts`), and the disk (`incidents/`, the ledger). Nothing here ends a training.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

from hf_adaclip.incidents.batches import KEPT
from hf_adaclip.incidents.folder import INCIDENT_FILE, Incident, of_rank, write_facts
from hf_adaclip.integrations.generations import Generations
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.ranks import rank

EVERY: Final = 100
"""Steps in which a reporter gets at most one alert of a kind."""
_GRAVE: Final = frozenset({"nonfinite", "budget", "divergence", "statistics", "trouble", "fallback"})
_EVENTS: Final = frozenset({"trouble", "fallback", "skipped", "spike"})
"""Kinds of events that are worth an alert where nothing is kept of incidents."""
_LOST: Final = frozenset({"fallback"})
"""Those that no incident tells of."""


class Reporters:
    """Alerts of W&B and trackio.

    Args:
        names: Of the reporters that are in use, asked for at each alert.
        warn: Called with what went wrong, in place of ending the training.
    """

    def __init__(self, names: Callable[[], set[str]], warn: Callable[[str], None]) -> None:
        self._names, self._warn = names, warn
        self._last: dict[str, int] = {}
        self._untold: Counter[str] = Counter()

    def alert(self, step: int, kind: str, text: str) -> None:
        """At most one of a kind in `EVERY` steps, with the number of those in between.

        Args:
            step: Optimizer step.
            kind: What happened.
            text: In words.
        """
        names = self._names() & set(_SEND)
        if not names:
            return
        last = self._last.get(kind)
        if last is not None and abs(step - last) < EVERY:  # a run that went back counts anew
            self._untold[kind] += 1
            return
        self._last[kind] = step
        since = self._untold.pop(kind, 0)
        more = f" {since} more of this kind came since the last alert." if since else ""
        for name in sorted(names):
            try:
                _SEND[name](
                    f"Adaptive clipping: {kind.replace('_', ' ')}", f"Step {step}: {text}{more}", kind in _GRAVE
                )
            except Exception as error:  # a service of somebody else, over a network
                self._warn(f"{name} got no alert ({type(error).__name__}: {error}). Training goes on.")


def _to_wandb(title: str, text: str, grave: bool) -> None:
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.alert(title=title, text=text, level="ERROR" if grave else "WARN")


def _to_trackio(title: str, text: str, grave: bool) -> None:
    trackio: Any = sys.modules.get("trackio")
    alert = getattr(trackio, "alert", None)  # 0.16 and later
    if alert is not None:
        alert(title=title, text=text, level=trackio.AlertLevel.ERROR if grave else trackio.AlertLevel.WARN)


_SEND: Final[dict[str, Callable[[str, str, bool], None]]] = {"wandb": _to_wandb, "trackio": _to_trackio}


class Telling:
    """Passes on what a Trainer's clipper tells.

    Args:
        trainer: Whose callbacks, and whose reporters.
        clipper: Is listened to.
    """

    def __init__(self, trainer: Any, clipper: Any) -> None:
        self._trainer, self._keeps_incidents = trainer, clipper.config.incidents
        self._reporters = Reporters(self._reporting, clipper.alerts.warn_once)
        private = clipper.config.incident_batch == "hash"
        self._generations = Generations(trainer, private=private, excuse=clipper.alerts.warn_once)
        self._warn = clipper.alerts.warn_once
        self._ahead: deque[tuple[int, int]] = deque(maxlen=KEPT + 1)
        clipper.on_event(self._event)
        clipper.on_incident(self._incident)

    def _event(self, event: ClipEvent) -> None:
        self._call("on_clip_event", event=event)
        alarming = event.kind in (_LOST if self._keeps_incidents else _EVENTS)
        if alarming:
            self._alert(event.step, event.kind, f"{event.change}. {event.sentences}")

    def note(self, step: int) -> None:
        """A micro-batch of this step is shown: hold what an incident would have to tell of it."""
        self._generations.note(step)
        if not self._ahead or self._ahead[-1][0] != step:
            self._ahead.append((step, int(self._trainer.state.global_step) - step))

    def _incident(self, incident: Incident) -> None:
        self._generations.write(incident)
        self._number(incident)
        self._call("on_clip_incident", incident=incident)
        text = f"{incident.reason} `hf-adaclip incident {incident.folder.parent.parent} {incident.step}` shows it."
        self._alert(incident.step, incident.kind, text)

    def _number(self, incident: Incident) -> None:
        """Add the Trainer's own number of the step, where that is another: checkpoints go by it."""
        ahead = next((ahead for step, ahead in self._ahead if step == incident.step), 0)
        if not ahead:
            return
        incident.facts["trainer_step"] = incident.step + ahead
        try:
            write_facts(incident.folder / of_rank(INCIDENT_FILE, rank()), incident.facts)
        except OSError as error:
            self._warn(f"an incident has no number of the Trainer's ({error}). Training goes on.")

    def _alert(self, step: int, kind: str, text: str) -> None:
        if self._trainer.is_world_process_zero():
            self._reporters.alert(step, kind, text)

    def _reporting(self) -> set[str]:
        """By the arguments, or by a callback that somebody has added."""
        callbacks = {type(callback).__name__ for callback in self._trainer.callback_handler.callbacks}
        added = {name for name in _SEND if f"{name.capitalize()}Callback" in callbacks}
        return {*(self._trainer.args.report_to or ()), *added}

    def _call(self, name: str, **told: Any) -> None:
        trainer = self._trainer
        for callback in trainer.callback_handler.callbacks:
            hook = getattr(callback, name, None)
            if hook is not None:
                hook(trainer.args, trainer.state, trainer.control, **told)
