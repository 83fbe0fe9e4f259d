"""The words of a batch, for people: token ids decoded by whatever the training has for that."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from hf_adaclip.gradients.transfer import HOST, moved

TEXT_FILE: Final = "text.jsonl"
GENERATIONS_FILE: Final = "generations.jsonl"
"""Of a policy: what was generated for the step, and what it was worth."""
_MOST_LINES: Final = 256
_LONGEST: Final = 20_000


def texts_of(micro_batches: list[Any], processing_class: Any) -> Iterator[dict[str, Any]]:
    """One entry per sample and field: the micro-batch, the sample, the field, and its text.

    Args:
        micro_batches: Mappings of token ids, shape `[batch, length]`; anything else has no text, and ids below 0 (of labels: nothing to
            predict) have none.
        processing_class: A tokenizer, or a processor that has one; anything with `decode`.
    """
    decoder = getattr(processing_class, "tokenizer", processing_class)
    decode = getattr(decoder, "decode", None)
    if decode is None:
        return
    for number, batch in enumerate(micro_batches):
        fields = [(f, v) for f, v in batch.items() if _holds_tokens(f, v)] if isinstance(batch, Mapping) else []
        rows = [(field, moved(ids.detach(), HOST).tolist()) for field, ids in fields]
        for sample in range(max((len(ids) for _, ids in rows), default=0)):
            for field, ids in rows:
                if sample < len(ids):
                    text = str(decode([token for token in ids[sample] if token >= 0]))[:_LONGEST]
                    yield {"micro_batch": number, "sample": sample, "field": field, "text": text}


def _holds_tokens(field: Any, value: Any) -> bool:
    named = isinstance(field, str) and (field == "labels" or field.endswith("_ids")) and "type" not in field
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return named and whole and value.dim() == 2 and "position" not in field and "image" not in field


def write_texts(path: Path, micro_batches: list[Any], processing_class: Any) -> str | None:
    """Write the words; returns the file's name, None where there are none."""
    lines = []
    for entry in texts_of(micro_batches, processing_class):
        lines.append(json.dumps(entry, ensure_ascii=False))
        if len(lines) == _MOST_LINES:
            break
    if not lines:
        return None
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    return path.name
