"""Updates of train.py at full size, their profile, and the demo."""

import contextlib
import gzip
import shutil
import sys
import time

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import benches.step
import train
from benches.gpu import prepare, rehearsal, variants
from benches.gpu.targets import DEMO_TOP1
from minidistil.run import read_metrics

nothing = contextlib.nullcontext
STEPS = {  # settings of train.py, and what is replaced meanwhile
    "ours, all rows": ({}, nothing),
    "ours, masked rows": (dict(kd_rows="masked"), nothing),
    "ours, all rows, compiled": (dict(compile=True), nothing),
    "ours, masked rows, compiled": (dict(kd_rows="masked", compile=True), nothing),
    "ours, all rows, compiled, F.layer_norm": (dict(compile=True), variants.plain_norm),
    "ours, all rows, no kernels": ({}, benches.step.without_kernels),
    "ours, all rows, --batch 5 as it comes": (dict(micro_batch="5"), nothing),
}
ORIGINAL = "original's way"


def shape_of(run, T=512):
    shapes = [benches.step.TINY_STEP] if run.tiny else benches.step.GPU_STEPS
    return next((shape for shape in shapes if shape["T"] == T), shapes[0])


def world(run):
    """The folder of the step's teacher and corpus, made once, and renamed when it is complete."""
    folder = run.work / ("tiny" if run.tiny else "world")
    if not folder.exists():
        partly = folder.with_suffix(f".{time.time_ns()}")
        shape = shape_of(run)
        benches.step.make_teacher(partly / "teacher", shape)
        if run.tiny:
            benches.step.make_corpus(partly / "corpus", shape, 40_000)
        else:
            prepare.make_corpora()
            (partly / "corpus").symlink_to(prepare.FOLDER / "corpus")
        try:
            partly.rename(folder)
        except OSError:  # another stage was first
            shutil.rmtree(partly)
    if run.null:
        rehearsal.accept_all_numbers()
    return folder


def step(run):
    """One provider's updates: tokens/s from the second on, peak memory, losses."""
    provider, _, T = run.part.partition("@")
    folder, shape = world(run), shape_of(run, int(T or 512)) | dict(updates=1 if run.warm else 4)
    if run.warm:
        provider = "ours, all rows, compiled"
    if provider == ORIGINAL:
        found = benches.step.original(folder, shape | dict(updates=min(2, shape["updates"])), str(run.device))
    else:
        flags, context = STEPS[provider]
        with context():
            found = benches.step.ours(folder, shape, str(run.device), flags)
    found["tokens_per_second"] = round(found["tokens_per_second"], 1)
    run.emit(case="step", provider=provider, shape=shape, **found)


def profile(run):
    """One update of all rows: kernels by time, and a trace for chrome://tracing."""
    folder, shape = world(run), shape_of(run) | dict(updates=3)
    profiler = torch.profiler.profile()
    at, done = {2: profiler.start, 3: profiler.stop}, []

    def hook(*_):
        torch.cuda.synchronize()
        done.append(None)
        at.get(len(done), nothing)()

    handle = register_optimizer_step_post_hook(hook)
    try:
        benches.step.ours(folder, shape, str(run.device), {})
    finally:
        handle.remove()
    events = [event for event in profiler.key_averages()
              if event.self_device_time_total > 0 and event.device_type != torch.autograd.DeviceType.CPU]  # fmt: skip
    total = sum(event.self_device_time_total for event in events) or 1
    run.emit(unit="profile", device_ms=round(total / 1e3, 2))
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:60]:
        us = event.self_device_time_total
        run.emit(unit="kernel", name=event.key[:120], count=event.count, us=round(us, 1), share=round(us / total, 4))
    profiler.export_chrome_trace(str(run.work / "trace.json"))
    with open(run.work / "trace.json", "rb") as plain, gzip.open(run.out / "trace.json.gz", "wb", 6) as packed:
        shutil.copyfileobj(plain, packed)


def demo(run):
    """Part `finite`: a few updates in each dtype; else the whole demo and its accuracy."""
    if run.null:
        rehearsal.accept_all_numbers()
    if run.part == "finite":
        for dtype in ("bf16", "fp16", "fp32"):
            run.attempt(f"demo, {dtype}", short_demo, run, dtype)
    else:
        run.attempt("demo", whole_demo, run)


def demo_run(run, **flags):
    """train.py's summary, and the losses of its updates."""
    out = run.work / f"demo-{time.time_ns()}"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            summary = train.train(train.Settings(**{**train.DEMO, "device": str(run.device), "out": str(out), **flags}))
        return summary, [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def short_demo(run, dtype):
    summary, losses = demo_run(run, dtype=dtype, steps=4 if run.tiny else 30, eval_tokens=1024 if run.tiny else 4096)
    run.emit(unit=f"demo, {dtype}", losses=[losses[0], losses[-1]], peak_mib=summary["peak_gpu_mib"])
    if not run.null and not sum(losses[-5:]) < sum(losses[:5]) and not run.tiny:
        raise AssertionError(f"losses do not fall: {losses}")


def whole_demo(run):
    summary, _ = demo_run(run, dtype="bf16", **({"steps": 20} if run.null or run.tiny else {}))
    top1 = summary["student"]["top1"]
    names = ("seconds", "tokens_per_second", "teacher", "student")
    run.emit(unit="demo", top1=top1, **{name: summary[name] for name in names})
    if abs(top1 - DEMO_TOP1) > 0.005 and not run.tiny:
        raise AssertionError(f"top-1 is {top1}, on a CPU {DEMO_TOP1}")
