"""What a run looks at in the gradients, and where its coefficients go: the global norm, norms of groups, or units and elements."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.elementwise import FineController
from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.gradients import Gradients, to_value
from hf_adaclip.gradients.elementwise import FineClip
from hf_adaclip.gradients.groups import Grouping, GroupNorms, excluded, group


class Scope:
    """Made for the parameters of a run, and anew when others join them.

    Args:
        config: The settings.
        names: Of the parameters, in their order; None where they are not known.
        count: How many they are.
        everything: Names of all parameters of the model, trainable or not.
        optimizers: Those that step on them.

    Raises:
        ConfigError: Names or an optimizer are needed and not known, or a pattern matches no parameter.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        names: Sequence[str] | None,
        count: int,
        everything: Sequence[str],
        optimizers: Sequence[Any],
    ) -> None:
        self._shadow = config.shadow
        self.grouping: Grouping | None = None
        self._norms: GroupNorms | None = None
        self._fine: FineClip | None = None
        rule = config.settings
        if rule.fine:
            assert isinstance(rule, FineController)
            self._fine, self._first_step = FineClip(rule, optimizers), rule.first_step
            self._excluded = excluded(config, names, everything)
        elif config.works_on != "global" or config.parameter_rules:
            self.grouping = group(config, count, names, everything)
            self._norms = GroupNorms(self.grouping)

    def observe(self, gradients: Gradients, norms: Tensor, norm: Value, finite: Value | None, ops: Ops) -> Value:
        """What the controller judges: the global norm, or those of groups."""
        if self._norms is None:
            return norm
        assert finite is not None
        return self._norms.spread(gradients, norms, finite, ops)

    def limit_(self, gradients: Gradients, total: Tensor, step: int, ops: Ops) -> Value | None:
        """Bound units or elements in place, where the controller does that.

        Returns:
            The global norm that is left; None when it does not, or not yet.
        """
        if self._fine is None or step < self._first_step:
            return None
        if not gradients.tensors:
            return to_value(total, ops)
        return to_value(self._fine.limit_(gradients, total, self._excluded, act=not self._shadow), ops)

    def coefficients(self, gradients: Gradients, coefficient: Value, device: torch.device, ops: Ops) -> Value:
        """A coefficient for all gradients of this step, or one for each."""
        return coefficient if self._norms is None else self._norms.gather(gradients, coefficient, device, ops)
