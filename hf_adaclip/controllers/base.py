"""What every controller is made of: observation in, decision out, state carried along.

A controller is a frozen dataclass of numbers with two pure functions, `init` and `update`. State and decision are NamedTuples
of float32 values where the gradient lives: tensors on an accelerator, numpy numbers in host memory (see `ops`). Their shape is `[]`
for the global norm and `[num_tensors]` per tensor, and the same elementwise maths serves both. Nothing here reads a tensor from
the host, draws a random number or looks at a clock, so a run can be replayed from its norms alone.
"""

import dataclasses
import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from hf_adaclip.controllers.numerics.ops import Ops, Shape, Value
from hf_adaclip.controllers.settings import conflicts_left, keys_of, problems_of, settings_of
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near

State = TypeVar("State", bound=tuple[Value, ...])

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does, so that `static` gives its bits."""


class Reason(enum.IntEnum):
    """Why a step was treated as it was. Ordered by severity: over several tensors the largest one is reported."""

    WITHIN = 0
    WIDENED = 1
    FROZEN = 2
    WARMUP = 3
    VANISHING = 4
    NEW_LEVEL = 5
    LIMIT_FLOOR = 6
    LIMIT_CEILING = 7
    LIMIT_WIDENING = 8
    HELD = 9
    BOUNDED = 10
    CLIPPED = 11
    SPIKE = 12
    FALLBACK = 13
    SCALER_SKIPPED = 14
    NONFINITE = 15
    TROUBLE_STATISTICS = 16
    TROUBLE_DIVERGENCE = 17
    TROUBLE_BUDGET = 18
    SKIPPED = 19  # out of order: only a step as a whole is skipped
    LEFT_OUT = 20  # likewise, and no controller says it

    @property
    def sentence(self) -> str:
        """Why the step was treated as it was, in a full sentence for people; true of every step with this reason."""
        return _SENTENCES[self]

    @property
    def phase(self) -> str:
        """One word for dashboards, out of `PHASES`."""
        return _PHASES[self]

    @property
    def phase_id(self) -> int:
        """The phase as a number, for dashboards that take no words: its position in `PHASES`."""
        return PHASES.index(_PHASES[self])


# Each says why, and claims nothing that the reason alone does not settle: what became of the gradient is in the row (see `events`).
_SENTENCES = {
    Reason.WITHIN: "The norm is inside the range.",
    Reason.WIDENED: "The norm is inside the range, which is a little wider than in the last step that was left as it was.",
    Reason.FROZEN: "The controller is frozen: it has stopped adapting, and the norm is inside the range that it kept.",
    Reason.WARMUP: "The controller is still learning what is normal; the static threshold rules.",
    Reason.VANISHING: "The norm is zero or fell below the range; the step is flagged as vanishing.",
    Reason.NEW_LEVEL: "Several norms in a row, far from the level, agreed on another one; it is the level now.",
    Reason.LIMIT_FLOOR: "A threshold below `min_threshold` was asked for; the floor holds.",
    Reason.LIMIT_CEILING: "A threshold above `max_threshold` was asked for; the ceiling holds.",
    Reason.LIMIT_WIDENING: "A threshold was asked for that `max_widening_step` or `max_widening_100` does not allow yet; the limit holds.",
    Reason.HELD: "The norm is above the static threshold, which is what holds here.",
    Reason.BOUNDED: "The norm is above the bound that the given level, the loss and the static threshold set.",
    Reason.CLIPPED: "The norm is at or above the threshold.",
    Reason.SPIKE: "The norm left the range upward.",
    Reason.FALLBACK: "The controller was put aside after trouble; the static threshold rules, within the limits that are set.",
    Reason.SCALER_SKIPPED: "The loss scaler found an overflow and skips the step; nothing was learned from it.",
    Reason.NONFINITE: "The norm is NaN or infinite; nothing was learned from it.",
    Reason.TROUBLE_STATISTICS: "Trouble: the controller's threshold is not a positive number.",
    Reason.TROUBLE_DIVERGENCE: "Trouble: the training loss has stayed far above its best for `divergence_steps` steps.",
    Reason.TROUBLE_BUDGET: "Trouble: more steps had no finite norm than `max_skipped` allows.",
    Reason.SKIPPED: "The norm is at or above the threshold, and such a step is left out.",
    Reason.LEFT_OUT: "The step was left out with its data, as `skip_batches.json` says; it has no gradient.",
}

_PHASES = {
    Reason.WITHIN: "stable",
    Reason.WIDENED: "stable",
    Reason.FROZEN: "frozen",
    Reason.WARMUP: "warmup",
    Reason.VANISHING: "vanishing",
    Reason.NEW_LEVEL: "stable",
    Reason.LIMIT_FLOOR: "limited",
    Reason.LIMIT_CEILING: "limited",
    Reason.LIMIT_WIDENING: "limited",
    Reason.HELD: "held",
    Reason.BOUNDED: "limited",
    Reason.CLIPPED: "unstable",
    Reason.SPIKE: "unstable",
    Reason.FALLBACK: "fallback",
    Reason.SCALER_SKIPPED: "skipped",
    Reason.NONFINITE: "skipped",
    Reason.TROUBLE_STATISTICS: "trouble",
    Reason.TROUBLE_DIVERGENCE: "trouble",
    Reason.TROUBLE_BUDGET: "trouble",
    Reason.SKIPPED: "skipped",
    Reason.LEFT_OUT: "skipped",
}


PHASES = (
    "warmup",
    "stable",
    "held",
    "vanishing",
    "unstable",
    "limited",
    "frozen",
    "fallback",
    "skipped",
    "trouble",
)
"""All phases. A word keeps its number: a new phase goes to the end."""


class Observation(NamedTuple):
    """What a controller may look at in one optimizer step.

    Attributes:
        norm: L2 norm of the gradient before clipping, float32, shape `[]` or `[num_tensors]`. NaN or inf means that
            the step (or this tensor) must not enter any statistic.
        loss: Training loss of the step, float32, shape `[]`; NaN when it is not known.
        static_threshold: Threshold of the warm-up and of a ceiling that is held, float32, shape `[]`.
        step_finite: Bool, shape `[]`: whether the step as a whole is finite. Per tensor a NaN norm in a finite step only means that
            the tensor has no gradient in it. None: the norm itself tells.
        left: For rules on units and elements, the global norm that they left, shape `[]`; None for all others, and in their warm-up.
        reach: Distance estimate over the base learning rate, shape `[]`; NaN or None when it is not known. What the pace goes by.
    """

    norm: Value
    loss: Value
    static_threshold: Value
    step_finite: Value | None = None
    left: Value | None = None
    reach: Value | None = None

    def left_out(self, finite: Value) -> Value:
        """Whether the step is left out, given whether `norm` is finite; bool, shape `[]` or that of the norm."""
        return ~finite if self.step_finite is None else ~self.step_finite


class Decision(NamedTuple):
    """What a controller wants done with the gradient of one step. All float32, all of the shape of the norm.

    Attributes:
        threshold: Largest norm allowed to reach the optimizer.
        coefficient: Multiplier on the gradient, in (0, 1]; exactly 1 when nothing is to be changed, exactly 0 when the step as a whole
            is to be left out.
        pace: Multiplier on the learning rate of this step, > 0 (below 1 only in its start); exactly 1 when the pace is off.
        reason: A [`Reason`] as a number.
    """

    threshold: Value
    coefficient: Value
    pace: Value
    reason: Value


@dataclasses.dataclass(frozen=True)
class Controller(Generic[State]):
    """Base of all controllers. Subclasses add their settings as fields (see `setting`) and implement `init` and `update`.

    Class attributes:
        idea: What it does, in a line.
        source: Where it comes from.
        choose: When to choose it.
        paces: The controller can set the pace.
        fine: It bounds single units or elements (see `FineController`).
        granularities: On what it can work, the usual one first.
        skips: By default a step that it would cut is left out instead (see `SkippingController`).
        looks_at_loss: Decisions depend on the training loss; then all ranks have to see the same one.
        revision: Which version of its rule this is; ledgers and states of an older one are recognised by it.
        new_fields: Fields of the state that older state files lack; a missing one takes its value from `init`.
    """

    idea: ClassVar[str]
    source: ClassVar[str]
    choose: ClassVar[str]
    paces: ClassVar[bool] = False
    fine: ClassVar[bool] = False
    skips: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("global", "module", "tensor")
    looks_at_loss: ClassVar[bool] = False
    revision: ClassVar[int] = 1
    new_fields: ClassVar[frozenset[str]] = frozenset()

    @property
    def of_the_run(self) -> frozenset[str]:
        """Fields of the state that belong to the run and not to a norm: they go on when the set of parameters changes."""
        return frozenset()

    if not TYPE_CHECKING:  # which is to see the fields, and not `Any`

        def __new__(cls, *args, **given):
            """Refuse unknown names with a hint, before Python does it without one."""
            known = [f.name for f in dataclasses.fields(cls)]
            if unknown := [_unknown_setting(cls, name, known) for name in given if name not in known]:
                raise ConfigError(unknown)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        wrong = problems_of(self)
        if problems := [*wrong.values(), *conflicts_left(self.conflicts(), wrong)]:
            raise ConfigError(problems)

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """Settings that do not go together, each right by itself: their names, and a sentence for people."""
        return ()

    def judging_apart(self) -> "Controller[State]":
        """The same where every tensor or module has a norm of its own."""
        return self

    def init(self, ops: Ops, shape: Shape) -> State:
        """The state before the first step, for norms of this shape."""
        raise NotImplementedError

    def start_threshold(self, static_threshold: Value, ops: Ops) -> Value:
        """What rules before the first norm is known."""
        return static_threshold

    def update(self, state: State, observation: Observation) -> tuple[Decision, State]:
        """Decide on one step from what came before it, then learn a bounded version of what was seen."""
        raise NotImplementedError

    def narrowed(self, state: State, ops: Ops) -> State:
        """The state after steps that were left out with their data: as narrow and as slow as the settings allow, from where it widens and
        speeds up again at its own rate. Doing it twice is doing it once."""
        return state


def _unknown_setting(kind: type, name: str, known: Iterable[str]) -> str:
    keys = keys_of(kind)
    hint = f" It is `{keys[name].name}` here." if name in keys else near(name, known)
    have = ", ".join(settings_of(kind)) or "none"
    return f"`{name}` must be a setting of {kind.__name__} ({have}), but is unknown instead.{hint}"


def is_finite_norm(norm: Value, ops: Ops) -> Value:
    """Whether a norm (never negative) is a number: one comparison, where `torch.isfinite` is four kernels."""
    return norm < ops(float("inf"))


def coefficient_of(norm: Value, threshold: Value, ops: Ops) -> Value:
    """`min(1, threshold / (norm + 1e-6))`, rounded as `torch.nn.utils.clip_grads_with_norm_` rounds it: what the static threshold does.

    torch divides a Python number by a tensor as number times reciprocal, which is not the same last bit as a division.
    """
    return ops.minimum(ops(1.0) / (norm + ops(CLIP_EPS)) * threshold, ops(1.0))


def cut_to(norm: Value, threshold: Value, ops: Ops) -> Value:
    """`threshold / norm` where the norm is above the threshold, else exactly 1: what a controller does with a threshold of its own.

    Nothing is added to the norm: 1e-6 is much where norms are small, and would scale what is inside the range.
    """
    return ops.where(norm > threshold, threshold / norm, ops(1.0))


def decide_by_threshold(
    norm: Value, threshold: Value, static_threshold: Value, *, warm: Value, ops: Ops
) -> tuple[Decision, Value]:
    """The decision of a rule that is one threshold and nothing else.

    Args:
        norm: Norm of the step.
        threshold: What the rule allows.
        static_threshold: What rules while `warm`.
        warm: Bool, whether the rule still has too little to go by.
        ops: The kind of numbers that all of these are.

    Returns:
        The decision, and whether the norm may be learned: NaN, infinite and zero norms may not (a few zeros, from a frozen or masked
        phase, would make a threshold 0, from which nothing ever trains again).
    """
    finite = is_finite_norm(norm, ops)
    usable = finite & (norm > ops(0.0))
    threshold = ops.where(warm, static_threshold, threshold)
    own, stock = cut_to(norm, threshold, ops), coefficient_of(norm, static_threshold, ops)
    coefficient = ops.where(finite, ops.where(warm, stock, own), ops(1.0))
    reason = ops.where(coefficient < ops(1.0), ops(float(Reason.CLIPPED)), ops(float(Reason.WITHIN)))
    reason = ops.where(warm, ops(float(Reason.WARMUP)), reason)
    reason = ops.where(usable, reason, ops(float(Reason.VANISHING)))
    reason = ops.where(finite, reason, ops(float(Reason.NONFINITE)))
    return Decision(threshold, coefficient, ops.expand(ops(1.0), ops.shape(norm)), reason), usable
