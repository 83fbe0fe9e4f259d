import json
import math
import time

import pytest

from hf_adaclip.telemetry.energy import RaplMeter, Source, open_meter
from hf_adaclip.telemetry.point import Point, Stopwatch, Target, append_point, first_reaching, read_points


class Meter:
    source: Source = "rapl"
    measured = True

    def __init__(self):
        self.now = 100.0

    def read_wh(self):
        return self.now

    def close(self):
        pass


def point(step, loss, **changes):
    values = {
        "step": step,
        "samples": step * 8,
        "tokens": None,
        "train_seconds": step * 0.1,
        "energy_wh": None,
        "energy_source": None,
        "energy_measured": None,
        "metrics": {"eval_loss": loss},
    }
    return Point(**{**values, **changes})


def test_pauses_are_not_counted_in_seconds_or_energy(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_adaclip.telemetry.point.time.perf_counter", lambda: clock[0])
    meter = Meter()
    watch = Stopwatch(meter, seconds=5.0, energy_wh=1.0)
    watch.run()
    watch.run()  # running already: nothing changes
    meter.now += 2.0
    clock[0] += 0.5
    watch.pause()
    seconds = watch.seconds
    meter.now += 50.0  # an evaluation
    clock[0] += 7.0
    watch.pause()

    assert watch.seconds == seconds == 5.5
    assert watch.energy_wh == 3.0


def test_processor_time_counts_with_the_seconds_and_is_unknown_after_a_checkpoint_that_does_not_say(monkeypatch):
    spent = [3.0]
    monkeypatch.setattr("hf_adaclip.telemetry.point.time.process_time", lambda: spent[0])
    watch = Stopwatch(cpu_seconds=1.0)
    watch.run()
    spent[0] += 0.25
    watch.pause()
    spent[0] += 9.0  # an evaluation
    assert watch.cpu_seconds == 1.25
    watch.go_on(seconds=2.0, energy_wh=0.0)
    watch.run()
    watch.pause()
    assert watch.cpu_seconds is None


def test_a_point_of_before_has_no_processor_time(tmp_path):
    line = json.dumps({key: value for key, value in vars(point(10, 2.0)).items() if key != "cpu_seconds"})
    (tmp_path / "convergence.jsonl").write_text(line + "\n")
    assert read_points(tmp_path / "convergence.jsonl") == [point(10, 2.0)]


def test_absent_energy_is_absent():
    watch = Stopwatch(None)
    watch.run()
    watch.pause()

    assert watch.energy_wh is None


def test_points_survive_the_file_and_a_torn_last_line(tmp_path):
    path = tmp_path / "convergence.jsonl"
    points = [
        point(10, 2.0),
        point(20, math.nan, energy_wh=0.5, energy_source="nvml", energy_measured=True),
        point(30, math.inf),
    ]
    for p in points:
        append_point(path, p)
    assert [repr(p) for p in read_points(path)] == [repr(p) for p in points]
    with open(path, "a") as file:
        file.write('{"step": 40, "sam')
    assert len(read_points(path)) == 3
    with open(path, "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="line 4, is not a point"):
        read_points(path)


def test_first_reaching():
    points = [point(10, 3.0), point(20, math.nan), point(30, 1.9), point(40, 2.5)]

    def reached(*target):
        point = first_reaching(points, Target(*target))
        return point and point.step

    assert reached("eval_loss", 2.0) == 30
    assert reached("eval_loss", 1.0) is None
    assert reached("eval_loss", 2.4, True) == 10
    assert reached("eval_accuracy", 0.5) is None


def test_rapl_is_read_summed_and_unwrapped(tmp_path, monkeypatch):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("900")
        (tmp_path / name / "max_energy_range_uj").write_text("1000")
    monkeypatch.setattr("hf_adaclip.telemetry.energy._RAPL", tmp_path)
    meter = RaplMeter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("950")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100")  # wrapped around

    assert meter.read_wh() == pytest.approx((50 + 200) / 3.6e9)
    found = open_meter()
    assert found is not None
    assert found.source == "rapl"


def test_no_sensor_means_no_meter(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_adaclip.telemetry.energy._RAPL", tmp_path)
    assert open_meter() is None


@pytest.mark.slow
def test_codecarbon_estimates_and_says_so(tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.setattr("hf_adaclip.telemetry.energy._RAPL", tmp_path)
    meter = open_meter(estimate=True)
    assert meter is not None
    before = meter.read_wh()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        sum(range(1000))
    after = meter.read_wh()
    meter.close()

    assert (meter.source, meter.measured) == ("codecarbon", False)
    assert 0 < after - before < 1.0  # between nothing and 2.4 kW
