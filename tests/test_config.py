import json
import re

import pytest

from hf_adaclip import CONTROLLERS, AdaptiveClipConfig, ConfigError


def test_every_problem_is_reported_at_once_with_field_rule_and_value():
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipConfig(controller="adaptiv", decay=1.5, max_pace=0.5, granularity="layer")
    text = str(caught.value)

    assert len(caught.value.problems) == 4
    assert (
        f"`controller` must be one of {', '.join(sorted(CONTROLLERS))}, but is 'adaptiv' instead. Did you mean 'adaptive'?"
        in text
    )
    assert "`decay` must be in (0, 1), but is 1.5 instead." in text
    assert "`max_pace` must be in [1, inf), but is 0.5 instead." in text
    assert "`granularity` must be one of auto, global, module, tensor, unit, element, but is 'layer' instead." in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decay", 0.0),
        ("decay", float("nan")),
        ("max_pace", float("inf")),
        ("static_threshold", 0.0),
        ("history", 9),
        ("ring_capacity", 0),
        ("accept_after", 1),
        ("near_width", 4.5),
        ("far_width", 100.0),
        ("percentile", 101.0),
        ("warmup_observations", 2.5),
        ("shadow", "yes"),
        ("ledger", 3),
        ("max_edge", 2.0),
        ("pace_trust", 0.5),
        ("pace_start", 0),
    ],
)
def test_each_field_has_a_rule(field, value):
    with pytest.raises(ConfigError, match=re.escape(f"`{field}` must be")):
        AdaptiveClipConfig(**{field: value})


def test_only_adaptive_has_a_pace():
    with pytest.raises(ConfigError, match=r"`max_pace` must be 1.0 with controller 'zscore'"):
        AdaptiveClipConfig(controller="zscore", max_pace=2.0)


@pytest.mark.parametrize("change", [{"max_pace": 2.0}, {"granularity": "tensor"}])
def test_what_deepspeed_cannot_do_is_refused(change):
    with pytest.raises(ConfigError, match=r"must be 1\.0 and `granularity` 'global' under DeepSpeed"):
        AdaptiveClipConfig(one_step_late=True, **change)


def test_json_round_trip(tmp_path):
    config = AdaptiveClipConfig(controller="zscore", z_threshold=3.5, shadow=True)
    config.to_json(tmp_path / "clip.json")

    assert AdaptiveClipConfig.from_json(tmp_path / "clip.json") == config
    assert AdaptiveClipConfig.resolve(tmp_path / "clip.json") == config
    assert AdaptiveClipConfig.resolve(str(tmp_path / "clip.json")) == config
    assert AdaptiveClipConfig.resolve(config) is config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a readable JSON file"),
        ("[]", "must be a JSON object of fields"),
        ('{"controler": "static"}', "Did you mean `controller`?"),
        ('{"decay": 7}', "`decay` must be in (0, 1)"),
    ],
)
def test_bad_json_names_the_fault(tmp_path, text, message):
    path = tmp_path / "clip.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdaptiveClipConfig.resolve(path)


@pytest.mark.parametrize("clip", ["adaptve", 3, None, "missing.json"])
def test_what_clip_may_be(clip):
    with pytest.raises(ConfigError):
        AdaptiveClipConfig.resolve(clip)


def test_fields_become_flags_of_hf_argument_parser():
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser([TrainingArguments, AdaptiveClipConfig])  # type: ignore[list-item]
    _, config = parser.parse_args_into_dataclasses(
        [
            "--output_dir",
            "x",
            "--controller",
            "zscore",
            "--shadow",
            "--static_threshold",
            "0.5",
            "--warmup_observations",
            "7",
            "--parameter_rules",
            '{"head.*": "exclude"}',
        ]
    )

    assert config == AdaptiveClipConfig(
        controller="zscore",
        shadow=True,
        static_threshold=0.5,
        warmup_observations=7,
        parameter_rules={"head.*": "exclude"},
    )
    help_text = parser.format_help()
    for name, f in AdaptiveClipConfig.__dataclass_fields__.items():
        assert f.metadata["help"], name
        assert f"--{name}" in help_text


def test_to_dict_is_json():
    assert json.loads(json.dumps(AdaptiveClipConfig().to_dict())) == AdaptiveClipConfig().to_dict()
