"""What the scripts refuse before they load anything: files that no reader knows, and models whose size nobody chose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

READERS: Final = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv", "txt": "text"}
"""Builder of `datasets` by the ending of a file."""


def reader_of(files: Mapping[str, str | None], endings: tuple[str, ...]) -> str:
    """The builder of `datasets` that reads these files.

    Args:
        files: Paths by the name of their flag, None where it was not given. Addresses and patterns are not looked up.
        endings: Endings that the script can use, of `READERS`.

    Raises:
        ValueError: A file ends otherwise, is not there, or is of another kind than the first one.
    """
    kinds = {}
    for flag, path in files.items():
        if path is None:
            continue
        ending = Path(path).suffix.lstrip(".").lower()
        if ending not in endings:
            raise ValueError(
                f"`--{flag}` must end in .{', .'.join(endings[:-1])}{' or .' if endings[1:] else ''}{endings[-1]}, but {path} ends in "
                f"{f'.{ending}' if ending else 'none of them'}."
            )
        if "://" not in path and "*" not in path and not Path(path).is_file():
            raise ValueError(f"`--{flag}` must be a file, but {path} is not there.")
        kinds[flag] = READERS[ending]
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"`--{'` and `--'.join(kinds)}` must be files of one kind, but are {' and '.join(kinds.values())}."
        )
    return next(iter(kinds.values()))


def check_size_was_chosen(model: str | None, model_type: str, overrides: str | None, small: str) -> None:
    """A model from scratch needs a size: a type's own default is a large one.

    Args:
        model: `--model_name_or_path`.
        model_type: `--model_type`.
        overrides: `--config_overrides`.
        small: Overrides that make a small one.

    Raises:
        ValueError: Neither weights nor a size are named.
    """
    if model is None and not overrides:
        raise ValueError(
            f"`--model_name_or_path` or `--config_overrides` must be given: a `{model_type}` of default size is large (a ViT takes half "
            f"a minute a step on a CPU, a Llama 27 GB). A small one: --config_overrides {small}"
        )
