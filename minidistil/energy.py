"""Energy of a run: read from the machine's counters, else estimated from a power that the user gives.

    GPU            NVML's counter, millijoules of the whole board; NVIDIA, from Volta on, through nvidia-ml-py
    CPU package    RAPL's counter in /sys/class/powercap, microjoules; at 200 W it wraps around every twenty minutes

A run is measured where the counter of its own device can be read; a run on GPUs adds the CPU packages of its machines
where they can be read, too. A counter counts whatever else runs on the same device. A thread reads the counters every
second, so that training waits for none of them and no wrap-around is missed.
"""

import pathlib
import threading
import time
import typing

import torch

from minidistil import launcher

POWERCAP = pathlib.Path("/sys/class/powercap")
SECONDS = 1.0  # between readings
STILL = 5.0  # seconds after which a counter that does not grow counts nothing: some virtual machines have such
KWH = 3.6e6  # joules


class Energy(typing.NamedTuple):
    """What a run took so far, or one rank of it: joules, and the time in seconds of one device that they cover."""

    gpu: float = 0.0  # joules, measured
    cpu: float = 0.0  # joules, measured
    estimated: float = 0.0  # joules
    known: float = 0.0  # seconds of one device for which there are joules
    seconds: float = 0.0  # seconds of one device in all

    @property
    def kwh(self):
        return (self.gpu + self.cpu + self.estimated) / KWH

    @property
    def watts(self):
        """Mean power for each device, the packages' included; None where nothing is known."""
        return self.kwh * KWH / self.known if self.known else None

    def record(self, grams_per_kwh=None):
        """Returns {"kwh", "measured_gpu_kwh", ..., "share_of_time" that they cover, "co2_kg"}; None: unknown."""
        if not self.kwh:
            return None
        parts = {"kwh": self.kwh, "measured_gpu_kwh": self.gpu / KWH, "measured_cpu_kwh": self.cpu / KWH}
        parts |= {"estimated_kwh": self.estimated / KWH, "share_of_time": self.known / self.seconds}
        parts |= {"co2_kg": None if grams_per_kwh is None else self.kwh * grams_per_kwh / 1000}
        return {name: value and float(f"{value:.4g}") for name, value in parts.items()}


def amount(thousands, unit="Wh"):
    """Returns a number of kWh, or of a thousand of another unit, as text with three digits."""
    return f"{thousands:,.3g} k{unit}" if thousands >= 1 else f"{1000 * thousands:,.3g} {unit}"


def describe(record):
    """Returns what a `record` of energy says, as text without a full stop."""
    kinds = {"measured_gpu_kwh": "measured on GPUs", "measured_cpu_kwh": "measured on CPU packages",
             "estimated_kwh": "estimated from a given power"}  # fmt: skip
    parts = {text: record[name] for name, text in kinds.items() if record[name]}
    how = ", ".join(f"{amount(kwh)} {text}" for text, kwh in parts.items()) if len(parts) > 1 else "".join(parts)
    text = f"{amount(record['kwh'])} ({how})"
    if record["co2_kg"] is not None:
        text += f", {amount(record['co2_kg'], 'g')} of CO2"
    if record["share_of_time"] < 0.99:
        text += f"; this covers {record['share_of_time']:.0%} of the time, and nothing is known of the rest"
    return text


# ---- counters


class Counter:
    """A counter of joules, which `read()` returns; it starts again from 0 after `wraps_at`, or never."""

    def __init__(self, read, wraps_at=None):
        self.read, self.wraps_at, self.last = read, wraps_at, read()

    def grown(self):
        """Returns the joules since the last call; OSError or ValueError where they cannot be known."""
        before, self.last = self.last, self.read()
        if self.last >= before:
            return self.last - before
        if self.wraps_at is None:
            raise OSError("the counter was set back")
        return self.last - before + self.wraps_at


def package_counters():
    """Returns a Counter for each CPU package of this machine, none where it tells nothing; OSError or ValueError."""
    counters = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):  # the name is the same on AMD's processors
        if (zone / "name").read_text().startswith("package"):  # others are parts of a package, or psys around it

            def read(path=zone / "energy_uj"):
                return int(path.read_text()) / 1e6

            counters.append(Counter(read, int((zone / "max_energy_range_uj").read_text()) / 1e6))
    return counters


def gpu_counters(device):
    """Returns [Counter] of a CUDA device; OSError says why there is none."""
    if torch.version.hip:
        raise OSError("only NVIDIA's GPUs are asked")
    try:
        import pynvml
    except ImportError:
        raise OSError("NVIDIA's library for it is missing: pip install nvidia-ml-py") from None

    def asked(function, *given):
        try:
            return function(*given)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    asked(pynvml.nvmlInit)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # whatever CUDA_VISIBLE_DEVICES calls it
    handle = asked(pynvml.nvmlDeviceGetHandleByUUID, uuid)
    try:
        sliced = pynvml.nvmlDeviceGetMigMode(handle)[0]
    except pynvml.NVMLError:  # a GPU that has no such mode
        sliced = False
    if sliced:
        raise OSError("a slice of a GPU (MIG) has no counter of its own")
    return [Counter(lambda: asked(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) / 1e3)]


class Meter:
    """Counts, while it is entered, the energy of one rank's device, on top of the Energy `before`.

    `watts` is the power of one device, for where its counter cannot be read; `say` prints a line. Of the ranks of a
    machine the first counts the CPU packages. The sum of all ranks' Energy is that of the run.
    """

    def __init__(self, device, watts=None, before=(), say=print):
        self.device, self.watts, self.energy, self.say = device.type, watts, Energy(*before), say
        self.booked = self.energy  # without the time since the device's own counter last grew, and its packages' joules
        self.waiting, self.packages, self.has_grown = 0.0, 0.0, False
        self.counts_packages = launcher.place().local == 0
        self.counters, self.lock, self.ended = {"cuda": [], "cpu": []}, threading.Lock(), threading.Event()
        for kind in (kind for kind in self.counters if kind == self.device or self.counters[self.device]):
            try:
                self.counters[kind] = package_counters() if kind == "cpu" else gpu_counters(device)
            except (OSError, ValueError) as error:
                self._lost(kind, error)

    def _lost(self, kind, error):
        """Goes on without the counters of one kind, and says so in a line."""
        self.counters[kind] = []
        what = {"cuda": "the GPU", "cpu": "the CPU packages"}[kind]
        why = " ".join(str(error).split())
        if kind != self.device:
            rest = "that of the GPU counts alone"
        else:
            self.counters["cpu"] = []
            rest = "--watts estimates it" if self.watts is None else f"estimated as {self.watts:g} W"
        self.say(f"the energy of {what} cannot be read ({why}): {rest}")

    def __enter__(self):
        self.began = time.monotonic()
        for kind in self.counters:
            self._grown(kind)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.read()

    def _watch(self):
        while not self.ended.wait(SECONDS):
            self.read()

    def _grown(self, kind):
        """Returns the joules since the last call of the counters of one kind, or None without them."""
        try:
            return sum(counter.grown() for counter in self.counters[kind]) if self.counters[kind] else None
        except (OSError, ValueError) as error:
            self._lost(kind, error)
            return None

    def read(self):
        """Returns the Energy up to now; `energy` is that of the last reading, at most a second old."""
        with self.lock:
            now = time.monotonic()
            passed, self.began = now - self.began, now
            joules = {kind: self._grown(kind) for kind in self.counters}
            own = joules[self.device]
            self.waiting += passed
            self.packages += (joules["cpu"] or 0.0) * self.counts_packages
            still = own == 0.0
            if not still or self.waiting > STILL:
                if own:
                    self.booked, self.has_grown = self._measured(joules["cuda"] or 0.0), True
                else:
                    if still:
                        self._lost(self.device, "it stands still")
                    self.booked = self._without_counter()
                self.waiting = self.packages = 0.0
            self.energy = self._measured() if self.has_grown else self._without_counter()
            return self.energy

    def _measured(self, gpu=0.0):
        """Returns the Energy up to now where the device's counter has grown, or is about to."""
        now = self.booked
        known, seconds = now.known + self.waiting, now.seconds + self.waiting
        return now._replace(gpu=now.gpu + gpu, cpu=now.cpu + self.packages, known=known, seconds=seconds)

    def _without_counter(self):
        """Returns the Energy up to now where the device's counter tells nothing: an estimate, or only the time."""
        now = self.booked._replace(seconds=self.booked.seconds + self.waiting)
        if self.watts is None:
            return now
        return now._replace(estimated=now.estimated + self.watts * self.waiting, known=now.known + self.waiting)

    def record(self, grams_per_kwh, ranks):
        """Returns {"joules": Energy of all ranks up to now, which a resumed run needs, "energy": its record}."""
        energy = Energy(*ranks.sum(*self.read()))
        return {"joules": energy, "energy": energy.record(grams_per_kwh)}
