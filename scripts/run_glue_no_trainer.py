"""`run_glue.py` without a Trainer: an Accelerate loop, with the clipping that `--clip` chooses.

    accelerate launch scripts/run_glue_no_trainer.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --output_dir out --do_train --do_eval --clip adaptive

The loop itself is `hf_adaclip/integrations/loop.py`: data, model and their flags are those of `run_glue.py`, the schedule's flags have the
names of `TrainingArguments`. As there, the arguments may stand in one .json or .yaml file, and files and a config will do without a hub.
"""

import sys

# Python puts the folder of a script first in its path, so that it finds its neighbour from anywhere.
from run_glue import DataArguments, ModelArguments, prepare

from hf_adaclip.integrations.loop import run_loop
from hf_adaclip.integrations.loop_arguments import LoopArguments, make_accelerator
from hf_adaclip.integrations.script_args import parse_arguments, run_script


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say; returns all results."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, loop_args, clip_args = parse_arguments(
        argv, ModelArguments, DataArguments, schedule=LoopArguments
    )
    accelerator = make_accelerator(loop_args)
    parts = prepare(model_args, data_args, accelerator.main_process_first())
    return run_loop(accelerator, loop_args, clip_args, parts)


if __name__ == "__main__":
    run_script(main)
