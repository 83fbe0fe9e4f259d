"""A batch as a file: tensors of whatever is in it, and a tree that says how they were put together. Never pickle.

The tree stands in the metadata of `batch.safetensors` as JSON. A node is a list of a word and what belongs to it: `["tensor", key]`,
`["array", key]` (NumPy), `["sparse", indices, values, shape]`, `["list", nodes]`, `["tuple", nodes]`, `["dict", [[key, node], ...]]`,
`["value", plain value]`, or `["other", class, text]` for what has no place in such a file.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.errors import LedgerError
from hf_adaclip.gradients.transfer import HOST, moved

BATCH_FILE: Final = "batch.safetensors"
_DEEPEST: Final = 32
_MOST_LEAVES: Final = 20_000
_MOST_SAMPLES: Final = 1024
_TEXT: Final = 400
_KEPT: Final = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


class Contents(NamedTuple):
    """What is in the micro-batches of a step.

    Attributes:
        tree: How they are put together, ready for JSON.
        tensors: By the keys in the tree, where they were; nothing has been copied.
        size: Bytes of tensors and texts.
    """

    tree: list[Any]
    tensors: dict[str, Tensor]
    size: int


class _Reader:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.size = self.leaves = 0

    def node(self, value: Any, key: str, depth: int = 0) -> list[Any]:
        self.leaves += 1
        if depth > _DEEPEST or self.leaves > _MOST_LEAVES:
            return _other(value)
        if isinstance(value, Tensor):
            return self._tensor(value, key)
        if isinstance(value, np.ndarray):
            try:
                return ["array", self._keep(key, torch.from_numpy(np.ascontiguousarray(value)))]
            except (TypeError, ValueError):
                return self.node(value.tolist(), key, depth + 1) if value.size <= _MOST_LEAVES else _other(value)
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            self.size += len(value) if isinstance(value, str) else 8
            return ["value", value]
        if isinstance(value, float):
            return ["number", str(value)]
        if isinstance(value, Mapping):
            return ["dict", [[_key(k), self.node(v, f"{key}.{k}", depth + 1)] for k, v in value.items()]]
        if isinstance(value, list | tuple):
            nodes = [self.node(v, f"{key}.{i}", depth + 1) for i, v in enumerate(value)]
            return ["list" if isinstance(value, list) else "tuple", nodes]
        return _other(value)

    def _tensor(self, value: Tensor, key: str) -> list[Any]:
        value = value.detach()
        if value.layout is not torch.strided:
            value = value.to_sparse().coalesce() if value.layout is not torch.sparse_coo else value.coalesce()
            indices, values = value.indices(), value.values()
            if values.dtype not in _KEPT:
                return _other(value)
            return [
                "sparse",
                self._keep(f"{key}.indices", indices),
                self._keep(f"{key}.values", values),
                list(value.shape),
            ]
        if value.dtype not in _KEPT or value.device.type == "meta" or type(value) not in (Tensor, torch.nn.Parameter):
            return _other(value)
        return ["tensor", self._keep(key, value)]

    def _keep(self, key: str, value: Tensor) -> str:
        if value.dtype not in _KEPT:
            raise TypeError(f"no place for {value.dtype}")
        while key in self.tensors:  # of keys that are alike as text
            key += "'"
        self.tensors[key] = value
        self.size += value.numel() * value.element_size()
        return key


def _key(key: Any) -> Any:
    return key if isinstance(key, bool | int | str) or key is None else str(key)


def _other(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        what = f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    else:
        try:
            what = repr(value)[:_TEXT]
        except Exception as error:  # somebody else's `__repr__`
            what = f"no text ({type(error).__name__})"
    return ["other", f"{type(value).__module__}.{type(value).__qualname__}", what]


def contents_of(micro_batches: list[Any]) -> Contents:
    """Look through the micro-batches of a step."""
    reader = _Reader()
    tree = [reader.node(batch, str(i)) for i, batch in enumerate(micro_batches)]
    return Contents(tree, reader.tensors, reader.size)


def write_batch(path: Path, contents: Contents) -> None:
    """Write all of it; tensors are copied to the host one after another. A file that was only begun is taken away again.

    Raises:
        OSError: There is no room, or no folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Cloned, because two of them may share their memory, which the format does not know.
    tensors = {
        key: moved(value, HOST).clone(memory_format=torch.contiguous_format) for key, value in contents.tensors.items()
    }
    try:
        save_file(tensors, str(path), metadata={"tree": json.dumps(contents.tree)})
    except SafetensorError as error:  # what it makes of a full disk
        path.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def load_batch(path: str | Path) -> list[Any]:
    """The micro-batches that [`write_batch`] wrote: dicts, lists and tensors as they were fed.

    Args:
        path: The file, or the folder of the incident.

    Raises:
        LedgerError: There is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / BATCH_FILE if path.is_dir() else path
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = json.loads((file.metadata() or {})["tree"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return [_built(node, tensors) for node in tree]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise LedgerError(f"{path} must be the batch of an incident, but cannot be read: {error}.") from error


def _built(node: list[Any], tensors: dict[str, Tensor]) -> Any:
    kind, first = node[0], node[1]
    if kind == "tensor":
        return tensors[first]
    if kind == "array":
        return tensors[first].numpy()
    if kind == "sparse":
        return torch.sparse_coo_tensor(tensors[first], tensors[node[2]], node[3], check_invariants=True)
    if kind == "dict":
        return {key: _built(inner, tensors) for key, inner in first}
    if kind in ("list", "tuple"):
        built = [_built(inner, tensors) for inner in first]
        return built if kind == "list" else tuple(built)
    if kind == "number":
        return float(first)
    return first if kind == "value" else f"<{first}: {node[2]}>"


def hashes(contents: Contents) -> list[dict[str, Any]]:
    """SHA-256 of every micro-batch: of what its leaves are called, of their dtypes and shapes, and of their bytes; of every sample too,
    where all tensors have the same first dimension. The host reads all of it."""
    found = []
    for node in contents.tree:
        whole = hashlib.sha256(json.dumps(_outline(node)).encode())
        keys = list(_tensors_in(node))
        rows = {
            contents.tensors[key].shape[0] for key in keys if contents.tensors[key].dim()
        }  # a number is of all of them
        count = rows.pop() if len(rows) == 1 else 0
        samples = [hashlib.sha256() for _ in range(count if count <= _MOST_SAMPLES else 0)]
        for key in keys:
            value = moved(contents.tensors[key], HOST).contiguous()
            whole.update(f"{value.dtype} {list(value.shape)}".encode())
            whole.update(_bytes(value))
            for sample, row in zip(samples, value, strict=True) if samples and value.dim() else ():
                sample.update(_bytes(row.contiguous()))
        one = {"sha256": whole.hexdigest()}
        found.append({**one, "samples": [s.hexdigest()[:16] for s in samples]} if samples else one)
    return found


def _outline(node: list[Any]) -> list[Any]:
    """A node without what differs between two equal batches: keys of tensors, and texts that hold addresses."""
    if node[0] in ("list", "tuple"):
        return [node[0], [_outline(inner) for inner in node[1]]]
    if node[0] == "dict":
        return ["dict", [[key, _outline(inner)] for key, inner in node[1]]]
    return node if node[0] in ("value", "number") else [node[0]]


def _tensors_in(node: list[Any]) -> Iterator[str]:
    if node[0] in ("tensor", "array"):
        yield node[1]
    elif node[0] == "sparse":
        yield from node[1:3]
    elif node[0] in ("list", "tuple"):
        for inner in node[1]:
            yield from _tensors_in(inner)
    elif node[0] == "dict":
        for _, inner in node[1]:
            yield from _tensors_in(inner)


def _bytes(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()
