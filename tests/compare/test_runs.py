"""What identifies a run of a script: its flags, its files, and the defaults that it goes by."""

from dataclasses import dataclass

import pytest

from hf_adaclip.compare.runs import CAME_LATER, ScriptRun, defaults_behind
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


def test_settings_that_came_later_count_only_where_they_say_something_else():
    found = set(defaults_behind(["train.py", "--clip", "adaptive"]))
    assert not set(CAME_LATER) & found
    assert "incidents" not in found
    defaults = AdaptiveClipConfig().to_dict()
    assert {name: defaults[name] for name in CAME_LATER} == CAME_LATER
