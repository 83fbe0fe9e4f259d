"""Free text stays text, in every Markdown and every page that we write."""

import json
import re
from html import unescape

import pytest

from hf_adaclip.ledger.schema import GENESIS, encode, seal_line
from hf_adaclip.report import markdown as md
from hf_adaclip.report.run_report import clipping_section, load_run, write_html, write_markdown
from tests.audit.test_ledger import write_run

HOSTILE = [
    "a | b | c",
    "a\n\n# heading\n",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example/login",
    "www.evil.example",
    "mail me@evil.example",
    "``` code",
    "`tick`",
    "**bold** and _slanted_ and ~~gone~~",
    "&lt;b&gt; &#60;b&#62;",
    "- item",
    "1. item",
    "> quotation",
    "\\| escaped pipe",
    "$x^2$",
    "\u202ereversed\u202c",
    "a\x00b\x1b[31mred",
    "[ref]: https://evil.example",
]


def shown(markdown):
    """What a reader sees, by an implementation of CommonMark with tables, HTML and bare links."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return parser.render(markdown)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text(text):
    line = md.text(text)
    html = shown(f"before {line}") + shown(line)

    assert not re.search(r"<(?!/?p>|br)", html), html
    assert "\n" not in line
    assert "://" not in line
    visible = unescape(re.sub(r"<[^>]*>", "", html))
    wanted = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert wanted in visible


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_code(text):
    html = shown(md.code(text).replace("\\\\|", "|"))

    assert re.fullmatch(r"<p><code>[^<]*</code></p>\n", html), html
    assert shown(md.block(text)).count("<pre>") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_keeps_its_cells(text):
    html = shown(md.table(["a", "b"], [[md.text(text), md.code(text)]]))

    assert html.count("<td>") == 2, html
    assert "<script" not in html
    assert "<a " not in html
    assert "<img" not in html


@pytest.mark.parametrize(
    "plain", ["8.0", "adaptive-pace", "eval_loss <= 0.5", "3 (1.50%)", "-0.5", "0.78 x", "a_b_c", "norm 1 -> 2"]
)
def test_what_is_harmless_is_left_alone(plain):
    assert md.text(plain) == plain


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_controller_is_shown_as_text_everywhere(tmp_path, text):
    path = tmp_path / "clip_ledger.jsonl"
    write_run(path, steps=25)
    head, block, raw = GENESIS, [], b""
    for row in map(json.loads, path.read_text().splitlines()):
        if row["kind"] == "header":
            row["controller"], row["versions"] = text, {text: text}
        if row["kind"] != "seal":
            block.append(encode(row))
            continue
        seal, head = seal_line(head, len(block), b"".join(block))
        raw, block = raw + b"".join(block) + seal, []
    path.write_bytes(raw)
    report = load_run(path)
    html = write_html(report, tmp_path / "r.html").read_text()
    for page in (write_markdown(report, tmp_path / "r.md").read_text(), clipping_section(report, text)):
        rendered = shown(page)
        assert "<script" not in rendered
        assert "<img" not in rendered
        assert re.findall(r'<a href="([^"]*)"', rendered) in ([], ["https://pypi.org/project/hf_adaclip/"])
        assert rendered.count("<h1>") == page.startswith("# ")
    assert "<script" not in html
    assert "<img" not in html
