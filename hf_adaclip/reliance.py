"""What the package relies on in others without their promise: private attributes, and public ones whose meaning is written down nowhere.

One table. What is in it is looked for when a clipper, a Trainer or a meter is made, never at step 1000; what is missing is an error that
names it. A test finds every access to a private attribute of somebody else, and demands a row.
"""

from collections.abc import Iterable
from importlib import metadata
from types import CodeType
from typing import Any, Final, NamedTuple

from hf_adaclip.errors import UnsupportedSetupError


class Reliance(NamedTuple):
    """One row.

    Attributes:
        package: Whose attribute it is, as it is installed.
        owner: The class or module that has it.
        name: Of the attribute.
        seen: Versions in which it was there, and did what is said.
        purpose: What it is needed for.
        without: The way out where it is missing.
    """

    package: str
    owner: str
    name: str
    seen: str
    purpose: str
    without: str


_TORCH: Final = "2.13"
_OTHER_TORCH: Final = "Install a torch that was seen, or keep the stock clipping (`max_grad_norm`)"
_UPGRADE: Final = "Upgrade it, or use AdaptiveClipper in a loop of your own"
_METHOD: Final = "5.3 or later"


def _torch(owner: str, name: str, purpose: str, without: str = _OTHER_TORCH) -> Reliance:
    return Reliance("torch", owner, name, _TORCH, purpose, without)


def _trainer(name: str, purpose: str) -> Reliance:
    return Reliance("transformers", "Trainer", name, _METHOD, purpose, _UPGRADE)


def _accelerate(owner: str, name: str, purpose: str) -> Reliance:
    other = "Install an accelerate that was seen, or make the clipper without `accelerator=`"
    return Reliance("accelerate", owner, name, "1.10 and 1.15", purpose, other)


def _deepspeed(name: str, purpose: str) -> Reliance:
    other = "Install a DeepSpeed that was seen, or keep its own clipping (`gradient_clipping`)"
    return Reliance("deepspeed", "ZeRO optimizer", name, "0.19", purpose, other)


_FOREACH: Final = (
    *(
        "abs",
        "add_",
        "addcdiv_",
        "addcmul_",
        "clamp_min_",
        "copy_",
        "div",
        "max",
        "maximum_",
        "minimum_",
        "mul",
        "mul_",
    ),
    *("neg_", "norm", "pow", "sign", "sign_", "sqrt", "sqrt_", "sub", "sub_"),
)
_KERNELS: Final = ("_utils", "_get_nvrtc_library", "_cuda_load_module")
_OPERATIONS: Final = "Without it steps are made operation by operation, and a line of the log says so"
_UNFUSED: Final = "Make the optimizer with `fused=False`"
RELIANCES: Final[tuple[Reliance, ...]] = (
    _torch("Optimizer", "_optimizer_step_pre_hooks", "our hook is kept the last one before a step"),
    _torch(
        "Optimizer",
        "_optimizer_step_post_hooks",
        "the hooks of the agreement and of the rate are kept the first ones after a step",
    ),
    _torch("optimizer", "_global_optimizer_pre_hooks", "it is noticed that others hook into steps"),
    _torch("Optimizer", "profile_hook_step", "calls of `step` that are going on are counted"),
    _torch("Adam", "found_inf", "1.0 makes a fused step leave everything as it is", _UNFUSED),
    _torch("Adam", "grad_scale", "a fused step divides the gradients by it", _UNFUSED),
    _torch("Adam", "_step_supports_amp_scaling", "a fused optimizer that unscales by itself is known by it"),
    _torch(
        "LRScheduler", "_wrapped_by_lr_sched", "a step that was left out is not taken for a step that was forgotten"
    ),
    _torch("LRScheduler", "_opt_called", "a step that was left out is not taken for a step that was forgotten"),
    _torch("GradScaler", "_scale", "the loss scale is recorded without a host read"),
    _torch("Tensor", "_version", "it is noticed that somebody has changed a gradient or a rate"),
    *(_torch("torch", f"_foreach_{name}", "many tensors are worked on in one call") for name in _FOREACH),
    _torch("utils", "_foreach_utils", "gradients are sorted for calls on many of them"),
    _torch("_foreach_utils", "_group_tensors_by_device_and_dtype", "gradients are sorted for calls on many of them"),
    *(_torch("cuda", name, "a step is one launch on CUDA", _OPERATIONS) for name in _KERNELS),
    _accelerate("Accelerator", "_optimizers", "the optimizer that was prepared is found"),
    _accelerate("Accelerator", "_models", "names of parameters are found"),
    _accelerate("AcceleratedOptimizer", "accelerator_state", "its wrapper is told from a torch optimizer"),
    _trainer("_clip_grad_norm", "clipping takes its place"),
    _trainer("_inner_training_loop", "every run has a clipper of its own"),
    _trainer("_maybe_log_save_evaluate", "the line is known that `clip/*` is logged in"),
    _trainer("_save_optimizer_and_scheduler", "the controller's state is written into checkpoints"),
    _trainer("_load_optimizer_and_scheduler", "the controller's state is read from checkpoints"),
    _trainer("_load_rng_state", "training goes back to a checkpoint where no snapshot is old enough"),
    _trainer("_get_output_dir", "trials of a search have ledgers of their own"),
    _trainer("_prepare_inputs", "the batch of an incident is what its loss was made of"),
    _trainer("_load_from_checkpoint", "the batch of an incident goes through the weights before it"),
    _trainer("_globalstep_last_logged", "losses that are not finite are filtered as the Trainer does it"),
    Reliance(
        *(
            "transformers",
            "Parameter",
            "_is_hf_initialized",
            _METHOD,
            "a model that was trained before is told from a fresh one",
        ),
        "Without it a model that has a `name_or_path` counts as trained before",
    ),
    Reliance(
        *("trl", "GRPOTrainer", "_logs", "1.0 and 1.16", "the rewards of an incident are kept with it"),
        "Without it there are the completions and their advantages",
    ),
    _deepspeed("_global_grad_norm", "a step that is not finite is left out in bfloat16"),
    _deepspeed("clip_grad", "the engine is told its threshold"),
    Reliance(
        *("codecarbon", "OfflineEmissionsTracker", "_total_energy", "3.3", "energy is estimated without a sensor"),
        "Without it no energy is reported",
    ),
    Reliance(
        *("tqdm", "tqdm", "_decr_instances", "4.70", "a bar that is printed in lines gives its place free"),
        "Install a tqdm that was seen",
    ),
    Reliance(
        *("python", "sys", "_getframe", "3.11", "it is known who is calling, where nothing else tells"),
        "Use CPython",
    ),
    Reliance(
        *("python", "ArgumentParser", "_actions", "3.11", "the nearest flag is hinted at"),
        "Use a Python that was seen",
    ),
    Reliance(
        *("python", "argparse", "_SubParsersAction", "3.11", "the nearest flag of a command is hinted at"),
        "Use a Python that was seen",
    ),
)
_ROWS: Final = {row.name: row for row in RELIANCES}


def missing(name: str) -> UnsupportedSetupError:
    """The error for a row by its attribute's name."""
    row = _ROWS[name]
    return UnsupportedSetupError(
        f"`{row.package}` must have {row.owner}.{row.name} ({row.seen}), but {row.package} {_version(row.package)} has none that "
        f"does the same. By it {row.purpose}. {row.without}."
    )


def require(owner: Any, name: str) -> Any:
    """The attribute of somebody else's object.

    Args:
        owner: A module, a class or an object.
        name: Of the attribute, as it stands in the table.

    Raises:
        UnsupportedSetupError: It is not there.
    """
    assert name in _ROWS, name
    try:
        return getattr(owner, name)
    except AttributeError:
        raise missing(name) from None


def require_mention(functions: Iterable[Any], name: str) -> None:
    """Whether somebody else's code still knows an attribute that comes into being only as the code runs.

    Raises:
        UnsupportedSetupError: None of the functions mentions it.
    """
    codes = (getattr(getattr(f, "__wrapped__", f), "__code__", None) for f in functions)
    if not any(_mentions(code, name) for code in codes if code is not None):
        raise missing(name)


def is_of(package: str, thing: Any) -> bool:
    """Whether a class of this package is among those of an object; what merely looks like one promises nothing."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(thing).__mro__)


def _mentions(code: CodeType, name: str) -> bool:
    return (
        name in code.co_names
        or name in code.co_consts
        or any(_mentions(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))
    )


def _version(package: str) -> str:
    import platform

    try:
        return platform.python_version() if package == "python" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"
