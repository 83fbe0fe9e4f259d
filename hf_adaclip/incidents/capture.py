"""From the rows of a run and the batches that it was fed to folders on disk, for the few steps that are incidents.

In all others nothing is copied and nothing is read: references are held, and the row of the step is looked at on the host, where it is
already (numbers of the host) or arrives by itself a little later (an accelerator, see `rows`). What fails here is said once and ends
nothing.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Reason
from hf_adaclip.incidents.batches import KEPT, BatchRing, Step
from hf_adaclip.incidents.contents import BATCH_FILE, Contents, contents_of, hashes, write_batch
from hf_adaclip.incidents.folder import FOLDER, INCIDENT_FILE, SCHEMA, Incident, make_folder, of_rank, write_facts
from hf_adaclip.incidents.rows import RowCopies, as_row
from hf_adaclip.incidents.rules import Finding, IncidentRules
from hf_adaclip.incidents.shares import shares_of
from hf_adaclip.incidents.texts import TEXT_FILE, write_texts
from hf_adaclip.ledger.schema import number, number_or_null
from hf_adaclip.run.ranks import rank, world_size
from hf_adaclip.run.ring import COLUMNS
from hf_adaclip.run.run import Run
from hf_adaclip.run.versions import environment

logger = logging.getLogger(__name__)

_MEGABYTE: Final = 1 << 20


class IncidentCapture:
    """Watches a run, once it has been begun.

    Args:
        config: The settings.
        run: Whose steps are judged.

    Attributes:
        on: Whether anything is held and judged.
        found: What has been captured, oldest first.
        judged: Called with every step that a rule speaks of and what it says, whether anything of it is kept or not.
        listeners: Called with every incident, after it has been written.
        processing_class: What decodes token ids, or None.
    """

    def __init__(self, config: AdaptiveClipConfig, run: Run) -> None:
        self._config, self._run = config, run
        self._root: Path | None = None
        self._rules: IncidentRules | None = None
        self._ring = BatchRing()
        self._copies: RowCopies | None = None
        self._by_kind: Counter[str] = Counter()
        self._bytes = 0
        self._settled = False
        self.on = False
        self.found: list[Incident] = []
        self.judged: list[Callable[[int, Finding], None]] = []
        self.listeners: list[Callable[[Incident], None]] = []
        self.processing_class: Any = None

    def begin(self, folder: str | Path | None = None, processing_class: Any = None) -> None:
        """Watch from here on, unless the settings say otherwise.

        Args:
            folder: Of the run; by default that of its ledger, else the working folder.
            processing_class: A tokenizer or processor.
        """
        if self._settled:
            return
        self._settled, self.on = True, self._config.incidents
        self._root = (self._config.folder_of_run(folder) / FOLDER).absolute()  # a run may change its working folder
        self.processing_class = processing_class

    # -- every step ----------------------------------------------------------------------------------------------

    def add(self, inputs: Any, indices: Sequence[int] | None = None) -> None:
        """Hold on to a micro-batch of the step that is coming."""
        if self.on:
            self._safely(self._add, inputs, indices)

    def _add(self, inputs: Any, indices: Sequence[int] | None) -> None:
        self._look()  # before anything is let go
        self._ring.add(inputs, indices)

    def drop(self) -> None:
        """Let go of the micro-batches of a step that will not be made."""
        self._ring.drop()

    def made(
        self,
        norms: Tensor | None = None,
        present: Sequence[int] = (),
        names: Callable[[], Sequence[str] | None] = lambda: None,
        optimizers: Sequence[Any] = (),
    ) -> None:
        """The newest step was decided on, and its row is complete.

        Args:
            norms: Of every gradient; None where an engine keeps them to itself.
            present: Places of the parameters that these belong to.
            names: Gives the names of all places.
            optimizers: Those that are known.
        """
        if self.on:
            self._safely(self._made, norms, present, names, optimizers)

    def _made(
        self,
        norms: Tensor | None,
        present: Sequence[int],
        names: Callable[[], Sequence[str] | None],
        optimizers: Sequence[Any],
    ) -> None:
        run, step = self._run, self._run.step
        assert run.recorder is not None
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self._ring.close(
            step, norms=norms, present=present, names=names, rates=rates, static_threshold=run.static_threshold
        )
        row = run.recorder.newest
        if isinstance(row, Tensor):
            if self._copies is None:
                self._copies = RowCopies(len(COLUMNS), row.device)
            self._look()
            self._copies.start(step, row)
        else:
            self._judge(step, row)

    def catch_up(self) -> None:
        """Judge all steps that are still on their way; where the host waits for the device anyway."""
        if self.on:
            self._safely(self._look, True)

    def keep(self) -> Callable[[], None]:
        """What puts the rules back to where they are now: what came after is no longer usual."""
        rules = copy.deepcopy(self._rules)

        def put_back() -> None:
            self._rules = copy.deepcopy(rules)

        return put_back

    def remove(self) -> None:
        """The run is at its end: judge what is left, and let go of all batches."""
        self.catch_up()
        self.on = False
        self._ring.clear()

    def _look(self, wait: bool = False) -> None:
        for step, row in self._copies.landed(wait=wait) if self._copies is not None else ():
            self._judge(step, row)

    def _judge(self, step: int, values: list[float]) -> None:
        if self._rules is None:
            self._rules = IncidentRules(self._config, split=bool(self._run.num_tensors))
        row = as_row(COLUMNS, values)
        reason = Reason(int(row["reason"]))
        held = self._ring.take(step)
        static = self._run.static_threshold if held is None else held.static_threshold
        finding = self._rules.feed(step, row, reason, static)
        if finding is not None:
            for listener in self.judged:
                listener(step, finding)
            self._capture(step, row, reason, finding, held, static)

    # -- an incident ---------------------------------------------------------------------------------------------

    def _capture(
        self, step: int, row: dict[str, float], reason: Reason, finding: Finding, held: Step | None, static: float
    ) -> None:
        limit = self._config.incident_limit
        # Half of the places for one kind: a run that spikes again and again is still to tell of its end.
        if len(self.found) >= limit or self._by_kind[finding.kind] >= max(limit // 2, 1):
            self._run.alerts.warn_once(
                f"{len(self.found)} incidents are kept (`incident_limit` is {limit}, half of it for one kind); of further ones the "
                "ledger tells."
            )
            return
        assert self._root is not None
        self._by_kind[finding.kind] += 1
        folder = make_folder(self._root, step, rank())
        facts = self._facts(step, row, reason, finding, held, static)
        facts["batch"] = self._keep_batch(folder, held)
        write_facts(folder / of_rank(INCIDENT_FILE, rank()), facts)
        incident = Incident(step, finding.kind, finding.sentence, folder, facts)
        self.found.append(incident)
        logger.log(
            logging.WARNING if rank() == 0 else logging.DEBUG,
            "Adaptive clipping, incident at step %d (%s): %s It is kept in %s.",
            *(step, finding.kind.replace("_", " "), finding.sentence, folder),
        )
        for listener in self.listeners:
            listener(incident)

    def _facts(
        self, step: int, row: dict[str, float], reason: Reason, finding: Finding, held: Step | None, static: float
    ) -> dict[str, Any]:
        coefficient = row["coefficient"]
        # Of a step that is not finite nothing is let through, whatever its coefficient.
        left = row["norm"] * coefficient if abs(row["norm"]) < float("inf") else 0.0
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "step": step,
            "kind": finding.kind,
            "reason": finding.sentence,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "loss": number_or_null(row["loss"]),
            "norm": number(row["norm"]),
            "norm_left": number(left),
            "usual_norm": number_or_null(finding.usual),
            "threshold": number(row["threshold"]),
            "coefficient": number(coefficient),
            "static_threshold": number(static),
            "pace": number(row["pace"]),
            "loss_scale": number_or_null(row["loss_scale"]),
            "decision": reason.name,
            "decision_in_words": reason.sentence,
            "controller": self._config.controller,
            "shadow": self._config.shadow,
            "rank": rank(),
            "world_size": world_size(),
            "versions": environment(),
        }
        if held is not None:
            facts["learning_rates"] = [float(rate) for rate in held.rates]
            if held.norms is not None and len(held.norms):
                facts |= self._tried("the shares of modules", _shares, held) or {}
        return facts

    def _keep_batch(self, folder: Path, held: Step | None) -> dict[str, Any]:
        """What `incident.json` says of the batch, which is written where that is possible and allowed."""
        if held is None:
            return {
                "file": None,
                "why": f"The step was known more than {KEPT} steps later; its inputs had been let go.",
            }
        if not held.inputs:
            return {"file": None, "why": "Nobody showed it: see `AdaptiveClipper.watch`."}
        contents = contents_of(held.inputs)
        facts: dict[str, Any] = {
            "file": None,
            "micro_batches": len(held.inputs),
            "bytes": contents.size,
            "hashes": self._tried("hashes", hashes, contents),
        }
        indices = [
            _of_these(*pair) for pair in zip(held.indices, facts["hashes"] or [{}] * len(held.inputs), strict=True)
        ]
        if any(places is not None for places in indices):
            facts["indices"] = indices
        if self._config.incident_batch == "hash":
            return {**facts, "why": "`incident_batch` is 'hash'."}
        if (why := self._too_large(contents)) is not None:
            return {**facts, "why": why}
        path = folder / of_rank(BATCH_FILE, rank())
        try:
            write_batch(path, contents)
        except Exception as error:  # the rest of the incident is worth keeping
            self._excuse(error)
            return {**facts, "why": f"It could not be written ({type(error).__name__}: {error})."}
        self._bytes += contents.size
        text = of_rank(TEXT_FILE, rank())
        facts["text"] = self._tried("the text", write_texts, folder / text, held.inputs, self.processing_class)
        return {**facts, "file": path.name}

    def _too_large(self, contents: Contents) -> str | None:
        one, run = self._config.incident_megabytes, self._config.incident_run_megabytes
        size = contents.size / _MEGABYTE
        if size > one:
            return f"It has {size:.3g} MB, and `incident_megabytes` is {one:g}."
        if self._bytes / _MEGABYTE + size > run:
            return f"It has {size:.3g} MB, and the run would have more than `incident_run_megabytes` ({run:g})."
        return None

    def _tried(self, what: str, make: Callable[..., Any], *args: Any) -> Any:
        try:
            return make(*args)
        except Exception as error:
            self._excuse(error, what)
            return None

    # -- what ends nothing ---------------------------------------------------------------------------------------

    def _safely(self, act: Callable[..., None], *args: Any) -> None:
        try:
            with torch.no_grad():
                act(*args)
        except Exception as error:
            self._excuse(error)

    def _excuse(self, error: Exception, what: str = "an incident") -> None:
        logger.debug("Adaptive clipping: while recording %s", what, exc_info=error)
        self._run.alerts.warn_once(
            f"{what} could not be recorded as a whole ({type(error).__name__}: {error}). Training goes on."
        )


def _shares(held: Step) -> dict[str, Any]:
    names = held.names()
    assert held.norms is not None
    return shares_of(held.norms, None if names is None else [names[place] for place in held.present])


def _of_these(places: Any, hashed: dict[str, Any]) -> list[int] | None:
    """The positions of samples, unless they are of more or fewer: a batch that was drawn for several steps, as for policies."""
    if places is None or len(places) != len(hashed.get("samples", places)):
        return None
    return [int(place) for place in places]
