"""Readers under damaged and hostile input: an exit code and a line of error, never a traceback."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip import HfAdaclipError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.audit.ingest import load_series
from scripts.fuzz_readers import fuzz

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "kind",
    "schema",
    "config",
    "initial_state",
    "step",
    "norm",
    "threshold",
    "reason",
    "parent",
    "norms",
    "counts",
    "steps",
]


def answers(path):
    """What the readers say to a file; anything but an error of the package goes up."""
    texts = []
    for reader in (verify_ledger, load_series):
        try:
            reader(path)
        except HfAdaclipError as error:
            texts.append(str(error))
    return texts


@pytest.mark.slow
def test_mutated_files_of_every_kind_are_answered_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a misbehaving file would be kept
    ends = fuzz(350, 12345, tmp_path)

    assert sum(ends.values()) == 350
    assert sum(n for name, n in ends.items() if "clip_state" in name and name.endswith("error")) > 10


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_lines_of_arbitrary_json_never_crash_a_reader(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "l.jsonl"
    kinds = ["header", "step", "footer", "seal"]
    content = [{"kind": kinds[i % 4], **line} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in content))
    assert all("\n" not in text for text in answers(path))


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_never_crash_a_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "log.csv"
    path.write_bytes(content)
    assert all(len(text) < 1000 for text in answers(path))
