"""Incidents for people: the command, and the section of the page."""

import json
import re
import zlib

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipper
from hf_adaclip.cli import main
from hf_adaclip.report.thumbnails import png


class Bytes:
    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture
def bad_run(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    clipper = AdaptiveClipper({"ledger": str(tmp_path / "clip_ledger.jsonl")}, model=model)
    ids = torch.tensor([list(b"a bad <document>"), list(b"one that is good")])
    for step in range(60):
        images = torch.rand(2, 3, 200, 100, generator=torch.Generator().manual_seed(step))
        clipper.watch({"input_ids": ids, "pixel_values": images}, [2 * step, 2 * step + 1], processing_class=Bytes())
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model(x).square().mean() * {50: 1e5, 55: float("nan")}.get(step, 1.0)).backward()
        clipper.clip_(model.parameters())
        model.zero_grad()
    clipper.close()
    return tmp_path


def test_the_command_lists_and_shows(bad_run, capsys):
    assert main(["incident", str(bad_run)]) == 0
    head, spike, nan = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["step", "what"]
    assert spike.split()[:2] == ["50", "spike"]
    assert nan.split()[:3] == ["55", "nonfinite", "nan"]

    assert main(["incident", str(bad_run / "clip_ledger.jsonl"), "50"]) == 0
    shown = capsys.readouterr().out
    assert "Step 50: spike." in shown
    assert "a bad <document>" in shown
    assert "100, 101" in shown
    assert "float32 [2, 3, 200, 100]" in shown
    assert re.search(r"\d+\.\d\d%  0\n", shown)

    assert main(["incident", str(bad_run), "55", "--json"]) == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert facts["step"] == 55
    assert facts["tensors"][0]["norm"] == "nan"


def test_what_is_not_there_is_said(bad_run, tmp_path, capsys):
    assert main(["incident", str(bad_run), "51"]) == 2
    assert "must be one with an incident (50, 55), but is 51" in capsys.readouterr().err
    assert main(["incident", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["incident", str(tmp_path / "empty")]) == 0
    assert "has no incidents" in capsys.readouterr().out


def test_damaged_ones_are_left_out(bad_run, capsys):
    folder = bad_run / "incidents/step-00050"
    (folder / "batch.safetensors").write_bytes(b"half")
    (folder / "text.jsonl").write_bytes(b"{")
    assert main(["incident", str(bad_run), "50"]) == 0
    assert main(["report", str(bad_run)]) == 0
    (folder / "incident.json").write_text("{")
    assert main(["incident", str(bad_run)]) == 0
    assert " 50 " not in capsys.readouterr().out.splitlines()[-1]


def test_the_page_has_a_section_with_text_and_thumbnails(bad_run):
    assert main(["report", str(bad_run)]) == 0
    html = (bad_run / "report.html").read_text()
    assert "Incidents (2)" in html
    assert "a bad &lt;document&gt;" in html
    assert html.count("data:image/png;base64,") == 4


def test_the_markdown_has_a_table(bad_run):
    assert main(["report", str(bad_run), "--format", "md"]) == 0
    text = (bad_run / "report.md").read_text()
    assert "## Incidents (2)" in text
    assert "| 50 | spike |" in text


def test_the_page_of_a_healthy_run_has_none(tmp_path):
    model = torch.nn.Linear(8, 1)
    clipper = AdaptiveClipper({"ledger": str(tmp_path / "clip_ledger.jsonl")}, model=model)
    model(torch.ones(2, 8)).sum().backward()
    clipper.clip_(model.parameters())
    clipper.close()
    assert main(["report", str(tmp_path)]) == 0
    assert "Incidents" not in (tmp_path / "report.html").read_text()


def test_a_png_holds_its_pixels():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    data = png(pixels)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    rows = zlib.decompress(body)
    assert rows == b"\0" + pixels[0].tobytes() + b"\0" + pixels[1].tobytes()
