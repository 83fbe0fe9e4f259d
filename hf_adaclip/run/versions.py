"""Versions of what a run depends on, for ledgers, cards and reports."""

import platform
from importlib import metadata

_PACKAGES = ("hf_adaclip", "torch", "transformers", "accelerate")


def environment() -> dict[str, str]:
    """Installed versions by package; what is not installed is left out. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
