"""What a script needs to choose its clipping by `--clip`: arguments for `HfArgumentParser`, and the Trainer that follows from them."""

import copy
import dataclasses
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from accelerate import PartialState
from huggingface_hub.utils import disable_progress_bars as disable_hub_bars
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import ParallelMode
from transformers.utils import logging as transformers_logging

from hf_adaclip.config import AdaptiveClipConfig, run_settings
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.controllers.presets import PRESETS
from hf_adaclip.controllers.settings import Setting, keys_of, settings_of
from hf_adaclip.errors import ConfigError, LedgerError, StateError, UnsupportedSetupError
from hf_adaclip.flat import clip_names
from hf_adaclip.hints import near, near_clip, near_flag
from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
from hf_adaclip.integrations.transformers import AdaptiveClipTrainer
from hf_adaclip.reliance import require
from hf_adaclip.run.ranks import world_size
from hf_adaclip.telemetry.progress import is_terminal

STOCK: Final = ("stock", "none")


PREFIX: Final = "clip_"
"""What the flags of a run's settings begin with, so that none is one of a script's own."""


_SAID: Final = "%(default).0s"
"""Nothing, for argparse: help that has its own words for the default gets no "(default: None)" behind them."""


def _flag(s: Setting) -> tuple[str, Any, Any]:
    """The field of a setting of the run, None where its flag is not given."""
    default = "unset" if s.default is None else s.default
    metadata: dict[str, Any] = {"help": f"{s.help.replace('%', '%%')} Default: {default}.{_SAID}"}
    if s.choices:
        metadata["choices"] = list(s.choices)
    if s.kind is bool:
        metadata.update(nargs="?", const=True)
    kind = s.kind if s.kind in (bool, int, float) else str
    return PREFIX + s.name, kind | None, field(default=None, metadata=metadata)


FLAGS: Final = tuple(s for s in run_settings() if s.flag)
"""Settings of the run that have a flag; the others are set with the controller, as NAME:FIELD=VALUE."""

_Flags: Any = make_dataclass("_Flags", [("clip", str, field(default="adaptive")), *map(_flag, FLAGS)])


@dataclass
class ClipArguments(_Flags):  # type: ignore[misc]  # made of the settings of the run
    """How a script clips: a dataclass for `HfArgumentParser`, beside `TrainingArguments`. Its flags are `--clip` and `--clip_*`.

    Example:
        >>> from hf_adaclip import ClipArguments
        >>> ClipArguments("stock").resolve() is None
        True
        >>> ClipArguments("zscore:width=3", clip_shadow=True).resolve().shadow
        True
    """

    clip: str = field(
        default="adaptive",
        metadata={
            "help": "'stock': the plain Trainer with --max_grad_norm; 'none': the plain Trainer without clipping; or a controller ("
            + ", ".join(CONTROLLERS)
            + "); or a preset ("
            + "; ".join(f"{name}, {preset.use}" for name, preset in PRESETS.items())
            + "); or one of these with settings, as NAME:FIELD=VALUE,...; or the path of a config's JSON. A --clip_ flag wins over those."
        },
    )

    def resolve(self) -> AdaptiveClipConfig | None:
        """The config that the flags describe; None for the plain Trainer.

        Raises:
            ConfigError: `clip` is none of the names, and no file; or a setting is wrong.
        """
        if self.clip in STOCK:
            return None
        if self.clip.partition(":")[0] not in clip_names() and not Path(self.clip).is_file():
            raise ConfigError(
                f"`--clip` must be one of {', '.join((*STOCK, *clip_names()))}, NAME:FIELD=VALUE,..., or the path of a JSON file, but is "
                f"{self.clip!r} instead.{near_clip(self.clip, (*STOCK, *clip_names()))}"
            )
        given = {s.name: getattr(self, PREFIX + s.name) for s in FLAGS}
        config = AdaptiveClipConfig.resolve(
            self.clip if ":" in self.clip or self.clip in clip_names() else Path(self.clip)
        )
        return config.replace(**{name: value for name, value in given.items() if value is not None})


class Ingredients(NamedTuple):
    """What a script trains, with either loop.

    Attributes:
        model: The model.
        train_rows, eval_rows: Datasets.
        collate: Makes a batch of rows.
        compute_metrics: From an `EvalPrediction` to metrics, None when the loss says it all.
        add: Further metrics from those of an evaluation.
        processor: Tokenizer or None, saved with the model.
    """

    model: Any
    train_rows: Any
    eval_rows: Any
    collate: Callable[[list[Any]], Any]
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    add: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: {}
    processor: Any = None


def make_trainer(clip: ClipArguments, args: TrainingArguments, **ingredients: Any) -> Trainer:
    """The Trainer of the chosen arm. Every arm writes `convergence.jsonl`, so that they can be compared.

    Args:
        clip: Which arm, and its settings.
        args: The Trainer's arguments; `--clip none` trains with a copy whose `max_grad_norm` is 0.
        ingredients: What else the Trainer takes.

    Raises:
        UnsupportedSetupError: Several processes were launched, and each would train by itself into the same folder.

    Example:
        >>> from transformers import HfArgumentParser, TrainingArguments
        >>> from hf_adaclip import ClipArguments, make_trainer
        >>> parser = HfArgumentParser((TrainingArguments, ClipArguments))
        >>> args, clip = parser.parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", "--clip", "zscore"])
        >>> clip.resolve().controller
        'zscore'
        >>> trainer = make_trainer(clip, args, model=model, train_dataset=rows)  # doctest: +SKIP
    """
    _check_launch(args)
    chosen = clip.resolve()
    if chosen is not None:
        trainer: Trainer = AdaptiveClipTrainer(args=args, clip=chosen, **ingredients)
    else:
        if clip.clip == "none":
            args = copy.copy(args)  # the caller's object stays as it is
            args.max_grad_norm = 0.0
        trainer = Trainer(args=args, **ingredients)
    trainer.add_callback(ConvergenceCallback(args.output_dir))
    return trainer


def _check_launch(args: TrainingArguments) -> None:
    count = world_size()
    if count > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UnsupportedSetupError(
            f"`parallel_mode` must be distributed where {count} processes are launched, but is {args.parallel_mode.value}: each would "
            "train by itself into the same folder. On CPUs add `--use_cpu`."
        )


def parse_arguments(argv: Sequence[str], *kinds: type, schedule: type = TrainingArguments) -> tuple[Any, ...]:
    """Arguments from flags, or from one .json or .yaml file; logging and seed are set as they say.

    Args:
        argv: The command line without the program's name.
        kinds: The script's own dataclasses.
        schedule: Of the Trainer, or of a loop.

    Returns:
        One object of each kind, then the schedule and [`ClipArguments`].

    Raises:
        ConfigError: A flag, or a key of the file, is unknown; the message names the nearest one. Or a setting of the config is wrong.
    """
    parser = HfArgumentParser((*kinds, schedule, ClipArguments))  # type: ignore[arg-type]
    names = [f.name for kind in (*kinds, schedule, ClipArguments) for f in dataclasses.fields(kind) if f.init]
    flags = [flag for action in require(parser, "_actions") for flag in action.option_strings]
    is_file = bool(argv) and argv[0].endswith((".json", ".yaml", ".yml"))
    if is_file and len(argv) > 1:
        raise ConfigError(f"{argv[0]} must be the only argument, but {argv[1]} follows. Write that into the file.")
    if is_file:
        values = _read_settings(Path(argv[0]))
        unknown = [
            f"`{key}` in {argv[0]} is no setting of this script.{_moved(key) or near(key, names)}"
            for key in values
            if key not in names
        ]
        if unknown:
            raise ConfigError(unknown)
        parsed: tuple[Any, ...] = parser.parse_dict(values)
    else:
        *found, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
        unknown = [
            f"`{text}` is no flag of this script.{_moved(text) or near_flag(text, flags)}"
            for text in rest
            if text.startswith("-")
        ]
        if rest:
            raise ConfigError(unknown or f"{' '.join(map(repr, rest))} belongs to no flag of this script.")
        parsed = tuple(found)
    training_args, clip = parsed[-2:]
    clip.resolve()  # what is wrong there is said before anything is loaded
    if not is_terminal(sys.stderr):
        _without_bars()
        training_args.disable_tqdm = training_args.disable_tqdm or schedule is TrainingArguments
    level = training_args.get_process_log_level() if schedule is TrainingArguments else logging.INFO
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        logging.getLogger(__name__).warning("Nothing will be trained or evaluated without --do_train or --do_eval.")
    set_seed(training_args.seed)
    return parsed


def _moved(given: str) -> str:
    """A hint where somebody writes a setting of the config without what stands before it here."""
    flag = given.startswith("-")
    name = given.lstrip("-").split("=", 1)[0].replace("-", "_")
    if name in {PREFIX + s.name for s in FLAGS}:
        return ""
    if name in {s.name for s in FLAGS}:
        return f" Write `{'--' if flag else ''}{PREFIX}{name}`."
    name = name.removeprefix(PREFIX)
    owner = next((c for c, kind in CONTROLLERS.items() if name in keys_of(kind)), None)
    owner = "NAME" if name in {s.name for s in run_settings()} else owner
    if owner is None and any(name in settings_of(kind) for kind in CONTROLLERS.values()):
        owner = "NAME"  # a name that several controllers have, or another one in a file
    if owner is None:
        return ""
    return f" It is set with the controller: `{f'--clip {owner}:{name}=VALUE' if flag else f'clip: {owner}:{name}=VALUE'}`."


_EXPONENT: Final = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def _without_bars() -> None:
    """In a file bars are thousands of carriage returns. Without its own the Trainer prints its log lines, and a loop has a bar of lines."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_hub_bars()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
                """YAML 1.1 takes 3e-3, without a point, for text."""

            Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-0123456789"))
            values = yaml.load(text, Loader=Loader)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must be a readable file of settings, but is not: {error}.") from error
    except Exception as error:  # yaml has errors of its own, and need not be there for JSON
        raise ConfigError(f"{path} must be YAML, but is not: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, but holds {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`, then end what its processes share, so that no rank is torn down while another still talks to it.

    A setting that is wrong, a setup that is not supported, a checkpoint that does not fit or a required ledger that cannot be written ends
    the script with its message and exit code 2, without a traceback.

    Args:
        main: The script, with its arguments from the command line.
    """
    try:
        main()
    except (ConfigError, LedgerError, StateError, UnsupportedSetupError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    _end_process_group()


def _end_process_group() -> None:
    """Let gloo's threads drop the last collective's tensors before the interpreter goes: later they abort the process.

    A thread that asks for the interpreter's lock at its end is unwound, and C++ calls that `terminate called without an active exception`.
    DDP keeps the group, and so its threads, after `destroy_process_group` (torch 2.13; pytorch/pytorch#179291, #190489): a moment in which
    this thread holds no lock is what they need. To be removed when torch ends these threads in `destroy_process_group`.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.2)
        PartialState().destroy_process_group()


def train_and_evaluate(
    trainer: Trainer,
    *,
    train_samples: int,
    eval_samples: int,
    card: dict[str, Any],
    add: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: {},
) -> dict[str, float]:
    """What the Transformers examples do with a Trainer: train from the last checkpoint, evaluate, save all results, write the card.

    Args:
        trainer: The Trainer; `do_train`, `do_eval`, `resume_from_checkpoint` and `push_to_hub` of its arguments are followed.
        train_samples, eval_samples: Rows, for the record.
        card: What `create_model_card` takes.
        add: Further metrics from those of an evaluation.

    Returns:
        All results, as in `all_results.json`.
    """
    args = trainer.args
    results: dict[str, float] = {}
    if args.do_train:
        output = Path(args.output_dir or ".")
        found = get_last_checkpoint(str(output)) if output.is_dir() else None  # type: ignore[no-untyped-call]
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or found)
        trainer.save_model()
        trainer.log_metrics("train", trained.metrics)
        metrics = {**trained.metrics, "train_samples": train_samples}
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        results.update(metrics)
    if args.do_eval:
        metrics = trainer.evaluate()
        metrics = {**metrics, **add(metrics), "eval_samples": eval_samples}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results.update(metrics)
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return results
