"""What `import torch` calls in an environment with hf_adaclip: nothing, unless the variable `HF_ADACLIP` is set.

torch calls the entry points of the group `torch.backends` as the last thing of its own import. That is the one place which every process
with a `transformers.Trainer` passes, whoever started it. A `.pth` file or a `sitecustomize` would run in every Python process of the
environment, with torch or without. This module stands beside the package, not in it, so that the call imports nothing else.
"""

import functools
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "HF_ADACLIP"
_TRAINER = "transformers.trainer"


def start() -> None:
    """The entry point."""
    if not os.environ.get(VARIABLE):
        return
    module = sys.modules.get(_TRAINER)
    if module is None:
        sys.meta_path.insert(0, _Waiter())
    elif hasattr(module, "Trainer"):
        _hook(module)
    elif module.__spec__ is not None:  # it is what imports torch, and not done yet
        module.__spec__.__class__ = _WatchedSpec


class _Waiter:
    """A finder that finds nothing itself: it sees `transformers.trainer` come, and leaves `sys.meta_path` with it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_hook(module: ModuleType) -> None:
                del loader.exec_module  # the loader's own again
                execute(module)
                _hook(module)

            loader.exec_module = execute_and_hook
        return spec


class _WatchedSpec(ModuleSpec):
    """Of a module whose import is under way: the import system sets `_initializing` to False as it ends (CPython 3.10 to 3.14)."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            module = sys.modules.get(self.name)
            if module is not None and hasattr(module, "Trainer"):
                _hook(module)


def _hook(module: ModuleType) -> None:
    train = module.Trainer.train
    if hasattr(train, "_hf_adaclip"):
        return

    @functools.wraps(train)
    def train_attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get(VARIABLE):
            from hf_adaclip.integrations.launch import attach_by_environment

            attach_by_environment(self)
        return train(self, *args, **kwargs)

    train_attached._hf_adaclip = True  # type: ignore[attr-defined]
    module.Trainer.train = train_attached
