"""What is done beside the length of a step: the spectral range on the gradients, and the agreement on the step, each where it is on."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients import Gradients, Guards
from hf_adaclip.gradients.matrices import HiddenMatrices
from hf_adaclip.gradients.spectral import SpectralRange
from hf_adaclip.gradients.transfer import moved
from hf_adaclip.run.loaded_weights import LoadedWeights
from hf_adaclip.run.run import Run
from hf_adaclip.run.shape_gate import ShapeGate, how_fast

logger = logging.getLogger(__name__)

_GATE: Final = "shape_gate"
_SHARES: Final = "running_shares"
_PARTS: Final = {"spectral": "spectral range", "agreement": "agreement"}
_NAMES: Final = {
    "spectral": "the spectral range is",
    "agreement": "the agreement is",
    "memory": "the average of the spectral range over steps is",
}


class Shaping:
    """Called once per step, between clipping and the optimizer.

    Args:
        config: The settings.
        run: Whose records it fills in.
        guards: The optimizers.
        models: Gives the models that tell matrices from embeddings.
        gate: Decides on parts that are on by themselves; None where people have set them.

    Raises:
        UnsupportedSetupError: The step of an optimizer cannot be taken back in part.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        run: Run,
        guards: Guards,
        models: Callable[[], Sequence[Any]],
        gate: ShapeGate | None,
    ) -> None:
        self._config, self._run, self._guards, self._models = config, run, guards, models
        self.gate = gate
        if gate is not None:
            gate.listen(models())
        self._matrices = HiddenMatrices(models)
        width = config.spectral
        self._range = None if width is None else SpectralRange(width, self._matrices, config.spectral_memory)
        self._loaded = LoadedWeights(run, guards, models)
        self._taken: Value | None = None
        self._works: bool | None = None  # whether there is a matrix for the range
        if config.agreement is True and gate is None:  # what cannot be done is refused at once
            self._agree()
        self._agreeing: Tensor | None = None  # of the present step, over the optimizers that have made theirs

    @property
    def ranges(self) -> bool:
        """Whether the spectral range makes other gradients of those of a step; as far as is known before the first one."""
        if self._range is None or self._config.shadow or self._range.width == math.inf:
            return False
        if self.gate is not None and not self.gate.spectral:
            return False
        if self._works is None:
            self._works = bool(self._trained_matrices())
        return self._works

    def act_(self, gradients: Gradients, *, taken: Value, factor: Value | None = None) -> None:
        """On clipped gradients, before the step that is made with them.

        Args:
            gradients: Of the step.
            taken: Bool, whether the step is taken; a step that is left out is not worth the work, where the host knows.
            factor: What the step will multiply the gradients by (see `fold`); None where they are scaled already.

        Raises:
            ConfigError: There is no model to look at, or no optimizer.
            UnsupportedSetupError: The gradients, or the optimizer, cannot be worked on.
        """
        self._taken = taken
        self._decide(gradients)
        gate = self.gate
        if self._config.agreement is True and (gate is None or gate.agreement):
            self._agreeing = None
            if not self._guards:
                raise ConfigError(
                    "`optimizer` must be given with `agreement` where the accelerator has not prepared just one, but is None instead."
                )
            self._agree()
        if self._range is None or self._run.step % self._config.spectral_every:
            return
        if not self._matrices.named:
            raise ConfigError(
                "`model` must be given with `spectral_width`, but is None instead: embeddings are known by the modules "
                "that own them. Pass `AdaptiveClipper(..., model=model)`."
            )
        ops = self._run.ops
        if gate is not None and not gate.spectral:
            return
        if not gradients.tensors or (ops.on_host and not taken):
            self._range.begin_step()
            return
        made = taken if isinstance(taken, Tensor) and not ops.on_host else None
        effect = self._range.act_(gradients, change=not self._config.shadow, taken=made)
        if effect is None:
            if not self._matrices.found and gate is None:  # set by hand, it should act on something
                self._run.alerts.warn_once(
                    "`spectral_width` acts on nothing: no trainable parameter is a hidden matrix. Only embeddings, heads, vectors or "
                    "parameters of another model than `model` have a gradient."
                )
            return
        altered, norm = effect
        if factor is not None:
            norm = norm * moved(factor, norm.device) if isinstance(factor, Tensor) else norm * float(factor)
        width = torch.full_like(altered, self._range.width)
        self._record(spectral_width=width, altered_energy=altered, matrix_norm=norm)

    def look(self, joined: Sequence[Tensor]) -> None:
        """Before a step is decided on: whether parts act from now on that waited for weights to move fast, or begin to wait.

        Args:
            joined: Parameters that were not among those of any step before.
        """
        if joined:
            self._works = None
        gate = self.gate
        if gate is None:
            return
        joined = [*joined, *self._guards.joined()]
        if not gate.decided:
            return
        if joined and gate.empty and self._trained_matrices():
            gate.again()
            return
        if joined and self._loaded.among(joined):
            gate.wait(matrices=self._range is None or bool(self._trained_matrices()))
            self._heed(gate)
            self._loaded.forget()
        if not gate.waiting:
            return
        share = self._loaded.step()
        if share is None or not (parts := gate.moved(share)):
            return
        assert self._run.recorder is not None
        self._run.recorder.note(moved=share)
        acting = " and ".join(_PARTS[part] for part in _PARTS if part in parts)
        self._run.alerts.say(
            f"step {self._run.step}: the loaded weights have moved by {how_fast(share)}, so they count as trained anew. From here on: "
            f'{acting} (`clip="guard"` only clips).'
        )
        if not gate.waiting:
            self._loaded.forget()
        self._heed(gate)

    def _decide(self, gradients: Gradients) -> None:
        """Whether parts that are on by themselves act, in the first step that has gradients."""
        gate = self.gate
        if gate is None or gate.decided or not gradients.tensors:
            return
        self._check_models()
        matrices = self._trained_matrices() if self._range is not None else []
        ranks = self._run.ranks
        gate.decide(
            [(m.shape[0], m.shape[1:].numel()) for m in matrices],
            gradients.tensors[0].device,
            None if ranks is None else ranks.group,
            trained=self._loaded.among(self._guards.parameters),
            ranks_known=ranks is not None,
        )
        for part, why in gate.why.items():
            logger.info("Adaptive clipping: %s off: %s.", _NAMES[part], why)
        if gate.waiting:
            self._loaded.watch()
        self._heed(gate)

    def _check_models(self) -> None:
        """Whether the models are those that are trained: nothing is found of another one, and nothing would say so."""
        stepped, models = self._guards.parameters, self._models()
        owned = {id(p) for model in models for p in model.parameters()}
        if stepped and owned and owned.isdisjoint(map(id, stepped)):
            self._run.alerts.warn_once(
                f"`model` must own what the optimizer steps on, but none of its {len(stepped)} tensors belongs to "
                f"{' or '.join(type(model).__name__ for model in models)}. What goes by the model is off: make the clipper with the model "
                "that is trained."
            )

    def _trained_matrices(self) -> list[Tensor]:
        """Those among what the optimizers have, whether the present step has a gradient for them or not."""
        parameters = [p for p in self._guards.parameters if p.requires_grad]
        return [p for p, name in zip(parameters, self._matrices.among(parameters), strict=True) if name is not None]

    def _agree(self) -> None:
        matrices = self._matrices.among if self._matrices.named else None
        self._guards.agree(self._count, change=not self._config.shadow, matrices=matrices)

    def _heed(self, gate: ShapeGate) -> None:
        if not gate.agreement:
            self._guards.disagree()
        if self._range is not None:
            self._range.remember(self._config.spectral_memory if gate.memory else 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this; nothing as long as nothing is known."""
        average = None if self._range is None else self._range.preconditioner
        kept = {} if average is None else average.tensors()
        if self.gate is not None and self.gate.decided:
            kept[_GATE] = self.gate.tensor()
            kept |= self._loaded.tensors()
        if (shares := self._guards.running_shares) is not None:
            kept[_SHARES] = shares
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._guards.running_shares = tensors.get(_SHARES)
        if self.gate is not None:
            self.gate.restore(tensors.get(_GATE))
            self._loaded.restore(tensors if self.gate.waiting else {})
            self._heed(self.gate)
        if self._range is not None and self._range.preconditioner is not None:
            self._range.preconditioner.restore(tensors)

    def keep(self, tensors: Mapping[str, Tensor] | None = None) -> Callable[[], None]:
        """What puts it back as it is now, or as `tensors` of another moment have it."""
        found = self.tensors() if tensors is None else tensors
        return lambda: self.restore(found)

    def sees(self, batch: Any) -> None:
        """A micro-batch of the coming step."""
        if self.gate is not None and not self.gate.decided:
            self.gate.sees(batch, self._models())

    def _count(self, counts: Tensor) -> None:
        """An optimizer has stepped: how many components agree, of how many."""
        self._agreeing = counts if self._agreeing is None else self._agreeing + moved(counts, self._agreeing.device)
        agree, there = self._agreeing.unbind()
        self._record(agreeing_share=agree / there)

    def _record(self, **values: Tensor) -> None:
        """Of a step that is left out nothing is recorded; where only the device knows, its NaN says so."""
        if isinstance(self._taken, Tensor):
            taken = moved(self._taken, next(iter(values.values())).device)
            values = {name: torch.where(taken, value, math.nan) for name, value in values.items()}
        assert self._run.recorder is not None
        self._run.recorder.fill(**values)
