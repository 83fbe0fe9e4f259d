"""What identifies a run of a script: its flags, its files, and the defaults that it goes by."""

import sys
import time
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_adaclip.compare.runs import (
    CAME_LATER,
    PACE_ONLY,
    RESULT_FILE,
    ScriptRun,
    defaults_behind,
    finished_result,
    run_scripts,
)
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.settings import setting

ALL = AdaptiveClipConfig().to_dict()


@dataclass(frozen=True)
class OtherAdaptive(AdaptiveController):
    ceiling_share: float = setting(0.7, help="Another default.", range="[0, 1]")


@pytest.mark.parametrize(
    ("flags", "decides", "not_read"),
    [
        (["--clip", "stock"], [], list(ALL)),
        (["--clip", "adaptive", "--clip=none"], [], ["decay"]),
        (["--clip", "zscore"], ["z_threshold", "max_threshold"], ["ceiling_share", "history"]),
        (["--clip", "stock", "--clip=adaptive"], ["ceiling_share", "max_pace"], ["z_threshold"]),
        (["--clip", "zscore:width=3"], ["z_threshold", "max_threshold"], ["ceiling_share", "history"]),
        (["--clip", "adaptive", "--clip-parameter-rules", '{"*": "zscore"}'], list(CONTROLLERS), []),
        (["--clip", "settings.json"], list(CONTROLLERS), []),
        ([], list(CONTROLLERS), []),
    ],
)
def test_a_run_goes_by_these_defaults(flags, decides, not_read):
    found = defaults_behind(["train.py", *flags])
    assert set(decides) <= set(found)
    assert not set(not_read) & set(found)


def test_the_digest_is_of_what_decides(tmp_path, monkeypatch):
    def digests():
        return {
            clip: ScriptRun("t", "a", 0, (), ("train.py",), ("--clip", clip)).digest
            for clip in ("stock", "zscore", "adaptive", str(tmp_path / "clip.json"))
        }

    AdaptiveClipConfig(decay=0.9).to_json(tmp_path / "clip.json")
    before = digests()
    monkeypatch.setitem(CONTROLLERS, "adaptive", OtherAdaptive)
    after = digests()
    assert {clip for clip in before if before[clip] != after[clip]} == {"adaptive", str(tmp_path / "clip.json")}
    AdaptiveClipConfig(decay=0.8).to_json(tmp_path / "clip.json")
    assert after != digests(), "the file counts, not only its name"


@dataclass(frozen=True)
class Paced(AdaptiveController):
    max_pace: float = setting(8.0, help="Another default.", range="[1, inf)")
    pace_trust: float = setting(2.0, help="Another default.", range="[1, inf)")


@dataclass(frozen=True)
class Later(AdaptiveController):
    revision: ClassVar[int] = AdaptiveController.revision + 1


GUARD, PACE = "adaptive:max_pace=1,spectral_width=None,agreement=false", "adaptive:max_pace=64,agreement=false"
RANGED, AGREED = "adaptive:max_pace=1,spectral_width=0", "adaptive:max_pace=1,agreement=true"


def changed(monkeypatch, *changes):
    """Which of some clips are other runs after a change."""
    clips = ("stock", "adaptive", GUARD, PACE, RANGED, AGREED, "adaptive:spectral_width=inf", "zscore")
    before = {clip: defaults_behind(["train.py", "--clip", clip]) for clip in clips}
    with monkeypatch.context() as patch:
        for change in changes:
            change(patch)
        return {clip for clip in clips if defaults_behind(["train.py", "--clip", clip]) != before[clip]}


def test_what_a_run_says_itself_or_has_switched_off_is_no_default_of_it(monkeypatch):
    def paced(patch):
        patch.setitem(CONTROLLERS, "adaptive", Paced)

    assert changed(monkeypatch, paced) == {"adaptive", PACE, "adaptive:spectral_width=inf"}


def test_a_part_that_changes_makes_other_runs_of_those_that_have_it(monkeypatch):
    def spectral(patch):
        patch.setattr("hf_adaclip.gradients.spectral.REVISION", 9)

    def agreement(patch):
        patch.setattr("hf_adaclip.gradients.agreement.REVISION", 9)

    def reach(patch):
        patch.setattr("hf_adaclip.gradients.distance.REVISION", 9)

    assert changed(monkeypatch, reach) == {"adaptive", PACE}
    assert changed(monkeypatch, spectral) == {"adaptive", PACE, RANGED, AGREED}
    assert changed(monkeypatch, agreement) == {"adaptive", RANGED, AGREED, "adaptive:spectral_width=inf"}


def test_a_revision_of_the_pace_alone_leaves_runs_without_it(monkeypatch):
    def later(patch):
        patch.setitem(CONTROLLERS, "adaptive", Later)

    def only_the_pace(patch):
        patch.setattr("hf_adaclip.compare.runs.PACE_ONLY", PACE_ONLY | {Later.revision})

    assert changed(monkeypatch, later) == {"adaptive", GUARD, PACE, RANGED, AGREED, "adaptive:spectral_width=inf"}
    assert changed(monkeypatch, later, only_the_pace) == {"adaptive", PACE, "adaptive:spectral_width=inf"}


def test_what_is_interrupted_has_not_failed_and_what_was_finished_stays(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys, time\n"
        "folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
        "time.sleep(60 if sys.argv[sys.argv.index('--seed') + 1] == '1' else 0)\n"
        "state = {'log_history': [{'step': 1, 'eval_loss': 0.5}]}\n"
        "open(folder + '/trainer_state.json', 'w').write(json.dumps(state))\n"
    )
    runs = [ScriptRun("t", "a", seed, (sys.executable,), (str(script),), ()) for seed in range(3)]

    def interrupted(futures):
        yield next(as_completed(futures))
        time.sleep(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_adaclip.compare.runs.as_completed", interrupted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_scripts(runs, tmp_path, jobs=1, quiet=True)
    assert time.monotonic() - begin < 30
    assert [finished_result(run, tmp_path) is not None for run in runs] == [True, False, False]
    assert not (tmp_path / runs[1].folder / RESULT_FILE).exists()


def test_settings_that_came_later_count_only_where_they_say_something_else():
    for clip in ("zscore", GUARD):
        found = set(defaults_behind(["train.py", "--clip", clip]))
        assert not set(CAME_LATER) & found
        assert "incidents" not in found
    says = defaults_behind(["train.py", "--clip", "adaptive"])
    assert {says[name] for name in ("spectral_width", "agreement")} == {"auto"}
