"""The cases of bench.py, the most important first, with the host's time; a shape's rows are written when it is done."""

import traceback

import torch

import bench
from benches.gpu.ceilings import COPY_MIB
from benches.gpu.run import first_line
from benches.gpu.timing import timed
from kernels.cases import CASES
from minidistil.measure import copy_bandwidth, extra_memory_mib

FIRST = [("loss", 4915), ("linear", 4915), ("layernorm", 32768), ("loss", 32768), ("linear", 32768)]
AS_IT_COMES = "ours, rows as PyTorch makes them"  # those of `ours` are padded
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
    providers = bench.providers_of(case, shape, run.device)
    if case.name == "loss":
        providers[AS_IT_COMES] = case.ours
    if run.warm:  # torch.compile compiles for each shape; Liger's kernels do not depend on N
        providers = {name: f for name, f in providers.items()
                     if name != "eager" and not (name == "Liger" and shape["N"] > LARGE)}  # fmt: skip
    inputs, rows, running, truth = case.inputs(shape, run.device), {}, {}, None
    for provider, function in providers.items():
        rows[provider] = row = dict(case=case.name, provider=provider, shape=shape, dtype=shape["dtype"], ms=None)
        try:
            once = repeatable(function, case.prepared(provider, inputs), case.leaves, shape["dtype"])
            found = once()
            if provider == "eager" and not shape.get("p"):
                truth = found
            elif truth and not getattr(function, "computes_less", False):
                row["difference"] = max(largest_difference(f, t) for f, t in zip(found, truth, strict=True))
                if not row["difference"] <= bench.WRONG[shape["dtype"]] and not run.null:
                    raise AssertionError(f"{row['difference']} from eager: a wrong result is not timed")
            del found
            row["peak_mib"] = round(extra_memory_mib(once, run.device), 1)
            running[provider] = once
        except torch.OutOfMemoryError:
            row["peak_mib"] = "OOM"
        except Exception as error:
            row["peak_mib"], row["error"] = "failed", first_line(error)
            run.failed += provider.startswith("ours")
            run.record(f"{case.name} {shape} {provider}", traceback.format_exc())
    if run.warm:
        return
    del truth
    for provider, (ms, host) in timed(run, running, 7).items():
        speed = case.bytes(shape) / max(ms[1], 1e-9) / 1e6
        row = dict(ms=ms, gb_per_s=round(speed, 1), share_of_copy=round(speed / ceiling, 3), host_us=host)
        rows[provider].update(row)
    for row in rows.values():
        run.emit(**row)


def repeatable(function, inputs, leaves, dtype):
    """A function that runs a forward and backward pass and returns the gradients; its inputs are made here, untimed."""
    inputs = [x.detach().requires_grad_(i in leaves) if torch.is_tensor(x) else x for i, x in enumerate(inputs)]
    wanted, upstream = [inputs[i] for i in leaves], []

    def once():
        with torch.autocast(wanted[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = function(*inputs)
        if not upstream:
            upstream.append(torch.ones_like(output))
        return torch.autograd.grad(output, wanted, upstream[0])

    return once


def largest_difference(found, truth):
    scale = truth.abs().max().item() or 1.0
    return float(f"{(found - truth).abs_().max().item() / scale:.1e}")
