"""The cases of bench.py, the most important first, with the host's time; a shape's rows are written when it is done."""

import torch

from benches.gpu.ceilings import COPY_MIB
from benches.gpu.timing import timed
from benches.kernel_cases import CASES
from benches.kernels import WRONG, both_passes, providers_of
from benches.measure import copy_bandwidth, extra_memory_mib
from benches.report import attempt

FIRST = [("loss", 4915), ("linear", 4915), ("layernorm", 32768), ("loss", 32768), ("linear", 32768)]
LARGE = 8192  # rows above which Liger is left out of `warm`, whose stages share the GPU's memory


def compare(run):
    ceiling = None if run.warm else copy_bandwidth(run.device, 4 if run.tiny else COPY_MIB)
    order = [(case, shape) for case in CASES.values() for shape in case.shapes(run.device, run.tiny)]
    rank = {key: i for i, key in enumerate(FIRST)}
    order.sort(key=lambda x: (rank.get((x[0].name, x[1]["N"]), len(FIRST)), x[1].get("p") == 0.0))
    for case, shape in order:
        run.attempt(f"{case.name} {shape}", compare_shape, run, case, shape, ceiling)
        torch.cuda.empty_cache()


def compare_shape(run, case, shape, ceiling):
    torch._dynamo.reset()
    providers = providers_of(case, shape, run.device)
    if run.warm:  # torch.compile compiles for each shape; Liger's kernels do not depend on N
        providers = {name: f for name, f in providers.items()
                     if name != "eager" and not (name == "Liger" and shape["N"] > LARGE)}  # fmt: skip
    inputs, rows, running, truth = case.inputs(shape, run.device), {}, {}, None
    for provider, function in providers.items():
        rows[provider] = row = dict(case=case.name, provider=provider, shape=shape, dtype=shape["dtype"])
        with attempt(row):
            once = both_passes(function, case.prepared(provider, inputs), case.leaves, shape["dtype"])
            found = once()
            if provider == "eager" and not shape.get("p"):
                truth = found
            elif truth and not getattr(function, "computes_less", False):
                row["difference"] = max(largest_difference(f, t) for f, t in zip(found, truth, strict=True))
                if not row["difference"] <= WRONG[shape["dtype"]] and not run.null:
                    raise AssertionError(f"{row['difference']} from eager: a wrong result is not timed")
            del found
            row["peak_mib"] = round(extra_memory_mib(once, run.device), 1)
            running[provider] = once
        if "error" in row:
            run.failed += provider.startswith("ours")
            run.record(f"{case.name} {shape} {provider}", row.pop("traceback"))
    if run.warm:
        return
    del truth
    for provider, (ms, host) in timed(run, running, 7).items():
        speed = case.bytes(shape) / max(ms[1], 1e-9) / 1e6
        rows[provider] |= dict(ms=ms, gb_per_s=round(speed, 1), share_of_copy=round(speed / ceiling, 3), host_us=host)
    for row in rows.values():
        run.emit(**row)


def largest_difference(found, truth):
    scale = truth.abs().max().item() or 1.0
    return float(f"{(found - truth).abs_().max().item() / scale:.1e}")
