"""A program as one kernel: CUDA for an accelerator; Python on a CPU, where the tests play one.

Every operation is rounded once. CUDA is told so by its `_rn` functions, which no compiler joins into a multiply-add, and by `--fmad=false`;
a number stands in the text by its bits. Both texts come from one table, and a C compiler makes of the CUDA text the bits of torch too
(tests/controllers/test_kernel.py).

    results[i, lane] = f(arguments of the lane)            float32 and bool results in a buffer of their own each
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.symbols import BOOL, FLOAT, Leaf, Operation, Program

Launch = Callable[[Sequence[Tensor | float], int], tuple[Tensor | None, Tensor | None]]
"""Takes the arguments and the number of lanes; gives float32 and bool results, each `[count, lanes]`, None where there are none."""

_CUDA: Final = {
    "add": "__fadd_rn({}, {})",
    "sub": "__fsub_rn({}, {})",
    "mul": "__fmul_rn({}, {})",
    "div": "__fdiv_rn({}, {})",
    "sqrt": "__fsqrt_rn({})",
    "floor": "floorf({})",
    "abs": "fabsf({})",
    "neg": "-{}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "not": "!{}",
    "where": "{} ? {} : {}",
    "minimum": "{0} < {1} || {0} != {0} ? {0} : {1}",
    "maximum": "{0} > {1} || {0} != {0} ? {0} : {1}",
    "exponent": "(float)((__float_as_int({}) >> 23) - 127)",
    "mantissa": "__int_as_float((__float_as_int({}) & 0x007FFFFF) | 0x3F800000)",
    "power_of_two": "__int_as_float(((int){} + 127) << 23)",
}
# Of numbers (`numpy.float32` and `numpy.bool`) and of arrays of them.
_NUMBERS: Final = {
    **{name: text for name, text in _CUDA.items() if name in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "neg")},
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "sqrt": "np.sqrt({})",
    "floor": "np.floor({})",
    "abs": "abs({})",
    "not": "~{}",
    "where": "{1} if {0} else {2}",
    "minimum": "{0} if {0} < {1} or {0} != {0} else {1}",
    "maximum": "{0} if {0} > {1} or {0} != {0} else {1}",
    "exponent": "np.float32(({}.view(np.int32) >> 23) - 127)",
    "mantissa": "(({}.view(np.int32) & np.int32(0x007FFFFF)) | np.int32(0x3F800000)).view(np.float32)",
    "power_of_two": "((np.int32({}) + np.int32(127)) << np.int32(23)).view(np.float32)",
}
_ARRAYS: Final = {
    **_NUMBERS,
    "where": "np.where({}, {}, {})",
    "minimum": "np.minimum({}, {})",
    "maximum": "np.maximum({}, {})",
    "exponent": "(({}.view(np.int32) >> 23) - 127).astype(np.float32)",
    "power_of_two": "(({}.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)",
}
_BLOCK: Final = 128


class Argument(NamedTuple):
    """How an argument is read.

    Attributes:
        leaf: What it is.
        shared: One number for all lanes.
        by_value: A number of the host, given with the launch.
    """

    leaf: Leaf
    shared: bool
    by_value: bool = False


def cuda_source(program: Program, arguments: Sequence[Argument]) -> str:
    """The text of a kernel `step(argument..., floats, bools, lanes)`."""
    reads: list[str] = []
    for i, (leaf, shared, by_value) in enumerate(arguments):
        if by_value:
            reads.append(f"(float)a{i}")
            continue
        lane = "0" if shared else "lane"
        reads += [f"a{i}[{lane}]" if not row else f"a{i}[{row} * lanes + {lane}]" for row in range(max(leaf.rows, 1))]
    parameters = [f"double a{i}" if a.by_value else f"const {a.leaf.kind}* a{i}" for i, a in enumerate(arguments)]
    lines = [
        f"  const {o.kind} v{i} = {_expression(o, _CUDA, reads, _bits)};" for i, o in enumerate(program.operations)
    ]
    lines += [f"  {target} = v{line};" for line, target in zip(program.results, _targets(program), strict=True)]
    return "\n".join(
        [
            f'extern "C" __global__ void step({", ".join(parameters)}, float* floats, bool* bools, int lanes) {{',
            "  const int lane = blockIdx.x * blockDim.x + threadIdx.x;",
            "  if (lane >= lanes) return;",
            *lines,
            "}",
        ]
    )


def _expression(
    operation: Operation, table: dict[str, str], reads: Sequence[str], constant: Callable[[np.float32], str]
) -> str:
    name, arguments, _ = operation
    if name == "input":
        return str(reads[arguments[0]])
    if name == "constant":
        return constant(np.float32(float.fromhex(arguments[0])))
    return table[name].format(*(f"v{line}" for line in arguments))


def _bits(value: np.float32) -> str:
    return f"__int_as_float({int(value.view(np.int32))})"


def _targets(program: Program) -> list[str]:
    counts = {FLOAT: 0, BOOL: 0}
    targets = []
    for kind in program.kinds:
        targets.append(f"{kind}s[{counts[kind]} * lanes + lane]")
        counts[kind] += 1
    return targets


def build(program: Program, arguments: Sequence[Argument], device: torch.device) -> Launch:
    """Make a kernel of a program.

    Raises:
        Exception: Of many kinds: there is no compiler for this device, or the compiler fails.
    """
    if device.type == "cpu":
        return _python_kernel(program, arguments)
    if device.type == "cuda" and torch.version.hip is None:
        return _cuda_kernel(program, arguments, device)
    raise NotImplementedError(
        f"no kernels are made for {device.type}" + (" with ROCm" if device.type == "cuda" else "")
    )


def _cuda_kernel(program: Program, arguments: Sequence[Argument], device: torch.device) -> Launch:
    with torch.cuda.device(device):
        kernel = _compiled(cuda_source(program, arguments), device)
    floats, bools = program.kinds.count(FLOAT), program.kinds.count(BOOL)

    def launch(values: Sequence[Tensor | float], lanes: int) -> tuple[Tensor | None, Tensor | None]:
        results = (
            torch.empty((floats, lanes), dtype=torch.float32, device=device),
            torch.empty((bools, lanes), dtype=torch.bool, device=device),
        )
        with torch.cuda.device(device):
            kernel((-(-lanes // _BLOCK), 1, 1), (min(lanes, _BLOCK), 1, 1), [*values, *results, lanes])
        return results

    return launch


def _compiled(source: str, device: torch.device) -> Any:
    """By NVRTC, which comes with torch. Not by `torch.cuda._compile_kernel` (2.13), which needs the headers of an installed CUDA toolkit
    and a build environment, and this text needs neither.

    Private names of torch that are relied on (2.13): `torch.cuda._utils._get_nvrtc_library` and `_cuda_load_module`; without them no kernel
    is made.
    """
    from torch.cuda import _utils

    try:
        nvrtc = _utils._get_nvrtc_library()
    except OSError:  # not on the path of libraries; one of torch's own is linked with it, and gives its functions too
        nvrtc = ctypes.CDLL(f"{torch.__path__[0]}/lib/libcaffe2_nvrtc.so")
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--fmad=false"]

    def check(result: int) -> None:
        if result:
            raise RuntimeError(f"NVRTC gave error {result}")

    made = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(made), source.encode(), b"step.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcCompileProgram(made, len(options), (ctypes.c_char_p * len(options))(*options)))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(made, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(made, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(made))
    loaded: Any = _utils._cuda_load_module(binary.raw, ["step"])
    return loaded["step"]


def _python_kernel(program: Program, arguments: Sequence[Argument]) -> Launch:
    """The same on a CPU, in one call that torch does not see: no tensor operation is made, and no value of a tensor asked for."""
    one, many = (_function(program, table) for table in (_NUMBERS, _ARRAYS))
    floats = [i for i, kind in enumerate(program.kinds) if kind == FLOAT]
    bools = [i for i, kind in enumerate(program.kinds) if kind == BOOL]

    def launch(values: Sequence[Tensor | float], lanes: int) -> tuple[Tensor | None, Tensor | None]:
        inputs: list[Any] = []
        for value, (leaf, shared, by_value) in zip(values, arguments, strict=True):
            if by_value:
                inputs.append(np.float32(value))
                continue
            assert isinstance(value, Tensor)
            rows = np.from_dlpack(value).reshape(max(leaf.rows, 1), 1 if shared else lanes)
            inputs += [row[0] for row in rows] if shared or lanes == 1 else list(rows)
        with np.errstate(all="ignore"):
            found = (one if lanes == 1 else many)(*inputs)
        results = np.empty((len(floats), lanes), np.float32), np.empty((len(bools), lanes), np.bool_)
        for buffer, places in zip(results, (floats, bools), strict=True):
            for row, place in enumerate(places):
                buffer[row] = found[place]
        return torch.from_numpy(results[0]), torch.from_numpy(results[1])

    return launch


def _function(program: Program, table: dict[str, str]) -> Callable[..., tuple[Any, ...]]:
    inputs = [o.arguments[0] for o in program.operations if o.name == "input"]
    names = [f"a{i}" for i in range(max(inputs, default=-1) + 1)]
    constants: dict[str, np.float32] = {}

    def constant(value: np.float32) -> str:
        name = f"c{int(value.view(np.uint32)):08x}"
        constants[name] = value
        return name

    lines = [f"  v{i} = {_expression(o, table, names, constant)}" for i, o in enumerate(program.operations)]
    results = "".join(f"v{line}, " for line in program.results)
    scope: dict[str, Any] = {"np": np, **constants}
    exec("\n".join([f"def step({', '.join([*names, '*_'])}):", *lines, f"  return ({results})"]), scope)
    made: Callable[..., tuple[Any, ...]] = scope["step"]
    return made
