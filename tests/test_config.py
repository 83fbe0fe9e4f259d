import dataclasses
import json
import re

import pytest

import hf_adaclip
from hf_adaclip import CONTROLLERS, Adaptive, AdaptiveClipConfig, ConfigError, LogZScore, Median, ZScore
from hf_adaclip.controllers.settings import settings_of


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
    with pytest.raises(ConfigError, match=r"`max_pace` must be left at None with controller 'zscore'"):
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


def test_every_setting_of_the_wrong_type_is_named():
    names = list(AdaptiveClipConfig().to_dict())
    with pytest.raises(ConfigError) as caught:
        AdaptiveClipConfig(**{**dict.fromkeys(names, object()), "controller": "adaptive"})
    assert [p.split("`")[1] for p in caught.value.problems] == names[1:]
    with pytest.raises(ConfigError, match="`controller` must be a string"):
        AdaptiveClipConfig(controller=object())


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_setting_has_help_and_a_default_that_keeps_its_own_rule(name):
    kind = CONTROLLERS[name]
    known = settings_of(kind)
    assert list(known) == [f.name for f in dataclasses.fields(kind)], "each field is a setting"
    for field in dataclasses.fields(kind):
        setting = known[field.name]
        assert field.metadata["help"].endswith("."), field.name
        assert setting.problem(field.default) is None, field.name
        assert setting.optional == (field.default is None), field.name
        assert setting.kind is bool or setting.range, field.name
        assert setting.problem(object()) is not None, field.name


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
    assert (head.controller, head.settings) == ("median", Median(factor=4.0))
    assert (body.controller, body.settings) == ("adaptive", Adaptive(max_near=0.3))
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
        lambda: AdaptiveClipConfig(max_pase=3),
        lambda: AdaptiveClipConfig().replace(max_pase=3),
        lambda: AdaptiveClipConfig.from_dict({"max_pase": 3}),
        lambda: AdaptiveClipConfig.resolve({"max_pase": 3}),
    ):
        with pytest.raises(ConfigError, match=r"`max_pase` must be a field .* Did you mean `max_pace`\?"):
            make()


def test_a_setting_under_two_names_is_told_as_such():
    with pytest.raises(ConfigError, match=r"`width` must be given once, but is given as `z_threshold` too") as caught:
        AdaptiveClipConfig(controller="zscore", z_threshold=3.0, width=2.0)
    assert "no such setting" not in str(caught.value)


def test_a_class_in_place_of_an_object_gets_a_hint():
    with pytest.raises(ConfigError, match=r"is the class ZScoreController instead. Write ZScoreController\(\)\."):
        AdaptiveClipConfig.resolve(CONTROLLERS["zscore"])


def test_words_of_python_are_read_in_text():
    config = AdaptiveClipConfig.resolve("static:shadow=True,self_test=False,ledger=None")
    assert (config.shadow, config.self_test, config.ledger) == (True, False, None)


@pytest.mark.parametrize(
    ("controller", "key", "name", "value"),
    [
        ("zscore", "z_threshold", "width", 3.0),
        ("percentile", "percentile_capped", "capped", True),
        ("ema_ratio", "ema_factor", "factor", 1.5),
        ("ema_ratio", "ema_decay", "decay", 0.5),
        ("median", "median_window", "window", 50),
        ("quantile", "quantile_rate", "rate", 0.1),
        ("log_zscore", "log_decay", "decay", 0.9),
        ("mean_sd", "sd_width", "width", 3.0),
        ("weight_ratio", "weight_ratio", "ratio", 0.1),
        ("second_moment", "moment_width", "width", 2.0),
        ("adaptive", "max_pace", "max_pace", 8.0),
    ],
)
def test_a_controller_can_be_given_by_name_key_text_or_as_an_object(controller, key, name, value):
    made = CONTROLLERS[controller](**{name: value})
    want = AdaptiveClipConfig(controller=made)

    assert (want.controller, want.settings, getattr(want, key), getattr(want, name)) == (
        controller,
        made,
        value,
        value,
    )
    for clip in (
        made,
        f"{controller}:{name}={json.dumps(value)}",
        f"{controller}:{key}={json.dumps(value)}",
        {"controller": controller, name: value},
        {"controller": controller, key: value},
        want,
        want.to_dict(),
    ):
        assert AdaptiveClipConfig.resolve(clip) == want, clip
    assert AdaptiveClipConfig(controller=controller).replace(**{name: value}) == want
    assert AdaptiveClipConfig(controller=controller).replace(controller=made) == want
    assert AdaptiveClipConfig(controller=made, **{key: value}) == want
    assert want.to_dict()[key] == value


def test_short_names_are_those_of_the_classes():
    assert type(ZScore(width=3)) is CONTROLLERS["zscore"]
    assert {getattr(hf_adaclip, kind.__name__.removesuffix("Controller")) for kind in CONTROLLERS.values()} == set(
        CONTROLLERS.values()
    )


def test_a_controller_reports_all_its_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        Adaptive(decay="a lot", max_pace=0.5, near_width=9.0, warmup_observations=True, pace_start="soon")
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for piece in (
        "`decay` must be a number, but is 'a lot'",
        "`max_pace` must be in [1, inf), but is 0.5",
        "`near_width` must be below",
        "`warmup_observations` must be a whole number, but is True",
        "`pace_start` must be a whole number or None, but is 'soon'",
    ):
        assert piece in text
    for make, hint in (
        (lambda: ZScore(widht=3), r"setting of ZScoreController .* Did you mean `width`\?"),
        (lambda: ZScore(z_threshold=3), "It is `width` here"),
        (lambda: dataclasses.replace(ZScore(), width=0.0), r"`width` must be in \(0, inf\)"),
        (
            lambda: AdaptiveClipConfig(controller=ZScore),
            r"is the class ZScoreController instead. Write ZScoreController\(\)",
        ),
        (lambda: AdaptiveClipConfig(factor=3.0), "belongs to controller 'ema_ratio' and 'median'"),
        (
            lambda: AdaptiveClipConfig(controller=ZScore(), factor=3.0),
            "belongs to controller 'ema_ratio' and 'median'",
        ),
        (lambda: AdaptiveClipConfig(controller=ZScore(), median_factor=3.0), "belongs to controller 'median'"),
    ):
        with pytest.raises(ConfigError, match=hint):
            make()


def test_another_controller_takes_over_what_both_have_and_nothing_is_lost_silently():
    config = AdaptiveClipConfig(controller=ZScore(decay=0.9), shadow=True)
    assert config.replace(controller="adaptive") == AdaptiveClipConfig(decay=0.9, shadow=True)
    assert config.replace(controller="adaptive", decay=0.8) == AdaptiveClipConfig(decay=0.8, shadow=True)
    with pytest.raises(ConfigError, match=r"`decay` must be left at 0\.97 with controller 'log_zscore'"):
        config.replace(controller="log_zscore")
    assert AdaptiveClipConfig(controller=ZScore()).replace(controller="log_zscore").settings == LogZScore()
    with pytest.raises(ConfigError, match="belongs to controller 'median'"):
        AdaptiveClipConfig(controller="median", median_factor=3.0).replace(controller="zscore")


def test_rules_take_controllers_as_objects():
    config = AdaptiveClipConfig(
        max_pace=4.0, parameter_rules={"head.*": Adaptive(max_near=0.3), "*.bias": "exclude"}, warmup_observations=9
    )
    assert AdaptiveClipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    head = config.for_pattern("head.*")
    assert head is not None
    assert head.settings == Adaptive(max_near=0.3, max_pace=4.0)
    with pytest.raises(ConfigError, match="and only 'adaptive' changes it"):
        config.replace(parameter_rules={"head.*": Median()})


# What the version before this wrote into every JSON file, ledger and checkpoint.
BEFORE = json.loads(
    """{"warmup_observations": 50, "decay": 0.97, "far_width": 5.0, "near_width": 1.5, "min_far_width": 4.5,
"max_far_width": 8.0, "widen_step": 0.01, "narrow_factor": 0.8, "accept_after": 6, "min_spread": 0.05,
"max_edge": 1.3, "max_near": 0.2, "ceiling_share": 0.5, "pace_start": null, "pace_trust": 3.0, "pace_hold":
0.3333333333333333, "pace_growth": 1.1, "pace_shrink": 0.95, "z_threshold": 2.5, "percentile": 10.0, "history":
1000, "percentile_capped": false, "weight_ratio": 0.01, "weight_floor": 0.001, "moment_width": 3.0,
"ema_factor": 1.05, "ema_decay": 0.98, "median_factor": 2.0, "median_window": 100, "quantile": 0.99,
"quantile_rate": 0.05, "log_width": 4.0, "log_decay": 0.995, "sd_width": 6.0, "sd_window": 128, "controller":
"adaptive", "granularity": "auto", "static_threshold": null, "shadow": false, "max_pace": 1.0,
"max_consecutive_nonfinite": 50, "ledger": "auto", "ledger_required": false, "self_test": true, "fold": "auto",
"nan_filter_on_device": false, "one_step_late": false, "ring_capacity": 256, "freeze_after": null,
"min_threshold": null, "max_threshold": null, "max_widening_step": null, "max_widening_100": null,
"max_skipped": null, "divergence_spreads": 0.0, "divergence_steps": 50, "on_trouble": "continue", "on_spike":
"auto", "parameter_rules": null}"""
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"controller": "zscore", "z_threshold": 3.0, "pace_start": 12, "warmup_observations": 9},
        {"controller": "zscore", "granularity": "tensor", "ceiling_share": 1.0},
        {"controller": "log_zscore", "log_decay": 0.9},
        {"controller": "ema_ratio", "ema_decay": 0.9, "granularity": "tensor", "ceiling_share": 1.0},
        {"controller": "static", "warmup_observations": 10, "pace_start": 5, "static_threshold": "inf"},
        {"max_pace": 64.0, "decay": 0.9},
        {"controller": "static", "median_factor": 3.0, "parameter_rules": {"head.*": "median", "*": "exclude"}},
    ],
    ids=lambda c: "-".join(map(str, c)) or "defaults",
)
def test_files_of_the_version_before_still_load(changes, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**BEFORE, **changes}))
    config = AdaptiveClipConfig.from_json(path)

    # A file says all settings of its time, other defaults among them; those of other controllers mean nothing.
    was = {} if "controller" in changes else {"max_pace": 1.0, "pace_growth": 1.1}
    assert config == AdaptiveClipConfig(**{**was, **changes})
    written = config.to_dict()
    rules = changes.get("parameter_rules")
    assert all(written[key] == value for key, value in changes.items() if key in written and not rules)
    # and the version before knows every key that this one writes, but for what is new
    since = {
        "spectral_width",
        "spectral_every",
        "spectral_memory",
        "agreement",
        "incidents",
        "snapshot_steps",
        "max_rewinds",
    }
    assert {key for key in set(written) - set(BEFORE) if not key.startswith("incident_")} == since
    if rules:
        head = config.for_pattern("head.*")
        assert head is not None
        assert head.settings == Median(factor=3.0)


def test_a_preset_is_a_name_for_settings(tmp_path):
    from hf_adaclip.controllers.presets import PRESETS

    preset = AdaptiveClipConfig.resolve("rl")
    assert preset == AdaptiveClipConfig.resolve("rl:") == AdaptiveClipConfig.from_dict(PRESETS["rl"].fields)
    assert (preset.controller, preset.on_spike, preset.to_dict()["accept_after"]) == ("adaptive", "skip", 30)
    changed = AdaptiveClipConfig.resolve("rl:accept_after=60,on_spike=clip,static_threshold=0.2")
    assert changed == preset.replace(accept_after=60, on_spike="clip", static_threshold=0.2)
    preset.to_json(tmp_path / "rl.json")
    assert AdaptiveClipConfig.resolve(tmp_path / "rl.json") == preset
    assert not set(PRESETS) & set(CONTROLLERS)
    for wrong, said in {
        "rl:nonsense=1": "`nonsense` must be a field",
        "rl:accept_after": "but is 'rl:accept_after' instead",
        "rl:controller=static": "each field once",
        "grpo": "a preset (",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            AdaptiveClipConfig.resolve(wrong)
