"""What is kept for single parameters of a run, and goes with them when the set of trainable ones changes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import StateError
from hf_adaclip.gradients import Gradients, Guards
from hf_adaclip.gradients.distance import ReachEstimate
from hf_adaclip.gradients.fused import why_not_folded
from hf_adaclip.gradients.groups import idle_rules, named_parameters
from hf_adaclip.gradients.roster import Change, Roster
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.granularity import Scope
from hf_adaclip.run.run import Run

logger = logging.getLogger(__name__)


class PerParameter:
    """Made before the first step, filled in it, and moved along afterwards.

    Args:
        config: The settings.
        run: What decides.
        guards: The optimizers.
        models: Gives the models in which names are looked up.
        alerts: Where warnings go.

    Attributes:
        reach: The distance estimate that the pace goes by; None when it is off.
        joined: Parameters that the present step is the first one of, once there was a step; mostly none.
        why_not_folded: The reason to scale gradients in a pass of their own; None where the step does it.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        run: Run,
        guards: Guards,
        models: Callable[[], Sequence[Any]],
        alerts: Alerts,
    ) -> None:
        self._config, self._run, self._guards, self._models, self._alerts = config, run, guards, models, alerts
        self._roster: Roster | None = None
        self._scope: Scope | None = None
        self.reach: ReachEstimate | None = None
        self.joined: list[Tensor] = []
        self.why_not_folded: str | None = "that is decided in the first step"

    @property
    def scope(self) -> Scope:
        """What is looked at, of the parameters of now."""
        assert self._scope is not None
        return self._scope

    @property
    def begun(self) -> bool:
        """Whether a step has been taken, of this run or since a load."""
        return self._scope is not None

    def forget(self) -> None:
        """Make everything anew at the next step, from the state that was loaded."""
        self._roster = self._scope = self.reach = None

    def keep(self, tensors: dict[str, Tensor] | None = None) -> Callable[[], None]:
        """What puts the distance estimate back; made anew where there was none yet, of the weights that are there then.

        Args:
            tensors: Those of another moment than now.
        """
        if tensors is None:
            found = self._run.beside if self.reach is None else self.reach.tensors()
            tensors = {name: value.clone() for name, value in found.items() if name in ReachEstimate.NAMES}

        def put_back() -> None:
            if self.reach is not None:
                self.reach = self.reach.anew()
                if "start" in tensors:
                    self.reach.restore(tensors, self._run.ops)

        return put_back

    def place(self, gradients: Gradients, norms: Tensor) -> tuple[Gradients, Tensor]:
        """The gradients of a step and their norms, each in the place of its parameter; what is kept for a parameter has followed it.

        Args:
            gradients: As they were collected.
            norms: Of each of them.

        Raises:
            ConfigError: Names are needed and not known.
            StateError: A state was loaded that is one of other parameters.
            UnsupportedSetupError: Two sets of parameters take turns within one step.
        """
        if self._roster is None:
            config = self._config
            required = config.works_on != "global" or bool(config.parameter_rules) or config.max_pace > 1
            self._roster = Roster(self._models(), self._run.loaded_parameters or (), required=required)
        gradients, order, change = self._roster.place(gradients)
        norms = norms if order is None else norms[order]
        self.joined = []
        if self._scope is None:
            self._begin(gradients, norms.device, change)
        elif change is not None:
            self._follow(gradients, change)
        else:
            return gradients, norms
        self._see_whether_to_fold(gradients)
        return gradients, norms

    def look_again(self, gradients: Gradients) -> None:
        """The optimizers are others, or somebody has hooked into them."""
        self._look_around(gradients)
        if self.reach is not None:
            self.reach.optimizers = self._guards.optimizers
        self._see_whether_to_fold(gradients)

    def _see_whether_to_fold(self, gradients: Gradients) -> None:
        trained = [p for p in gradients.parameters if p.requires_grad]
        self.why_not_folded = why_not_folded(self._config, self._guards, trained, self._run.ops)

    def clipped(self, gradients: Gradients) -> None:
        """The gradients are as clipping leaves them."""
        if self._roster is not None:
            self._roster.remember(gradients)

    def _begin(self, gradients: Gradients, device: torch.device, change: Change | None) -> None:
        scope = self._look_around(gradients)
        ops = self._run.begin(device, scope.grouping, self.names, _restarted(scope, change))
        if self._config.max_pace > 1:
            joined = 0 if change is None else len(change.joined)
            known = gradients.parameters[: len(gradients.parameters) - joined]
            self.reach = ReachEstimate(known, self._guards.optimizers, device)
            if not ReachEstimate.NAMES.isdisjoint(self._run.beside or ()):
                try:
                    self.reach.restore(self._run.beside, ops)
                except (ValueError, LookupError) as error:
                    raise StateError(
                        f"The state that was loaded does not fit: {error}. Resume with the same model."
                    ) from error
            if joined and change is not None:
                self.reach = self.reach.moved(gradients.parameters, change.kept)
        self._run.beside = {}

    def _follow(self, gradients: Gradients, change: Change) -> None:
        self.joined = [gradients.parameters[i] for i in change.joined]
        scope, names = self._look_around(gradients), self.names
        self._run.regroup(scope.grouping, names, _restarted(scope, change))
        if self.reach is not None:
            self.reach.optimizers = self._guards.optimizers
            self.reach = self.reach.moved(gradients.parameters, change.kept)
        joined, trainable = len(change.joined), len(gradients.parameters) - change.resting
        assert self._run.recorder is not None
        self._run.recorder.note(parameters={"trainable": trainable, "joined": joined, "resting": change.resting})
        who = [] if names is None else [names[i] for i in change.joined[:3]]
        logger.info(
            "Adaptive clipping, step %d: %d parameters are trainable now, %d of them new%s, and %d at rest.",
            *(self._run.step, trainable, joined, f" ({', '.join(who)})" if who else "", change.resting),
        )
        if self._roster is not None and self._roster.restless:
            self._alerts.warn_once(
                "`clip_` was given other parameters in each of the last 20 calls, and mixes their norms into one range. Where two models "
                "take turns, make one clipper for each."
            )

    def _look_around(self, gradients: Gradients) -> Scope:
        config, optimizers = self._config, self._guards.optimizers
        everything = list(named_parameters(self._models())) if config.parameter_rules else []
        rules = config.parameter_rules if isinstance(config.parameter_rules, dict) else {}
        for sentence in idle_rules(rules, self.names or [], everything):
            self._alerts.warn_once(sentence)
        self._scope = Scope(config, self.names, len(gradients.parameters), everything, optimizers)
        return self._scope

    @property
    def names(self) -> list[str] | None:
        """Of the parameters, each in its place; None where they are not known."""
        return None if self._roster is None else self._roster.names


def _restarted(scope: Scope, change: Change | None) -> list[str]:
    """Groups that begin anew because parameters have joined them; "all" where only the global norm counts."""
    if change is None or not change.joined:
        return []
    if scope.grouping is None:
        return ["all"]
    return sorted({scope.grouping.names[scope.grouping.member_of[place]] for place in change.joined})
