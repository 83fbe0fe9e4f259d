"""Every code block of the README and of the pages that it links to is run; every number that comes from a file is held to that file."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_adaclip.audit.replay import REPLAYABLE
from hf_adaclip.compare import fork_server
from scripts.docs.readme_section import read_section

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "scripts" / "README.md", *sorted((ROOT / "model_cards").glob("**/*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = [
    block for text in TEXTS.values() for block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
LARGEST = 13 * 1024
"""Bytes of the README. What is more belongs into a docstring, a `--help` or a card."""

# What the README's fragments take for granted: a model, data, a Trainer's arguments, a training function.
SETTING = """
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from accelerate import Accelerator
from hf_adaclip import *
rows = torch.randint(0, 64, (32, 16))
train_dataset = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
args = TrainingArguments("out", max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no")
"""
LOOP = """
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(model.parameters())
dataloader = torch.utils.data.DataLoader(train_dataset, batch_size=4)
model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
"""
MAIN = """
def main(accelerator):
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()
    for _ in range(3):
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
"""


def run(code, folder, *check):
    script = "\n".join([textwrap.dedent(code), *check])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fork(code, folder, *check):
    """As `run`, in a process that finds the libraries imported, which takes longer than the code."""
    script, log = folder / "block.py", folder / "block.log"
    script.write_text("\n".join([f"import os; os.chdir({str(folder)!r})", textwrap.dedent(code), *check]))
    process = fork_server.start([str(script)], log, {**os.environ, "OMP_NUM_THREADS": "1"})
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def after(diff):
    """The code as it is once the diff has been applied."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))


def block_with(language, piece):
    found = [text for text in blocks(language) if piece in text]
    assert len(found) == 1, piece
    return found[0]


def test_every_block_is_taken_up_by_a_test_of_this_file():
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call)]
    taken = [
        block_with(*(word.value for word in call.args if isinstance(word, ast.Constant)))
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "block_with" and isinstance(call.args[0], ast.Constant)
    ]
    assert [text for _, text in BLOCKS if text not in taken] == []


@pytest.mark.slow
def test_the_first_60_seconds_print_what_they_say(tmp_path):
    out = run(block_with("python", "first-run"), tmp_path)
    counts = eval(out.strip().splitlines()[-1])

    assert counts["WARMUP"] == 50
    said = re.search(r"The log warns: norm (\S+), cut to (\S+)\.\n", README)
    assert said is not None
    lines = [json.loads(line) for line in (tmp_path / "first-run/clip_ledger.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    spike = steps[100]
    assert spike["norm"] == pytest.approx(float(said[1]), rel=0.2)
    assert spike["norm"] * spike["coefficient"] == pytest.approx(float(said[2]), rel=0.2)
    size = re.search(r"SHA-256 chain, (\d+) bytes each", README)
    assert size is not None
    assert float(size[1]) == pytest.approx(sum(len(json.dumps(s)) for s in steps) / len(steps), rel=0.2)
    assert counts["SPIKE"] >= 1
    assert counts.get("WITHIN", 0) + counts.get("WIDENED", 0) > 40
    [command] = [shlex.split(c)[1:] for c in block_with("bash", "hf-adaclip verify").splitlines() if c]
    done = subprocess.run(
        [sys.executable, "-m", "hf_adaclip.cli", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == block_with("text", "first-run")
    commands = block_with("bash", "hf-adaclip advise") + block_with("bash", "hf-adaclip gauntlet")
    for line in commands.splitlines():
        command = [sys.executable, "-m", "hf_adaclip.cli", *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert (tmp_path / "first-run/report.html").is_file()
    assert (tmp_path / "replay.png").is_file()


@pytest.mark.slow
def test_one_line_for_a_trainer(tmp_path):
    fork(
        SETTING + after(block_with("diff", "= AdaptiveClipTrainer(")),
        tmp_path,
        "trainer.train()",
        "assert trainer.clipper.step == 3",
    )


@pytest.mark.slow
def test_one_line_for_a_subclass(tmp_path):
    use = "trainer = MyTrainer(model=model, args=args, train_dataset=train_dataset); trainer.train()"
    fork(SETTING + after(block_with("diff", "class MyTrainer")), tmp_path, use, "assert trainer.clipper.step == 3")


@pytest.mark.slow
def test_one_line_for_somebody_elses_trainer(tmp_path):
    fork(SETTING + after(block_with("diff", "attach(")), tmp_path, "assert trainer.clipper.step == 3")


@pytest.mark.slow
def test_one_line_for_an_accelerate_loop(tmp_path):
    fork(SETTING + LOOP + after(block_with("diff", "accelerator.accumulate")), tmp_path, "assert clipper.step == 4")
    assert (tmp_path / "clip_ledger.jsonl").is_file()


@pytest.mark.slow
def test_one_line_for_a_script_that_cannot_be_edited(tmp_path):
    fork(
        SETTING + MAIN + block_with("python", ".install()").replace("Accelerator()", "Accelerator(cpu=True)"), tmp_path
    )


@pytest.mark.slow
def test_plain_pytorch(tmp_path):
    out = run(block_with("python", "torch.nn.Linear"), tmp_path)
    assert "fused AdamW skips a step on the device" in out


@pytest.mark.slow
def test_config(tmp_path):
    run(
        block_with("python", "clip.json"),
        tmp_path,
        "assert AdaptiveClipConfig.resolve('clip.json') == config",
        "assert config.max_skipped == 20",
        "assert config.on_trouble == 'rewind'",
    )


@pytest.mark.slow
def test_a_script_gets_its_flag(tmp_path):
    flags = "--output_dir out --use_cpu --max_steps 3 --report_to none --save_strategy no --clip zscore"
    fork(
        f"import sys\nsys.argv += '{flags}'.split()\n{SETTING}{block_with('python', 'make_trainer')}",
        tmp_path,
        "assert (trainer.clipper.step, trainer.clipper.config.controller) == (3, 'zscore')",
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len(README.encode()) <= LARGEST


def test_what_is_logged_is_said():
    from hf_adaclip import Reason
    from hf_adaclip.run.counts import RunStatistics

    statistics = RunStatistics()
    row = {"norm": 1.0, "coefficient": 1.0, "threshold": 1.0, "pace": 1.0}
    shaped = dict.fromkeys(("spectral_width", "altered_energy", "matrix_norm", "agreeing_share"), 0.5)
    statistics.add({**row, **shaped}, Reason.WITHIN)
    for name in (*statistics.metrics(), "clip/learning_rate"):
        assert f"`{name}`" in README or f"`{name.removeprefix('clip/')}`" in README, name


def test_the_two_commands_are_targets_of_the_makefile():
    for command in block_with("bash", "make demo").split("\n"):
        if command:
            subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_gate_is_the_readmes_test_command_and_fails_when_it_does(tmp_path):
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$PWD make $*" > {tmp_path}/called\nexit 3\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci/run"], cwd=tmp_path, env=environment)

    assert done.returncode == 3
    assert (tmp_path / "called").read_text() == f"{ROOT} make test\n"
    assert "make test" in [line.split("  ")[0].strip() for block in blocks("bash") for line in block.splitlines()]


def test_the_table_of_controllers_is_generated():
    from hf_adaclip import CONTROLLERS
    from scripts.docs.controller_table import controller_table

    table = read_section("controllers")
    assert table == controller_table()
    for name in CONTROLLERS:
        assert f'| `"{name}"` |' in table


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [r for r in REPLAYABLE if r not in ("mean_sd", "log_zscore", "percentile")]
)  # seconds each
def test_the_table_holds_what_the_gauntlet_measures(rule):
    from hf_adaclip.gauntlet.verdict import judge_config, parse_controller
    from scripts.docs.gauntlet_card import VERDICTS

    recorded = json.loads(VERDICTS.read_text(encoding="utf-8"))
    found = judge_config(parse_controller(rule), recorded["noise"], recorded["seeds"]).to_dict()
    for key, value in recorded["verdicts"][rule].items():
        if key == "streams":
            assert found[key] == {
                name: pytest.approx(float(figure), rel=0.05, abs=0.5) for name, figure in value.items()
            }
        elif (
            key != "update_microseconds"
        ):  # the exponential in the streams may differ in its last bit between machines
            assert found[key] == pytest.approx(float(value), rel=0.02, abs=0.01), key


def test_the_table_of_costs_is_that_of_the_benchmark():
    from scripts.docs.speed_table import CARD, speed_table

    assert read_section("speed", CARD) == speed_table()


def test_what_a_step_costs_more_is_that_of_the_benchmark():
    folder = ROOT / "model_cards" / "spectral"
    setups = json.loads((folder / "cost.json").read_text(encoding="utf-8"))["setups"]
    llama, vit = (
        round(100 * setups[name]["share of a whole step"]["spectral, width 0 + agreement"])
        for name in ("llama-study", "vit-study")
    )
    assert f"A step takes {llama} to {vit} % longer" in README
    assert f"{llama} % on the study's Llama and {vit} % on its ViT" in (folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_table_of_the_default_is_that_of_its_runs():
    from scripts.docs.default_table import CARD, table

    assert read_section("default", CARD) == table()


def test_what_people_have_elsewhere_can_be_said_here():
    from hf_adaclip import AdaptiveClipConfig

    page = TEXTS[ROOT / "model_cards" / "gauntlet" / "README.md"]
    table = page[page.index("| there | here |") :].split("\n\n")[0]
    rows = [line.split("|")[2].strip().strip("`") for line in table.splitlines()[2:]]
    assert len(rows) == 9
    for row in rows:
        assert isinstance(eval(row, {"AdaptiveClipConfig": AdaptiveClipConfig}), AdaptiveClipConfig), row


def test_the_readme_has_a_row_for_every_setup():
    from hf_adaclip.support import SETUPS

    table = README[README.index("## Where it works") :]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for name, entry in SETUPS.items():
        [row] = [r for r in rows if f"`{name}`" in r.split("|")[1]]
        assert ("refused" in row) == (entry.how is None), name


@pytest.mark.slow
def test_the_script_runs_as_the_readme_has_it(tmp_path):
    from pydoc_data.topics import topics

    (tmp_path / "notes.txt").write_text("\n".join(" ".join(t.split()) for t in list(topics.values())[:60]))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    [command] = [block_with("bash", "first-script").replace("\\\n", " ")]
    listed = [sys.executable, *shlex.split(command)[1:], "--use_cpu", "--disable_tqdm", "true"]
    done = subprocess.run(listed, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "first-script/clip_ledger.jsonl").is_file()
    for name in re.findall(r"scripts/[\w/]+\.(?:py|yaml)", "".join(TEXTS.values())):
        assert (ROOT / name).is_file(), name


def test_the_comparison_of_a_script_is_one_that_starts(monkeypatch):
    from hf_adaclip import HfAdaclipError, cli
    from hf_adaclip.integrations.script_args import parse_arguments
    from scripts import run_glue

    started = []

    def start(study):
        started.append(study)
        raise HfAdaclipError("started")

    monkeypatch.setattr("hf_adaclip.compare.study.compare_script", start)
    words = shlex.split(block_with("text", "--arms stock,tuned").replace("\\\n", " "))
    assert cli.main(words[1:]) == 2
    [study] = started
    script, *flags = study.script
    parsed = parse_arguments([*flags, "--output_dir", "out"], run_glue.ModelArguments, run_glue.DataArguments)

    assert (words[0], study.arms) == ("hf-adaclip", ("stock", "tuned", "adaptive", "zscore"))
    assert (ROOT / script).is_file()
    assert parsed[2].max_steps % parsed[2].eval_steps == 0
