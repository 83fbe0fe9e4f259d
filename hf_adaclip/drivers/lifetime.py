"""The end of a clipper, be it closed or merely dropped: nothing is lost, and nobody else is kept alive or left with its hooks."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from hf_adaclip.drivers.driver import Grip
from hf_adaclip.run.run import Run

logger = logging.getLogger(__name__)


def weakly(method: Callable[..., object]) -> Callable[..., None]:
    """The method as long as its object lives, then nothing."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        living = reference()
        if living is not None:
            living(*args)

    return call


def detach(grip: Grip, handles: Sequence[Any]) -> None:
    grip.detach()
    for handle in handles:
        handle.remove()


def let_go(run: Run, grip: Grip, handles: Sequence[Any]) -> None:
    """The end of a clipper that was never closed: nothing is lost, and nothing is raised where nobody could catch it."""
    try:
        run.close(clean=False)
    except Exception as error:
        logger.warning("Adaptive clipping: a clipper was dropped without `close`, and its last rows say: %s", error)
    finally:
        detach(grip, handles)
