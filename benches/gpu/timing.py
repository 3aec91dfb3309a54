"""Times of several configurations or providers, taken in turn."""

import statistics
import time
import traceback

import torch

from benches.gpu.run import first_line
from benches.measure import interleaved, spread


def timed(run, functions, rounds, before=None):
    """{name: ([p20, p50, p80] ms of the device, us of the host)}."""
    host = {name: [] for name in functions}

    def watched(name, function):
        def call():
            start = time.perf_counter()
            function()
            host[name].append(1e6 * (time.perf_counter() - start))

        return call

    watch = {name: watched(name, function) for name, function in functions.items()}
    times = interleaved(watch, 2 if run.null or run.tiny else rounds, run.device, before)
    return {name: ([round(x, 4) for x in spread(times[name])], round(statistics.median(host[name]))) for name in times}


def sweep(run, unit, functions, default, rounds=15, before=None, **more):
    """Times configurations in turn, the default twice to show the noise, and emits one row. Failures are left out."""
    running, failed = {}, {}
    for name, function in functions.items():
        try:
            if before:
                before()
            function()  # compiles
            torch.cuda.synchronize()
            running[name] = function
        except Exception as error:
            failed[name] = first_line(error)
            run.failed += name == default
            run.record(f"{unit}, {name}", traceback.format_exc())
    if default in running:
        running["default again"] = running[default]
    if run.warm:
        return
    times = timed(run, running, rounds, before)
    run.emit(unit=unit, default=default, ms={name: ms for name, (ms, _) in times.items()}, failed=failed, **more)
