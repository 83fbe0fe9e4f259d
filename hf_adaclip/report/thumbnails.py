"""Small pictures of the images of a batch, as PNG in the page itself."""

import base64
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

_MOST: Final = 16
_SIDE: Final = 96


def thumbnails(micro_batches: list[Any]) -> list[tuple[str, str]]:
    """Name and data URI of the first images of a batch, as far as there are any."""
    found: list[tuple[str, str]] = []
    for name, image in _images(micro_batches):
        if len(found) == _MOST:
            break
        found.append((name, "data:image/png;base64," + base64.b64encode(png(_small(image))).decode()))
    return found


def _images(micro_batches: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for number, batch in enumerate(micro_batches):
        for field, value in batch.items() if isinstance(batch, dict) else ():
            if not (isinstance(field, str) and ("pixel" in field or "image" in field) and isinstance(value, Tensor)):
                continue
            if value.dim() == 4 and value.shape[1] in (1, 3) and value.numel():
                for sample, image in enumerate(value):
                    yield f"micro-batch {number}, sample {sample}", image


def _small(image: Tensor) -> np.ndarray:
    """Scaled down, and to the whole range of brightness: uint8, shape `[height, width, 3]`."""
    image = torch.nan_to_num(image.float(), posinf=0.0, neginf=0.0)
    factor = max(max(image.shape[1:]) / _SIDE, 1.0)
    size = [max(round(n / factor), 1) for n in image.shape[1:]]
    image = torch.nn.functional.interpolate(image[None], size=size, mode="area")[0]
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    pixels: np.ndarray = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return pixels


def png(pixels: np.ndarray) -> bytes:
    """An image as a PNG file.

    Args:
        pixels: uint8, shape `[height, width, 3]`.
    """
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
