"""What a script makes of its command line: flags, files, and what was mistyped."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_adaclip import AdaptiveClipConfig, ConfigError, UnsupportedSetupError
from hf_adaclip.config import run_settings
from hf_adaclip.integrations.script_args import ClipArguments, make_trainer, parse_arguments, run_script


def parse(*argv):
    *_, clip = parse_arguments(["--output_dir", "x", *argv])
    return clip.resolve()


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--clip_shadw"], "`--clip_shadw` is no flag of this script. Did you mean `--clip_shadow`?"),
        (["--clip-max-skiped=3"], "Did you mean `--clip-max-skipped`?"),
        (["--lerning_rate", "3"], "Did you mean `--learning_rate`?"),
        (["--shadow"], "`--shadow` is no flag of this script. Write `--clip_shadow`."),
        (["--max_pace", "3"], "It is set with the controller: `--clip adaptive:max_pace=VALUE`."),
        (["--z-threshold=3"], "It is set with the controller: `--clip zscore:z_threshold=VALUE`."),
        (["--clip_max_pace", "3"], "It is set with the controller: `--clip adaptive:max_pace=VALUE`."),
        (["--clip_width", "3"], "It is set with the controller: `--clip NAME:width=VALUE`."),
        (["--fold", "never"], "It is set with the controller: `--clip NAME:fold=VALUE`."),
        (["--clip", "zclip"], "zclip is here 'zscore'"),
        (["--clip", "adaptve"], "Did you mean 'adaptive'?"),
        (["--clip", "zscore:median_factor=3"], "it belongs to controller 'median'"),
        (["--clip", "zscore:factor=3"], "it belongs to controller 'ema_ratio' and 'median'"),
        (["--clip", "zscore:widht=3"], "Did you mean `width`?"),
        (["--clip_max_skipped", "-1", "--clip_min_threshold", "-1"], "`min_threshold` must be in (0, inf)"),
        (["stray"], "'stray' belongs to no flag"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_hint(argv, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        parse(*argv)


def test_flags_say_which_controller_and_how_it_is_set():
    assert parse("--clip", "stock") is None
    assert parse("--clip", "median:factor=3") == AdaptiveClipConfig(controller="median", median_factor=3.0)
    assert parse("--clip", "adaptive:max_pace=4,shadow=true") == AdaptiveClipConfig(max_pace=4.0, shadow=True)
    rules = '{"head.*": "exclude"}'
    assert parse("--clip_shadow", "--clip_self_test", "no", "--clip_parameter_rules", rules) == AdaptiveClipConfig(
        shadow=True, self_test=False, parameter_rules=json.loads(rules)
    )


def test_a_preset_is_in_the_help_and_takes_flags():
    from hf_adaclip.integrations.launch import portable

    assert "rl, for policies, such as by GRPO" in ClipArguments.__dataclass_fields__["clip"].metadata["help"]
    assert ClipArguments("rl").resolve() == AdaptiveClipConfig.resolve("rl")
    assert ClipArguments("rl:accept_after=40", clip_max_threshold=2.0).resolve() == AdaptiveClipConfig.resolve(
        "rl:accept_after=40,max_threshold=2.0"
    )
    assert portable("rl") == "rl"


def test_a_flag_wins_over_text_and_file(tmp_path):
    path = tmp_path / "c.json"
    config = AdaptiveClipConfig(controller="zscore", z_threshold=3.0, shadow=True)
    config.to_json(path)

    assert parse("--clip", str(path)) == config
    assert parse("--clip", str(path), "--clip_shadow", "no") == config.replace(shadow=False)
    assert parse("--clip", "zscore:width=3,shadow=true", "--clip_shadow", "no") == config.replace(shadow=False)


def test_flags_of_a_run_have_a_name_of_their_own_and_the_help_of_their_setting():
    """A user's own dataclass may have any field that is not called clip."""

    @dataclasses.dataclass
    class Mine:
        fold: int = 3
        history: str = "h"
        decay: float = 0.1
        shadow: bool = False
        max_pace: float = 2.0
        ledger: str | None = None

    parser = HfArgumentParser((Mine, TrainingArguments, ClipArguments))
    mine, _, clip = parser.parse_args_into_dataclasses(["--output_dir", "x", "--fold", "7", "--decay", "0.5"])
    assert (mine.fold, mine.decay) == (7, 0.5)
    assert clip.resolve() == AdaptiveClipConfig()

    names = [f.name for f in dataclasses.fields(ClipArguments)]
    assert names[0] == "clip"
    assert all(name.startswith("clip_") for name in names[1:])
    assert 10 <= len(names) <= 15
    known = {f"clip_{s.name}": s for s in run_settings() if s.flag}
    assert names[1:] == list(known)
    helps = {a.dest: a.help for a in parser._actions}
    for name, setting in known.items():
        assert setting.help in helps[name], name
        assert f"--{name}" in parser.format_help()
        assert f"Default: {'unset' if setting.default is None else setting.default}." in helps[name]
    ours = parser.format_help().partition("--clip_granularity")[2].partition("--clip_granularity")[2]
    assert ours
    assert "(default: None)" not in " ".join(ours.split())


@pytest.mark.parametrize("name", ["s.json", "s.yaml"])
def test_a_file_of_flags(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps({"output_dir": "x", "clip": "median:factor=3", "clip_shadow": True}))
    *_, clip = parse_arguments([str(path)])
    assert clip.resolve() == AdaptiveClipConfig(controller="median", median_factor=3.0, shadow=True)

    path.write_text(json.dumps({"output_dir": "x", "clip_shadw": True}))
    with pytest.raises(ConfigError, match=r"`clip_shadw` in .* Did you mean `clip_shadow`"):
        parse_arguments([str(path)])
    path.write_text(json.dumps({"output_dir": "x", "median_factor": 3.0, "shadow": True}))
    with pytest.raises(ConfigError, match=r"`clip: median:median_factor=VALUE`.*\n.*Write `clip_shadow`"):
        parse_arguments([str(path)])
    with pytest.raises(ConfigError, match=r"must be the only argument, but --max_steps follows"):
        parse_arguments([str(path), "--max_steps", "3"])
    path.write_text("[1")
    with pytest.raises(ConfigError, match="must be"):
        parse_arguments([str(path)])
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold settings by name"):
        parse_arguments([str(path)])


def test_a_learning_rate_in_yaml_may_be_written_without_a_point(tmp_path, caplog):
    path = tmp_path / "s.yaml"
    path.write_text("output_dir: x\nlearning_rate: 3e-3\nadam_epsilon: 1.5E-8\nrun_name: '3e-3'\n")
    args, _ = parse_arguments([str(path)])

    assert (args.learning_rate, args.adam_epsilon, args.run_name) == (3e-3, 1.5e-8, "3e-3")
    assert "without --do_train or --do_eval" in caplog.text


def test_a_wrong_setting_ends_a_script_without_a_traceback(capsys):
    def main():
        ClipArguments("zclip").resolve()

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert "zclip is here" in capsys.readouterr().err


def test_processes_that_would_each_train_by_themselves_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedSetupError, match=r"2 processes .* add `--use_cpu`"):
        make_trainer(ClipArguments(), args, model=torch.nn.Linear(2, 2))
