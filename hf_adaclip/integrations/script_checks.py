"""What the scripts refuse before they load anything: files that no reader knows, and models whose size nobody chose."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near

READERS: Final = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv", "txt": "text"}
"""Builder of `datasets` by the ending of a file."""


def reader_of(files: Mapping[str, str | None], endings: tuple[str, ...]) -> str:
    """The builder of `datasets` that reads these files.

    Args:
        files: Paths by the name of their flag, None where it was not given. Addresses and patterns are not looked up.
        endings: Endings that the script can use, of `READERS`.

    Raises:
        ConfigError: A file ends otherwise, is not there, or is of another kind than the first one.
    """
    kinds = {}
    for flag, path in files.items():
        if path is None:
            continue
        ending = Path(path).suffix.lstrip(".").lower()
        if ending not in endings:
            raise ConfigError(
                f"`--{flag}` must end in .{', .'.join(endings[:-1])}{' or .' if endings[1:] else ''}{endings[-1]}, but {path} ends in "
                f"{f'.{ending}' if ending else 'none of them'}."
            )
        if "://" not in path and "*" not in path and not Path(path).is_file():
            raise ConfigError(f"`--{flag}` must be a file, but {path} is not there.")
        kinds[flag] = READERS[ending]
    if len(set(kinds.values())) > 1:
        raise ConfigError(
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
        ConfigError: Neither weights nor a size are named.
    """
    if model is None and not overrides:
        raise ConfigError(
            f"`--model_name_or_path` or `--config_overrides` must be given: a `{model_type}` of default size is large (a ViT takes half "
            f"a minute a step on a CPU, a Llama 27 GB). A small one: --config_overrides {small}"
        )


def override(config: Any, overrides: str | None) -> None:
    """Set what `--config_overrides` says on a model's config, in place.

    Args:
        config: A `PretrainedConfig`.
        overrides: `NAME=VALUE,NAME=VALUE`, or None.

    Raises:
        ConfigError: A name is no setting of this model, or a value is not of its kind.
    """
    known = config.to_dict()
    for piece in filter(None, (overrides or "").split(",")):
        name, equals, _ = (part.strip() for part in piece.partition("="))
        if not equals or name not in known:
            what = f"a setting of {config.model_type}" if equals else "NAME=VALUE"
            raise ConfigError(
                f"`--config_overrides` must name {what} in each piece, but {piece!r} is none.{near(name, known)}"
            )
        try:
            config.update_from_string(piece.strip())
        except ValueError as error:
            raise ConfigError(
                f"`--config_overrides` must give {name} a value of its kind, but is {piece!r}: {error}."
            ) from error


def check_columns(flag: str, wanted: Iterable[str], rows: Any) -> None:
    """Whether rows have the columns that are needed.

    Args:
        flag: What says which they are.
        wanted: Their names.
        rows: A dataset.

    Raises:
        ConfigError: One is not there.
    """
    for name in wanted:
        if name not in rows.column_names:
            raise ConfigError(
                f"`--{flag}` must name columns of the data ({', '.join(rows.column_names)}), but {name!r} is none of them."
            )
