"""The ledger of a run: what was seen and decided at every optimizer step, and the means to check it."""

from hf_adaclip.audit.ledger import Ledger
from hf_adaclip.audit.verify import Finding, VerifyReport, verify_ledger

__all__ = ["Finding", "Ledger", "VerifyReport", "verify_ledger"]
