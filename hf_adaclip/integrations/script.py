"""What a script needs to choose its clipping by `--clip`: arguments for `HfArgumentParser`, and the Trainer that follows from them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transformers import Trainer, TrainingArguments

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.convergence.callback import ConvergenceCallback
from hf_adaclip.errors import ConfigError
from hf_adaclip.integrations.trainer import AdaptiveClipTrainer

STOCK: Final = ("stock", "none")


@dataclass
class ClipArguments:
    """Which arm a script runs."""

    clip: str = field(
        default="adaptive",
        metadata={
            "help": "'stock': the plain Trainer with --max_grad_norm; 'none': the plain Trainer without clipping; or a controller ("
            + ", ".join(CONTROLLERS)
            + "), set further by the flags of AdaptiveClipConfig; or the path of a config's JSON."
        },
    )

    def resolve(self, config: AdaptiveClipConfig) -> AdaptiveClipConfig | None:
        """The config that the flags describe; None for the plain Trainer.

        Args:
            config: What the other flags have filled in.

        Raises:
            ConfigError: `clip` is none of the names, and no file.
        """
        if self.clip in STOCK:
            return None
        if self.clip in CONTROLLERS:
            return config.replace(controller=self.clip)
        if not Path(self.clip).is_file():
            raise ConfigError(
                f"`--clip` must be one of {', '.join((*STOCK, *CONTROLLERS))}, or the path of a JSON file, but is {self.clip!r} instead."
            )
        return AdaptiveClipConfig.from_json(self.clip)


def make_trainer(
    clip: ClipArguments, config: AdaptiveClipConfig, args: TrainingArguments, **ingredients: Any
) -> Trainer:
    """The Trainer of the chosen arm. Every arm writes `convergence.jsonl`, so that they can be compared.

    Args:
        clip: Which arm.
        config: What the flags of the config have filled in.
        args: The Trainer's arguments; `--clip none` sets `max_grad_norm` to 0.
        ingredients: What else the Trainer takes.
    """
    chosen = clip.resolve(config)
    if chosen is not None:
        return AdaptiveClipTrainer(args=args, clip=chosen, **ingredients)
    if clip.clip == "none":
        args.max_grad_norm = 0.0
    trainer = Trainer(args=args, **ingredients)
    trainer.add_callback(ConvergenceCallback(args.output_dir))
    return trainer
