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


@pytest.mark.parametrize(
    "clip", ["adaptve", 3, None, "missing.json", {"max_pase": 2.0}, {"controller": "zclip"}, [("a", 1)]]
)
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


def test_types_and_ranges_and_pairs_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipConfig(
            decay="a lot",
            max_pace=0.5,
            near_width=9.0,
            min_threshold=2.0,
            max_threshold=1.0,
            shadow=1,
            fold="nevr",
            on_trouble="stop",
        )
    text = str(caught.value)

    assert len(caught.value.problems) == 7
    for piece in (
        "`decay` must be a number",
        "`max_pace` must be in [1, inf)",
        "`near_width` must be below",
        "`on_trouble`",
    ):
        assert piece in text
    assert "`min_threshold` must be at most `max_threshold`" in text
    assert "`shadow` must be True or False" in text
    assert "but is 'nevr' instead. Did you mean 'never'?" in text


def test_every_field_of_the_wrong_type_is_named():
    fields = AdaptiveClipConfig.__dataclass_fields__
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipConfig(**dict.fromkeys(fields, object()))

    assert [p.split("`")[1] for p in caught.value.problems] == list(fields)


@pytest.mark.parametrize(
    ("controller", "field", "value", "owners"),
    [
        ("zscore", "median_factor", 9.0, "'median'"),
        ("adaptive", "median_factor", 9.0, "'median'"),
        ("static", "decay", 0.5, "'adaptive' and 'zscore'"),
        ("percentile", "ceiling_share", 0.3, "'adaptive'"),
        ("median", "pace_trust", 5.0, "'adaptive'"),
        ("weight_ratio", "moment_width", 5.0, "'second_moment'"),
    ],
)
def test_a_setting_of_another_controller_is_refused(tmp_path, controller, field, value, owners):
    values = {"controller": controller, field: value}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    whole = {**AdaptiveClipConfig(controller=controller).to_dict(), field: value}
    for make in (
        lambda: AdaptiveClipConfig(**values),
        lambda: AdaptiveClipConfig.from_dict(values),
        lambda: AdaptiveClipConfig.from_dict(whole),
        lambda: AdaptiveClipConfig.resolve(values),
        lambda: AdaptiveClipConfig.resolve(path),
        lambda: AdaptiveClipConfig(controller=controller).replace(**{field: value}),
        lambda: AdaptiveClipConfig.resolve(AdaptiveClipConfig(**whole)),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"`{field}` must be left at")) as caught:
            make()
        assert f"it belongs to controller {owners}" in str(caught.value)


def test_settings_of_the_controllers_in_rules_are_taken():
    config = AdaptiveClipConfig(
        controller="zscore",
        z_threshold=3.0,
        median_factor=4.0,
        parameter_rules={"head.*": "median", "body.*": {"controller": "adaptive", "max_near": 0.3}, "*": "exclude"},
    )
    head, body = config.for_pattern("head.*"), config.for_pattern("body.*")

    assert head is not None
    assert body is not None
    assert (head.controller, head.median_factor, head.z_threshold) == ("median", 4.0, 2.5)
    assert (body.controller, body.max_near, body.median_factor) == ("adaptive", 0.3, 2.0)
    with pytest.raises(ConfigError, match="belongs to controller 'quantile'"):
        AdaptiveClipConfig(parameter_rules={"head.*": {"controller": "median", "quantile": 0.5}})


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_config_can_be_had_again_in_every_way(name, tmp_path):
    import copy
    import pickle

    config = AdaptiveClipConfig(controller=name, warmup_observations=9, pace_start=7, ceiling_share=1.0).resolved()
    config.to_json(tmp_path / "c.json")
    for again in (
        AdaptiveClipConfig.from_dict(config.to_dict()),
        AdaptiveClipConfig.from_json(tmp_path / "c.json"),
        AdaptiveClipConfig.resolve(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        config.replace(shadow=False),
        config.resolved(),
    ):
        assert again == config


@pytest.mark.parametrize(
    ("clip", "hint"),
    [
        ("zclip", "zclip is here 'zscore'"),
        ("ZClip", "ZClip is here 'zscore'"),
        ("AutoClip", "AutoClip is here 'percentile'"),
        ("adagc", "adagc is here 'ema_ratio'"),
        ("AGC", "AGC is here 'weight_ratio'"),
        ("OLMo-core", "OLMo-core is here 'mean_sd'"),
        ("z_score", "Did you mean 'zscore'?"),
        ("Adaptive", "Did you mean 'adaptive'?"),
        ("z-scor", "Did you mean 'zscore'?"),
    ],
)
def test_names_from_elsewhere_and_near_names_get_a_hint(clip, hint):
    for make in (
        lambda: AdaptiveClipConfig.resolve(clip),
        lambda: AdaptiveClipConfig(controller=clip),
        lambda: AdaptiveClipConfig(parameter_rules={"*": clip}),
        lambda: AdaptiveClipConfig(parameter_rules={"*": {"controller": clip}}),
    ):
        with pytest.raises(ConfigError, match=re.escape(hint)):
            make()


def test_every_name_from_elsewhere_leads_to_something_that_is_here():
    from hf_adaclip.hints import OTHER_NAMES

    for name, hint in OTHER_NAMES.items():
        assert re.findall(r"'(\w+)'", hint)[0] in CONTROLLERS, name
        assert name not in CONTROLLERS
        for way in re.findall(r"AdaptiveClipConfig\.(\w+)", hint):
            assert hasattr(AdaptiveClipConfig, way)


def test_an_unknown_keyword_is_refused_with_the_nearest_field():
    for make in (
        lambda: AdaptiveClipConfig(max_pase=3),  # type: ignore[call-arg]
        lambda: AdaptiveClipConfig().replace(max_pase=3),
        lambda: AdaptiveClipConfig.from_dict({"max_pase": 3}),
        lambda: AdaptiveClipConfig.resolve({"max_pase": 3}),
    ):
        with pytest.raises(ConfigError, match=r"`max_pase` must be a field .* Did you mean `max_pace`\?"):
            make()


def test_a_parser_may_be_followed_by_a_flag_that_names_the_controller():
    from transformers import HfArgumentParser

    (config,) = HfArgumentParser(AdaptiveClipConfig).parse_args_into_dataclasses(["--median_factor", "3"])
    chosen = AdaptiveClipConfig.from_dict({**config.to_dict(), "controller": "median"})

    assert chosen.median_factor == 3
    assert config.replace(shadow=True).shadow
    with pytest.raises(ConfigError, match="belongs to controller 'median'"):
        AdaptiveClipConfig.resolve(config)
    with pytest.raises(ConfigError, match="belongs to controller 'median'"):
        config.replace(controller="zscore")
