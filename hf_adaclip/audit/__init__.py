"""The ledger of a run: what was seen and decided at every optimizer step, and the means to check it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_adaclip.ledger.writer import Ledger

if TYPE_CHECKING:
    from hf_adaclip.audit.verify import Finding, VerifyReport, verify_ledger

__all__ = ["Finding", "Ledger", "VerifyReport", "verify_ledger"]


def __getattr__(name: str) -> Any:
    # A run that only writes its ledger does not pay for the means to check it (PEP 562).
    if name in ("Finding", "VerifyReport", "verify_ledger"):
        return getattr(import_module("hf_adaclip.audit.verify"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
