"""Energy: counters that wrap around, are forbidden or vanish; what a run, its resumption and its ranks add up to."""

import json
import sys
import time
import types

import pytest
import torch
from test_distributed import flags, launched, torchrun
from test_train import settings

import train
from minidistil import energy, run
from minidistil.energy import Counter, Energy, Meter, amount, describe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def zone(folder, name, microjoules, wraps_at=10**9, kind="intel-rapl:0"):
    """A zone of RAPL, as the kernel shows it."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", wraps_at)):
        (folder / kind / file).write_text(f"{value}\n")
    return folder / kind / "energy_uj"


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """Counters of two packages, at 5 J; core, dram and psys are parts of them or around them, mmio the first again."""
    folder = tmp_path / "powercap"
    monkeypatch.setattr(energy, "POWERCAP", folder)
    counters = [zone(folder, f"package-{i}", 5_000_000, kind=f"intel-rapl:{i}") for i in range(2)]
    zone(folder, "core", 10**9, kind="intel-rapl:0:0")
    zone(folder, "dram", 10**9, kind="intel-rapl:0:1")
    zone(folder, "psys", 10**9, kind="intel-rapl:2")
    zone(folder, "package-0", 10**9, kind="intel-rapl-mmio:0")
    return counters


class NVML:
    """What we use of nvidia-ml-py: `joules` of the board, or the name of an error."""

    class NVMLError(Exception):
        pass

    def __init__(self, joules=0.0, slices=None):
        self.joules, self.slices, self.asked = joules, slices, []

    def nvmlInit(self):
        if self.joules == "Driver Not Loaded":
            raise self.NVMLError(self.joules)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMigMode(self, handle):
        if self.slices is None:
            raise self.NVMLError("Not Supported")
        return [self.slices, self.slices]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        if isinstance(self.joules, str):
            raise self.NVMLError(self.joules)
        return int(1000 * self.joules)


@pytest.fixture
def nvml(monkeypatch):
    board = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", board)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="8a6f"))
    return board


@pytest.fixture
def lines(monkeypatch):
    """What a meter says; its thread reads nothing by itself."""
    monkeypatch.setattr(energy, "SECONDS", 1e6)
    return []


# ---- counters


def test_a_counter_wraps_around():
    values = iter([10.0, 12.0, 3.0, 3.0, 9.0, 2.5])
    counter = Counter(lambda: next(values), wraps_at=100.0)
    assert [counter.grown() for _ in range(5)] == [2.0, 91.0, 0.0, 6.0, 93.5]


def test_a_counter_that_never_wraps_may_not_fall():
    values = iter([10.0, 3.0])
    counter = Counter(lambda: next(values))
    with pytest.raises(OSError, match="set back"):
        counter.grown()


def test_packages_are_counted_once(rapl, lines):
    """Neither their parts nor what is around them; over the end of the range."""
    meter = Meter(CPU, say=lines.append)
    rapl[0].write_text("7000000\n")  # before it is entered: not of the run
    with meter:
        rapl[0].write_text("8500000\n")
        for other in set(energy.POWERCAP.glob("*/energy_uj")) - set(rapl):
            other.write_text("10\n")
        assert meter.read().cpu == pytest.approx(1.5)
        rapl[1].write_text("2000000\n")  # from 5 J on over 1,000 J to 2 J
        found = meter.read()
    assert found.cpu == pytest.approx(1.5 + 997) and found.gpu == found.estimated == 0.0
    assert 0 < found.known == found.seconds < 60 and lines == []
    assert found.watts == pytest.approx(found.cpu / found.seconds)


@pytest.mark.parametrize("watts, remedy", [(None, "--watts estimates it"), (50.0, "estimated as 50 W")])
@pytest.mark.parametrize("trouble, why", [("forbidden", "Permission denied"), ("nonsense", "invalid literal")])
def test_what_cannot_be_read_is_said_once(rapl, lines, trouble, why, watts, remedy, monkeypatch):
    if trouble == "nonsense":
        rapl[0].write_text("nonsense")
    else:  # root, who runs tests, may read what others may not
        path = type(rapl[0])
        read = path.read_text

        def forbidden(self, *given):
            if self.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(self))
            return read(self, *given)

        monkeypatch.setattr(path, "read_text", forbidden)
    with Meter(CPU, watts, say=lines.append) as meter:
        time.sleep(0.01)
        found = meter.read()
    (line,) = lines
    assert line.startswith("the energy of the CPU packages cannot be read (") and why in line and "\n" not in line
    assert line.endswith(remedy)
    assert found.cpu == 0.0 and found.estimated == pytest.approx((watts or 0.0) * found.seconds)
    assert found.known == (found.seconds if watts else 0.0)


def test_a_machine_without_counters_says_nothing_and_claims_nothing(lines, monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    with Meter(CPU, say=lines.append) as meter:
        found = meter.read()
    assert lines == [] and found.record(400.0) is None and found.watts is None and found.seconds > 0


def test_a_counter_that_vanishes(rapl, lines):
    """What was measured stays; from then on the energy is estimated, or unknown."""
    for watts in (None, 80.0):
        del lines[:]
        with Meter(CPU, watts, say=lines.append) as meter:
            rapl[0].write_text(f"{int(rapl[0].read_text()) + 4_000_000}")
            before = meter.read()
            rapl[1].rename(rapl[1].with_name("gone"))
            time.sleep(0.05)
            meter.read()
            after = meter.read()
        rapl[1].with_name("gone").rename(rapl[1])
        assert len(lines) == 1 and "No such file" in lines[0]
        assert after.cpu == before.cpu == pytest.approx(4.0) and after.seconds > before.seconds
        assert after.estimated == pytest.approx((watts or 0.0) * (after.seconds - before.seconds))
        assert after.known == (after.seconds if watts else before.known)
    assert "this covers" not in describe(after.record())
    assert "; this covers 25% of the time" in describe(Energy(0, 4.0, 0, 1.0, 4.0).record())


@pytest.mark.parametrize("watts", [None, 80.0])
def test_a_counter_that_stands_still(rapl, lines, watts, monkeypatch):
    """As in some virtual machines: its zeros are no measurement, neither after a while nor in a short run."""
    with Meter(CPU, say=lines.append) as meter:
        pass
    assert lines == [] and meter.read().record() is None
    monkeypatch.setattr(energy, "STILL", 0.05)
    with Meter(CPU, watts, say=lines.append) as meter:
        for _ in range(4):
            time.sleep(0.03)
            meter.read()
    (line,) = lines
    found = meter.energy
    assert "(it stands still)" in line and found.cpu == 0.0
    assert found.known == pytest.approx(found.seconds if watts else 0.0, abs=1e-9)
    assert found.estimated == pytest.approx((watts or 0.0) * found.seconds)


def test_a_gpus_counter_that_stands_still_takes_the_packages_with_it(nvml, rapl, lines, monkeypatch):
    """Joules without the time that they cover would be a power without bounds, also after a resumed run."""
    monkeypatch.setattr(energy, "STILL", 0.05)
    for before, watts in ((Energy(), None), (Energy(30.0, 2.0, 0.0, 0.5, 0.5), None), (Energy(), 200.0)):
        with Meter(GPU, watts, before, say=lines.append) as meter:
            for joules in range(6, 10):
                rapl[0].write_text(f"{joules}000000")
                time.sleep(0.03)
                meter.read()
        found = meter.energy
        assert lines.pop().startswith("the energy of the GPU cannot be read (it stands still)")
        assert (found.gpu, found.cpu) == (before.gpu, before.cpu) and found.seconds > before.seconds + 0.1
        assert found.estimated == pytest.approx((watts or 0.0) * found.seconds)
        assert found.watts == (watts and pytest.approx(watts)) or found.watts == before.watts


def test_a_short_run_on_a_counter_that_stands_still_is_estimated(rapl, lines):
    with Meter(CPU, watts=65.0, say=lines.append) as meter:
        time.sleep(0.01)
    found = meter.energy
    assert found.cpu == 0.0 and found.known == found.seconds and found.estimated == pytest.approx(65 * found.seconds)


def test_what_a_counter_says_late_replaces_the_estimate(rapl, lines):
    with Meter(CPU, watts=1e6, say=lines.append) as meter:
        assert meter.read().estimated > 0
        rapl[0].write_text("7000000\n")
        found = meter.read()
        assert (found.cpu, found.estimated, found.known) == (pytest.approx(2.0), 0.0, found.seconds)
        assert meter.read().known == meter.energy.seconds  # it has grown once, and may grow again


def test_the_thread_reads_by_itself(rapl, monkeypatch):
    """So a counter that wraps around during a long update is read in time, and the update does not wait."""
    monkeypatch.setattr(energy, "SECONDS", 0.02)
    with Meter(CPU) as meter:
        for value in (900_000_000, 100_000_000, 900_000_000):  # 895 + 200 + 800 joules
            rapl[0].write_text(str(value))
            deadline, seen = time.monotonic() + 20, meter.energy.cpu
            while meter.energy.cpu == seen and time.monotonic() < deadline:
                time.sleep(0.01)
    assert meter.energy.cpu == pytest.approx(1895.0)
    assert not meter.thread.is_alive()


# ---- GPUs


def test_a_gpu_and_the_packages_beside_it(nvml, rapl, lines):
    with Meter(GPU, watts=1e6, say=lines.append) as meter:
        nvml.joules = 30.0
        rapl[0].write_text("7000000")
        found = meter.read()
    assert nvml.asked == ["GPU-8a6f"] and lines == []
    assert (found.gpu, found.cpu, found.estimated) == (pytest.approx(30.0), pytest.approx(2.0), 0.0)


def test_a_gpu_whose_packages_cannot_be_read_counts_alone(nvml, rapl, lines):
    rapl[0].write_text("nonsense")
    with Meter(GPU, say=lines.append) as meter:
        nvml.joules = 30.0
        found = meter.read()
    assert len(lines) == 1 and lines[0].endswith("that of the GPU counts alone")
    assert found.gpu == pytest.approx(30.0) and found.cpu == 0.0 and found.known == found.seconds


@pytest.mark.parametrize("trouble, why", [
    ("missing", "pip install nvidia-ml-py"), ("no driver", "NVML: Driver Not Loaded"),
    ("MIG", "a slice of a GPU"), ("old", "NVML: Not Supported"), ("AMD", "only NVIDIA's"),
])  # fmt: skip
def test_a_gpu_without_a_counter(trouble, why, nvml, rapl, lines, monkeypatch):
    """Its packages alone would be a part that looks like the whole: all is estimated, or nothing claimed."""
    if trouble == "missing":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.joules = {"no driver": "Driver Not Loaded", "old": "Not Supported"}.get(trouble, 0.0)
    nvml.slices = 1 if trouble == "MIG" else 0
    monkeypatch.setattr(torch.version, "hip", "7.0" if trouble == "AMD" else None)
    with Meter(GPU, say=lines.append) as meter:
        rapl[0].write_text("9000000")
        found = meter.read()
    assert len(lines) == 1 and why in lines[0] and lines[0].startswith("the energy of the GPU cannot be read (")
    assert found.known == found.cpu == 0.0 and found.record() is None


@pytest.mark.parametrize("now", ["GPU is lost", 1.0])
def test_a_gpu_whose_counter_stops(now, nvml, rapl, lines):
    """The GPU falls off the bus, or its driver is loaded anew and counts from 0."""
    nvml.joules = 100.0
    with Meter(GPU, watts=10.0, say=lines.append) as meter:
        nvml.joules = 130.0
        assert meter.read().gpu == pytest.approx(30.0)
        nvml.joules = now
        time.sleep(0.02)
        found = meter.read()
        rapl[0].unlink()  # of which nobody needs to hear any more
        again = meter.read()
    assert len(lines) == 1 and ("lost" if isinstance(now, str) else "set back") in lines[0]
    assert found.gpu == again.gpu == pytest.approx(30.0) and again.estimated > 0 and again.known == again.seconds


# ---- what is written


def test_records():
    found = Energy(gpu=7.2e6, cpu=1.8e6, estimated=0.0, known=3600.0, seconds=3600.0)
    assert found.watts == 2500.0
    assert found.record(400.0) == {
        "kwh": 2.5, "measured_gpu_kwh": 2.0, "measured_cpu_kwh": 0.5, "estimated_kwh": 0.0, "share_of_time": 1.0,
        "co2_kg": 1.0,
    }  # fmt: skip
    parts = "2 kWh measured on GPUs, 500 Wh measured on CPU packages"
    assert describe(found.record(400.0)) == f"2.5 kWh ({parts}), 1 kg of CO2"
    estimated = Energy(0, 0, 3.6e5, 10.0, 10.0).record()
    assert describe(estimated) == "100 Wh (estimated from a given power)" and estimated["co2_kg"] is None
    assert (amount(0.0123), amount(1234.5), amount(0.25, "g")) == ("12.3 Wh", "1.23e+03 kWh", "250 g")


# ---- runs


def of_run(out):
    return json.loads((out / "run.json").read_text())["energy"]


def test_an_estimate_in_progress_lines_and_run_json(tiny, tmp_path, monkeypatch, capsys):
    """5 MW for each device, so that there are digits; the projection beside hours and price."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(energy, "SECONDS", 0.005)
    monkeypatch.setenv("COLUMNS", "160")
    train.train(settings(tiny, tmp_path / "out", watts=5e6, grams_per_kwh=500.0))
    said, found = capsys.readouterr().out, of_run(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found["kwh"] == found["estimated_kwh"] > 0 == found["measured_cpu_kwh"] and found["share_of_time"] == 1.0
    assert found["co2_kg"] == pytest.approx(0.5 * found["kwh"], rel=1e-3)
    assert found["kwh"] == pytest.approx(5000 * record["summary"]["seconds"] / 3600, rel=0.2, abs=0.1)
    accounting = record["accounting"]
    assert accounting["published_kwh"] == pytest.approx(5000 * accounting["published_device_hours"], rel=1e-3)
    assert f"and about {amount(accounting['published_kwh'])}\n" in said and f"energy: {describe(found)}\n" in said
    assert "Wh  0m00s left" in said
    last = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()][-2]
    assert last["kwh"] == pytest.approx(5000 * last["device_hours"], rel=0.1, abs=0.3)


def test_a_run_without_energy_claims_none(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    train.train(settings(tiny, tmp_path / "out", steps=2, grams_per_kwh=500.0))
    assert of_run(tmp_path / "out") is None and "Wh" not in capsys.readouterr().out
    assert "Energy" not in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_adds_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(energy, "SECONDS", 1e6)  # it is read at the end of a run without the thread
    out, totals = tmp_path / "out", []
    for again in (False, True):
        train.train(settings(tiny, out, steps=2000, time_limit=0.02, watts=100.0, resume=again))
        saved = run.load_checkpoint(out)[0]
        totals.append(Energy(*saved["energy"]))
        assert totals[-1].seconds == pytest.approx(saved["seconds"], rel=0.2, abs=0.2)
        assert totals[-1].estimated == pytest.approx(100 * totals[-1].seconds)
        assert of_run(out)["kwh"] > 1.002 * totals[-1].kwh and of_run(out)["share_of_time"] == 1.0  # with an evaluation
    assert totals[1].seconds > totals[0].seconds + 1 > 2
    train.train(settings(tiny, out, steps=2000, time_limit=0.02, resume=True))  # without --watts: unknown
    assert of_run(out)["kwh"] == float(f"{totals[1].kwh:.4g}") and of_run(out)["share_of_time"] < 1


def test_a_run_from_before_it_was_measured_goes_on(tiny, tmp_path, monkeypatch):
    """Its checkpoint says nothing of energy: what it took till then is unknown, and said to be."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    out, save = tmp_path / "out", run.save_checkpoint
    with monkeypatch.context() as before:
        before.setattr(run, "save_checkpoint", lambda out, model, optimizer, info: save(
            out, model, optimizer, {k: v for k, v in info.items() if k != "energy"} | {"seconds": 1000.0}))  # fmt: skip
        train.train(settings(tiny, out, steps=40, time_limit=1e-4))
    train.train(settings(tiny, out, steps=40, watts=100.0, resume=True))
    assert 0 < of_run(out)["share_of_time"] < 0.5


def test_the_first_rank_of_a_machine_counts_its_packages(rapl, lines, monkeypatch):
    found = []
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):  # two machines, which are one here
        launched(monkeypatch, rank, 4, local)
        with Meter(CPU, say=lines.append) as meter:
            rapl[0].write_text(str(int(rapl[0].read_text()) + 2_000_000))
            found.append(meter.read())
    assert [each.cpu for each in found] == [pytest.approx(2.0), 0.0, pytest.approx(2.0), 0.0]
    assert all(each.known == each.seconds > 0 for each in found)


def test_ranks_add_up(tiny, tmp_path, monkeypatch):
    """A run of one process, resumed in two, which take twice what their clock says; what was before counts once."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    few = dict(watts=100.0, steps=10**6, time_limit=0.03, batch=4)
    train.main(flags(tiny, tmp_path / "out", accum=4, **few))
    alone = run.load_checkpoint(tmp_path / "out")[0]["seconds"]
    done = torchrun(tiny, tmp_path / "out", accum=2, resume=True, **few)
    assert done.returncode == 0, done.stderr
    info = run.load_checkpoint(tmp_path / "out")[0]
    found = Energy(*info["energy"])
    assert found.seconds == pytest.approx(alone + 2 * (info["seconds"] - alone), rel=0.15)
    assert found.estimated == pytest.approx(100 * found.seconds) and found.known == found.seconds
    assert of_run(tmp_path / "out")["kwh"] == pytest.approx(found.kwh, rel=0.1)  # and of the last evaluation
