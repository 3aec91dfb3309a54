"""The plan of a GPU day, and the processes that run it. Needs no PyTorch."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

from benches import ROOT
from benches.gpu.prepare import FOLDER
from benches.gpu.summary import summary
from minidistil.errors import UserError

LAST = 10  # seconds that are kept for packing
REHEARSAL = 3  # factor on the time limits of a rehearsal on the null GPU, whose machine has few cores
START = 30  # seconds without output that a process may take beside `silence` until it has begun its first unit
FILE_MIB = 15  # size of a file in --out, at most
REPORTS = "reports"  # folder in --work of pytest's files and of scripts' output, packed at the end
STAGES = {  # name: module of benches.gpu that has a function of this name
    "ceilings": "ceilings", "smoke": "smoke", "sweeps": "sweeps", "compare": "compare", "world": "steps",
    "step": "steps", "profile": "steps", "demo": "steps", "tests": "tools", "tool": "tools", "probe": "tools",
    "script": "tools", "pretend": "rehearsal",
}  # fmt: skip
SWEEPS = ("loss", "linear", "norm", "attention", "chunks", "cosine")


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str  # FUNCTION or FUNCTION:PART; run.py knows the functions
    limit: float  # seconds, after which it is ended
    need: float = 12  # seconds that must be left for it to begin
    silence: float = 45  # seconds without output, after which it is restarted behind the unit in which it hung
    restarts: int = 2


# stages run one after the other, those of an inner list at once: they time nothing
FIRST = [
    [Stage("ceilings", 60), Stage("world", 90, silence=90)],
    [
        *(Stage(f"smoke:{kernel}", 90) for kernel in ("loss", "linear", "norm", "cosine")),
        Stage("tests:kernels", 100, silence=100, restarts=0),
        Stage("demo:finite", 80, silence=80),
        *(Stage(f"warm:sweeps/{part}", 80, silence=80) for part in SWEEPS),  # compilation of what is timed later
        Stage("warm:compare", 95, silence=95),
        Stage("warm:step", 95, silence=95),
    ],
    Stage("sweeps", 80),
    Stage("compare", 100, silence=60),
    Stage("step:ours, all rows", 45),
    Stage("step:ours, masked rows", 45),
    Stage("step:original's way", 50),
    Stage("step:ours, all rows, compiled", 75, need=30, silence=75),
    Stage("profile", 45, need=20),
    Stage("demo", 60, need=25, silence=60),
    Stage("step:ours, all rows, compiled, F.layer_norm", 75, need=40, silence=75),
    Stage("step:ours, all rows@128", 45, need=25),
    Stage("step:ours, masked rows@128", 45, need=25),
    Stage("step:original's way@128", 50, need=30),
]
SECOND = [
    Stage("world", 60),
    Stage("tool:ncu", 75, silence=75),
    [
        Stage("tool:compute-sanitizer/memcheck", 75, silence=75),
        Stage("tool:compute-sanitizer/racecheck", 75, silence=75),
        Stage("tests:others", 90, silence=90, restarts=0),
    ],
    Stage("step:ours, all rows@128", 40, need=20),
    Stage("step:ours, masked rows@128", 40, need=20),
    Stage("step:original's way@128", 45, need=20),
    Stage("step:ours, all rows, --batch 5 as it comes", 45, need=25),
    Stage("script:roofline", 40, need=15),
    Stage("script:lesson", 60, need=20, silence=60),
    Stage("step:ours, masked rows, compiled", 75, need=35, silence=75),
]
SKIPPED = "skipped: no time was left"


def flat(plan):
    return [stage for entry in plan for stage in (entry if isinstance(entry, list) else [entry])]


def tail(path, n):
    return path.read_text(errors="replace")[-n:] if path.exists() else ""


class Process:
    """A stage that runs, in a process group of its own."""

    def __init__(self, stage, command, environment, work, slack):
        self.stage, self.command, self.environment = stage, command, environment
        name = re.sub(r"[^A-Za-z0-9]+", "-", stage.name)
        self.log, self.begun = work / f"log-{name}", work / f"begun-{name}"
        for old in (self.log, self.begun):
            old.unlink(missing_ok=True)
        self.limit, self.silence = stage.limit * slack, stage.silence * slack
        self.began, self.starts = time.monotonic(), 0
        self.start()

    def start(self):
        self.starts += 1
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                [*self.command, "--stage", self.stage.name], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**self.environment, "GPU_DAY_BEGUN": str(self.begun)}, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        first = time.time() + START  # its imports write nothing
        os.utime(self.log, (first, first))

    def kill(self):
        # the GPU's driver may not let go of it: the day goes on without waiting
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)

    def unit(self):
        """The unit that it began last."""
        units = self.begun.read_text().splitlines() if self.begun.exists() else []
        return units[-1] if units else "before the first unit"


class Day:
    def __init__(self, settings):
        self.settings, self.began = settings, time.monotonic()
        self.out, self.work = pathlib.Path(settings.out), pathlib.Path(settings.work)
        self.state, self.status = self.work / "state.json", {}  # of the stages that have ended

    def before(self):
        """{stage: status} of the runs before this one."""
        return json.loads(self.state.read_text()) if self.state.exists() else {}

    def stages(self):
        return flat(self.plan())

    def plan(self):
        """The stages to run; the second run takes from state.json which stages the first one lost."""
        settings, known = self.settings, {stage.name: stage for stage in [*flat(SECOND), *flat(FIRST)]}
        if settings.only:
            chosen = [name.strip() for name in settings.only.split(";")]
            for name in chosen:
                if name.removeprefix("warm:").partition("/" if "warm:" in name else ":")[0] not in STAGES:
                    raise UserError(f"there is no stage {name}: choose from {', '.join(known)}")
            return [known.get(name) or Stage(name, settings.limit, silence=settings.limit / 4) for name in chosen]
        if settings.cpu:
            return [[stage for stage in flat(FIRST) if stage.name.startswith("smoke")]]
        if not settings.second:
            return FIRST
        before, again = self.before(), {stage.name: stage for stage in flat(FIRST)}
        lost = [name for name, status in before.items()
                if status not in ("ok", "failures") and name in again and not name.startswith("warm")]  # fmt: skip
        late = [name for name in lost if before[name] == SKIPPED]
        plan = [SECOND[0], *(again[name] for name in lost if name not in [*late, "world"]), *SECOND[1:]]
        return plan + [again[name] for name in late if name not in {stage.name for stage in flat(plan)}]

    def go(self):
        """Runs the plan; writes summary.md anew after each entry."""
        plan = self.plan()
        if not (self.settings.second or self.settings.only):  # a first run knows nothing of earlier ones
            self.state.unlink(missing_ok=True)
            shutil.rmtree(self.work / "world", ignore_errors=True)
        before = self.before()
        shutil.rmtree(self.work / REPORTS, ignore_errors=True)
        for folder in (self.out, self.work / REPORTS):
            folder.mkdir(parents=True, exist_ok=True)
        (self.out / "results.jsonl").touch()
        self.environment = self.environment_of_stages()
        self.say("; ".join(stage.name for stage in flat(plan)))
        watch = self.watch_card()
        try:
            for entry in plan:
                self.run(entry if isinstance(entry, list) else [entry])
                self.state.write_text(json.dumps(before | self.status))
                self.summarise()
        finally:
            if watch:
                watch.kill()
        self.pack()
        self.summarise()

    def environment_of_stages(self):
        """Variables of all stages. Caches are in the work folder; Liger's wheel is pure Python and only unpacked."""
        found = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", TOKENIZERS_PARALLELISM="false")
        for name, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
            found.setdefault(name, str(self.work / folder))
        for wheel in FOLDER.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(self.work / "site")
            path = [str(self.work / "site"), found.get("PYTHONPATH", "")]
            found["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        return found | ({"TRITON_INTERPRET": "1"} if self.settings.cpu else {})

    def left(self):
        return self.settings.budget - (time.monotonic() - self.began)

    def run(self, stages):
        """Runs stages at once until all have ended or have been ended."""
        threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"} if len(stages) > 1 else {}
        flags = [f"--{name}" for name in ("cpu", "tiny", "null", "sabotage") if getattr(self.settings, name)]
        command = [sys.executable, "-m", "benches.gpu", "--out", str(self.out), "--work", str(self.work)]
        command += ["--jobs", str(self.settings.jobs), *flags]
        slack, running = REHEARSAL if self.settings.null else 1, []
        try:
            for stage in stages:
                if self.left() < LAST + stage.need:
                    self.close(stage, SKIPPED)
                else:
                    running.append(Process(stage, command, self.environment | threads, self.work, slack))
            while running:
                time.sleep(0.1)
                running = [process for process in running if not self.over(process)]
        finally:
            for process in running:
                process.kill()

    def over(self, process):
        """Whether a process has ended for good. Kills it if it is late or silent; restarts it if it crashed or hung."""
        stage, code, took = process.stage, process.process.poll(), time.monotonic() - process.began
        late = took > process.limit or self.left() < LAST
        hung = code is None and not late and time.time() - process.log.stat().st_mtime > process.silence
        if code is None and not (late or hung):
            return False
        if code is None:
            process.kill()
        lost = hung or code not in (None, 0, 1)
        how = "hung" if hung else "out of time" if code is None else f"died with {code}"
        if lost or code is None:
            self.row(stage=stage.name, unit=process.unit(), status=how)
            with open(self.out / "failures.txt", "a") as file:
                file.write(f"\n======== {stage.name} | {process.unit()}: {how}\n{tail(process.log, 4000)}\n")
        if lost and not late and process.starts <= stage.restarts and took < process.limit - 5:
            process.start()
            return False
        status = {0: "ok" if process.starts == 1 else "failures", 1: "failures"}.get(code, how)
        self.close(stage, status, took, process)
        return True

    def close(self, stage, status, took=0.0, process=None):
        self.status[stage.name] = status
        starts = process.starts if process else 0
        card = (tail(self.work / "card", 300).splitlines() or [None])[-1]
        self.row(stage=stage.name, status=status, seconds=round(took, 1), starts=starts, card=card)
        self.say(f"{stage.name}: {status}, {took:.1f} s" + (f", started {starts} times" if starts > 1 else ""))
        with open(self.out / "log.txt", "a") as file:
            file.writelines(f"    | {line}\n" for line in (tail(process.log, 6000).splitlines() if process else ()))

    def watch_card(self):
        """Starts nvidia-smi, which writes the card's state once a second; each stage's row has the last line."""
        query = "clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-lms", "1000"]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        try:
            with open(self.work / "card", "w") as file:
                return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.DEVNULL)
        except OSError:
            return None

    def say(self, text):
        line = f"{time.monotonic() - self.began:6.1f} s  {text}"
        print(line, flush=True)
        with open(self.out / "log.txt", "a") as file:
            file.write(line + "\n")

    def row(self, **row):
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def summarise(self):
        try:
            text = summary(self.out / "results.jsonl")
        except Exception as error:  # the day goes on: the rows matter more
            text = f"the summary failed: {type(error).__name__}: {error}; results.jsonl has all rows"
        (self.out / "summary.md").write_text(text + "\n")

    def pack(self):
        """Packs the reports, and our kernels' PTX and cubins and Inductor's code; truncates files that are too long.

        A machine that is lent may return eight files and no more: there are never more than seven.
        """
        if reports := sorted((self.work / REPORTS).iterdir()):
            with tarfile.open(self.out / f"{REPORTS}.tar.gz", "w:gz") as tar:
                for path in reports:
                    tar.add(path, path.name)
        caches = [pathlib.Path(self.environment[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
        found = [p for p in caches[0].glob("*/_*.*") if p.suffix in (".ptx", ".cubin", ".json")]
        found += [p for p in caches[1].glob("*/*.py") if p.stat().st_size > 4000]
        packed, room = self.out / "code.tar.gz", 40 << 20
        with tarfile.open(packed, "w:gz", compresslevel=3) as tar:
            for path in sorted(found, key=lambda path: (path.suffix == ".py", path.stat().st_size)):
                room -= path.stat().st_size
                if room > 0 and self.left() > 2 and packed.stat().st_size < (FILE_MIB - 1) << 20:
                    tar.add(path, f"{path.parent.name}/{path.name}")
        for path in self.out.iterdir():
            if path.stat().st_size > FILE_MIB << 20:
                path.unlink() if path.suffix == ".gz" else os.truncate(path, FILE_MIB << 20)
