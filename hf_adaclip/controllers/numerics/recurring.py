"""Levels that come back: a second source of data comes back without ever coming six times in a row.

Two rivals (a level and a number of hits, which fades by 0.3 % a step) are kept. Counted are norms beyond min(far, 0.6) above L where the
one before was not, and lasting levels, as two: a norm within 0.75 of a rival is a hit and moves it; any other that is over the top takes
the place of the weaker one. Four hits make a rival C, the remembered level: norms up to max(far, 0.6) above it pass from then on and do
not teach L and S; C follows those within 0.6 of it, and is forgotten 900 steps after the last of them. Spikes of differing sizes do not
agree, and those of one size, hundreds of steps apart, have faded before there are four.

L, S, far and the deviation are those of `adaptive`. Source: two counters for what comes back most often, Misra and Gries 1982.
"""

from typing import NamedTuple

from hf_adaclip.controllers.numerics.deviation import INNER_EDGE, above, deviation
from hf_adaclip.controllers.numerics.ops import Ops, Value

HITS, LASTING, FADE, ALIKE, FORGOTTEN = 4.0, 2.0, 0.997, 0.75, 0.5
"""Hits that make a rival the remembered level; those of a lasting level; what is left of them a step later; deviation that is a hit; hits
that are none."""

REMEMBERED, FOLLOW = 60.0, 0.1
"""Hits that a remembered level starts with; part of the way that it moves to a norm."""


class Memory(NamedTuple):
    """What is remembered of levels that come back.

    Attributes:
        crest, memory: The remembered second level, and what is left of its hits.
        rival, hits, other, other_hits: The two rivals.
    """

    crest: Value
    memory: Value
    rival: Value
    hits: Value
    other: Value
    other_hits: Value


def remember(
    before: Memory, norm: Value, *, event: Value, lasting: Value, new: Value, ready: Value, far: Value, ops: Ops
) -> Memory:
    """Count the hits of the rivals, and follow the one that is remembered.

    Args:
        before: What was remembered.
        norm: Of the step.
        event: Bool, whether it may be a hit.
        lasting: Bool, whether it is the last of a run that is a new level.
        new: Bool, whether it may take a rival's place when it is no hit.
        ready: Bool, whether it may be learned from.
        far: Deviation by which a remembered level may move at once.
        ops: The kind of numbers that all of these are.
    """
    one, zero, alike = ops(1.0), ops(0.0), ops(ALIKE)
    fade = ops(FADE)
    hits, other_hits = before.hits * fade, before.other_hits * fade
    weight = ops.where(lasting, ops(LASTING), one)
    first = event & (hits >= ops(FORGOTTEN)) & (abs(deviation(norm, before.rival, ops)) <= alike)
    second = event & ~first & (other_hits >= ops(FORGOTTEN))
    second = second & (abs(deviation(norm, before.other, ops)) <= alike)
    new = event & new & ~first & ~second
    weaker = hits < other_hits
    into, instead = new & weaker, new & ~weaker
    hits = ops.where(into, weight, ops.where(first, hits + weight, hits))
    other_hits = ops.where(instead, weight, ops.where(second, other_hits + weight, other_hits))
    moved = before.rival + (norm - before.rival) / ops.maximum(hits, one)
    rival = ops.where(into, norm, ops.where(first, moved, before.rival))
    moved = before.other + (norm - before.other) / ops.maximum(other_hits, one)
    other = ops.where(instead, norm, ops.where(second, moved, before.other))

    enough = ops(HITS)
    won, other_won = first & (hits >= enough), second & (other_hits >= enough)
    known = before.memory >= enough
    back = known & ready & (abs(deviation(norm, before.crest, ops)) <= ops(INNER_EDGE))
    step = ops.minimum(ops.maximum(deviation(norm, before.crest, ops), -far), far)
    crest = ops.where(back, above(before.crest, ops(FOLLOW) * step, ops), before.crest)
    memory = ops.where(back, ops(REMEMBERED), before.memory * fade)
    crest = ops.where(won, rival, ops.where(other_won, other, crest))
    memory = ops.where(won | other_won, ops(REMEMBERED), memory)
    return Memory(crest, memory, rival, ops.where(won, zero, hits), other, ops.where(other_won, zero, other_hits))
