"""What a script makes of its command line: flags, files, and what was mistyped."""

import json
import re

import pytest

from hf_adaclip import AdaptiveClipConfig, ConfigError
from hf_adaclip.integrations.script_args import ClipArguments, parse_arguments, run_script


def parse(*argv):
    *_, clip, config = parse_arguments(["--output_dir", "x", *argv])
    return clip.resolve(config)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--max_pase", "3"], "`--max_pase` is no flag of this script. Did you mean `--max_pace`?"),
        (["--max_pase=3"], "Did you mean `--max_pace`?"),
        (["--z-treshold", "3"], "Did you mean `--z-threshold`?"),
        (["--lerning_rate", "3"], "Did you mean `--learning_rate`?"),
        (["--clip", "zclip"], "zclip is here 'zscore'"),
        (["--clip", "adaptve"], "Did you mean 'adaptive'?"),
        (["--clip", "zscore", "--median_factor", "3"], "it belongs to controller 'median'"),
        (["--median_factor", "3"], "it belongs to controller 'median'"),
        (["--clip", "median", "--controller", "zscore"], "must name the same controller"),
        (["stray"], "'stray' belongs to no flag"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_hint(argv, hint):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        parse(*argv)


def test_flags_say_which_controller_and_how_it_is_set():
    assert parse("--clip", "stock") is None
    assert parse("--clip", "median", "--median_factor", "3") == AdaptiveClipConfig(
        controller="median", median_factor=3.0
    )
    assert parse("--controller", "median", "--median_factor", "3") == parse("--clip", "median", "--median_factor", "3")
    assert parse("--max_pace", "4") == AdaptiveClipConfig(max_pace=4.0)


def test_a_file_and_flags_beside_it_do_not_mix(tmp_path):
    path = tmp_path / "c.json"
    AdaptiveClipConfig(controller="zscore", z_threshold=3.0).to_json(path)

    assert parse("--clip", str(path)) == AdaptiveClipConfig(controller="zscore", z_threshold=3.0)
    with pytest.raises(ConfigError, match="`--shadow` must be left out with `--clip"):
        parse("--clip", str(path), "--shadow")


@pytest.mark.parametrize("name", ["s.json", "s.yaml"])
def test_a_file_of_flags(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps({"output_dir": "x", "clip": "median", "median_factor": 3.0}))
    *_, clip, config = parse_arguments([str(path)])
    assert clip.resolve(config) == AdaptiveClipConfig(controller="median", median_factor=3.0)

    path.write_text(json.dumps({"output_dir": "x", "max_pase": 3.0}))
    with pytest.raises(ConfigError, match=r"`max_pase` in .* Did you mean `max_pace`"):
        parse_arguments([str(path)])
    path.write_text("[1")
    with pytest.raises(ConfigError, match="must be"):
        parse_arguments([str(path)])
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold settings by name"):
        parse_arguments([str(path)])


def test_a_wrong_setting_ends_a_script_without_a_traceback(capsys):
    def main():
        ClipArguments("zclip").resolve(AdaptiveClipConfig())

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert "zclip is here" in capsys.readouterr().err
