"""`hf-adaclip run -- COMMAND`: status, signals, refusals, and one script that is clipped without being edited."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, ConfigError, UnsupportedSetupError
from hf_adaclip.cli import main
from hf_adaclip.integrations import launch
from hf_adaclip.integrations.launch import portable
from tests.integrations import trainers
from tests.plugins.launched import PYTHON, RUN, TIGHT, environment, verified

pytestmark = pytest.mark.slow


def test_a_script_is_attached_without_being_edited_and_the_weights_show_it(start, tmp_path):
    done = start(*RUN, "--clip", TIGHT, "--", PYTHON, "train.py")
    assert "hf-adaclip: attached to MyTrainer: controller static, ledger out/clip_ledger.jsonl" in done.stderr
    assert "class AdaptiveClipMyTrainer" in done.stdout
    verified(tmp_path / "out/clip_ledger.jsonl", steps=20)

    def stock(threshold):
        args = trainers.arguments(tmp_path / f"stock-{threshold}", max_steps=20, max_grad_norm=threshold)
        trainer = trainers.stock(tmp_path, args=args)
        trainers.run(trainer)
        return trainers.weights(trainer)

    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(found, stock(0.05))  # this threshold acted, bit for bit, and not the script's own
    assert not torch.equal(found, stock(1.0))


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ((PYTHON, "-c", "raise SystemExit(7)"), 7, "0 Trainers were attached, and the command's status is 7"),
        ((PYTHON, "-c", "pass"), 1, "0 Trainers were attached, and the command's status is 0"),
        ((PYTHON, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 137, "0 Trainers were attached"),
        (("no-such-program",), 2, "must be a program that can be run, but 'no-such-program' cannot"),
        ((), 2, "`COMMAND` must follow"),
    ],
)
def test_status(monkeypatch, capfd, command, status, words):
    monkeypatch.setattr(launch, "_check_found", lambda: None)
    assert main(["run", "--", *command]) == status
    assert words in capfd.readouterr().err


@pytest.fixture
def command(tmp_path):
    return [PYTHON, "-c", f"open({str(tmp_path / 'started')!r}, 'w')"]


def test_a_wrong_clip_is_refused_before_the_command_starts(command, tmp_path, capsys):
    assert main(["run", "--clip", "adaptve", "--", *command]) == 2
    assert "Did you mean 'adaptive'?" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_without_the_entry_point_nothing_is_started(command, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "entry_points", lambda group: [])
    with pytest.raises(UnsupportedSetupError, match="its entry point is not found"):
        launch.run_command(command)
    monkeypatch.setattr(launch, "entry_points", lambda group: [SimpleNamespace(value="hf_adaclip_autoload:start")])
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    with pytest.raises(UnsupportedSetupError, match="`TORCH_DEVICE_BACKEND_AUTOLOAD` must not be 0"):
        launch.run_command(command)
    assert not (tmp_path / "started").exists()


def test_other_commands_take_the_variable_away(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ADACLIP", "adaptive")
    main(["verify", str(tmp_path / "none.jsonl")])
    assert "HF_ADACLIP" not in os.environ


WAIT = """
import signal, sys, time
def stop(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(9)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_are_forwarded_and_nothing_is_left_behind(tmp_path, name):
    code = "from hf_adaclip.integrations import launch; launch._check_found = lambda: None; "
    code += f"raise SystemExit(launch.run_command([{PYTHON!r}, '-c', {WAIT!r}]))"
    process = subprocess.Popen(
        [PYTHON, "-c", code],
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"got {name}\n", 9)
    assert not list(tmp_path.iterdir())


def test_clip_as_text(tmp_path):
    assert AdaptiveClipConfig.resolve("zscore") == AdaptiveClipConfig(controller="zscore")
    assert AdaptiveClipConfig.resolve("zscore:z_threshold=3,warmup_observations=9") == AdaptiveClipConfig(
        controller="zscore", z_threshold=3, warmup_observations=9
    )
    config = AdaptiveClipConfig(max_pace=2.0)
    assert AdaptiveClipConfig.resolve(config) is config
    config.to_json(tmp_path / "clip.json")
    assert (
        AdaptiveClipConfig.resolve(tmp_path / "clip.json")
        == AdaptiveClipConfig.resolve(str(tmp_path / "clip.json"))
        == config
    )
    with pytest.raises(ConfigError, match="Did you mean `z_threshold`"):
        AdaptiveClipConfig.resolve("zscore:z_treshold=3")
    with pytest.raises(ConfigError, match="must be NAME or NAME:FIELD=VALUE"):
        AdaptiveClipConfig.resolve("zscore:3")
    with pytest.raises(ConfigError, match="must be a controller"):
        AdaptiveClipConfig.resolve("nonsense:3")


def test_a_path_reaches_a_process_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AdaptiveClipConfig().to_json("clip.json")
    assert portable("clip.json") == str(tmp_path / "clip.json")
    assert portable(TIGHT) == TIGHT
