"""Energy of a run in watt-hours, and whether it was measured or estimated. Where nothing is known, nothing is said."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from hf_adaclip.reliance import require

logger = logging.getLogger(__name__)

Source = Literal["nvml", "rapl", "codecarbon"]
_RAPL = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """A counter of energy. `measured` is False where a model of the hardware stands in for a sensor."""

    source: Source
    measured: bool

    def read_wh(self) -> float:
        """Watt-hours since some fixed moment; only differences mean anything."""

    def close(self) -> None: ...


def open_meter(*, estimate: bool = False) -> EnergyMeter | None:
    """The best meter of this machine: NVML on an NVIDIA GPU, else RAPL on a CPU that shows it.

    Args:
        estimate: Where there is no sensor, fall back to codecarbon's estimate (an extra: `pip install hf_adaclip[compare]`). It
            runs a thread that looks at the processor every second.

    Returns:
        None where nothing works.
    """
    kinds: list[Callable[[], EnergyMeter]] = [NvmlMeter, RaplMeter]
    if estimate:
        kinds.append(CodecarbonMeter)
    for kind in kinds:
        try:
            return kind()
        except Exception as error:  # whatever a meter raises where it does not work must not disturb training
            logger.debug("%s is not available: %s", kind, error)
    return None


class NvmlMeter:
    """The GPU's own energy counter, summed over the visible devices (Volta and later)."""

    source: Source = "nvml"
    measured = True

    def __init__(self) -> None:
        import pynvml
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is in use")
        pynvml.nvmlInit()
        self._nvml = pynvml
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        self.read_wh()

    def read_wh(self) -> float:
        millijoules = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        return float(millijoules) / 3.6e6

    def close(self) -> None:
        self._nvml.nvmlShutdown()


class RaplMeter:
    """Intel's and AMD's package counters, read from the power capping framework of Linux."""

    source: Source = "rapl"
    measured = True

    def __init__(self) -> None:
        packages = sorted(p for p in _RAPL.glob("intel-rapl:*") if p.name.count(":") == 1)
        if not packages:
            raise RuntimeError(f"{_RAPL} shows no RAPL package")
        self._counters = [p / "energy_uj" for p in packages]
        self._ranges = [float((p / "max_energy_range_uj").read_text()) for p in packages]
        self._last = [float(c.read_text()) for c in self._counters]
        self._total_uj = 0.0

    def read_wh(self) -> float:
        for i, counter in enumerate(self._counters):
            now = float(counter.read_text())
            # The counter wraps around, every few minutes to hours.
            self._total_uj += (now - self._last[i]) % self._ranges[i]
            self._last[i] = now
        return self._total_uj / 3.6e9

    def close(self) -> None:
        return


class CodecarbonMeter:
    """codecarbon's estimate from the processor's thermal design power. Works offline; the country only matters for CO2."""

    source: Source = "codecarbon"
    measured = False

    def __init__(self) -> None:
        from codecarbon import OfflineEmissionsTracker

        self._tracker = OfflineEmissionsTracker(
            country_iso_code="USA",
            save_to_file=False,
            save_to_api=False,
            allow_multiple_runs=True,
            log_level="critical",
            measure_power_secs=1,
            tracking_mode="process",
        )
        require(self._tracker, "_total_energy")
        self._tracker.start()

    def read_wh(self) -> float:
        self._tracker.flush()
        return float(self._tracker._total_energy.kWh) * 1000.0

    def close(self) -> None:
        self._tracker.stop()
