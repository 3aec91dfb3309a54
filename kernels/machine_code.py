"""What a compiled kernel executes, read off its machine code: no GPU, driver or toolkit is needed.

Triton's wheel brings ptxas, cuobjdump and nvdisasm. Instruction counts are static: of the loops where a kernel has
them, else of the whole kernel (which counts the masked tail, too).
"""

import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, types, constants, warps, architecture):
    """Compiles as the launcher would: pointers and 32-bit integers, unless marked `any`, are divisible by 16.

    types {argument: "*bf16", "i64", "i32", "i32:any" ...}, constants {argument: value} of the others; `architecture` is
    sm_80, sm_90 ... or an AMD one such as gfx942.
    """
    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), (set(types) | set(constants)) ^ set(names)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr").split(":")[0] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, type in types.items()
               if type == "i32" or (type[0] == "*" and not type.endswith(":any"))},
    )  # fmt: skip
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options={"num_warps": warps})


def tool(name, *arguments):
    """Runs a tool of Triton's wheel; returns (exit status, its output)."""
    done = subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def spilled(ptx, folder):
    """Bytes that do not fit in registers, by whichever of the bundled assemblers knows this version of PTX."""
    (folder / "k.ptx").write_text(ptx)
    target = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    for name in ("ptxas", "ptxas-blackwell"):
        if (TOOLS / name).exists():
            code, text = tool(name, "-v", f"--gpu-name={target}", folder / "k.ptx", "-o", folder / "again.cubin")
            found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
            if code == 0 and found:
                return int(found[1]) + int(found[2])
    raise RuntimeError(f"no assembler for {target}: {text}")


def instructions(sass):
    """(opcodes inside loops, all opcodes); a loop ends with a branch to a label above it."""
    lines = [x for x in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", x) or re.match(r"\.L_x_\d+:", x)]
    labels = {x.split(":")[0]: i for i, x in enumerate(lines) if x.startswith(".L_x_")}
    opcode = re.compile(r"\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)")
    inside = set()
    for i, line in enumerate(lines):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch[1], i) < i - 20:  # shorter ones only wait for ever
            inside |= set(range(labels[branch[1]], i + 1))
    found = [(i, m[1]) for i, line in enumerate(lines) if (m := opcode.search(line))]
    return [op for i, op in found if i in inside], [op for _, op in found]


def products(ttir):
    """(32-bit, 64-bit) products of two numbers that are known at run time only, as row * stride is."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    found = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+x)?(i32|i64)", ttir)
    bits = [of for *factors, of in found if not constants & set(factors)]
    return bits.count("i32"), bits.count("i64")


def figures(kernel, types, constants, warps, elements, architecture):
    """Returns what one program does per element: instructions, registers, spills; waits in loops; widths of accesses.

    `elements` are those of a program, or of a step of its loop. Arguments as of `compiled`.
    """
    k = compiled(kernel, types, constants, warps, architecture)
    of_type = products(k.asm["ttir"])
    if architecture.startswith("gfx"):
        text = k.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        loads = sorted(set(re.findall(r"(?:global|buffer)_load_\w+", text)))
        stores = sorted(set(re.findall(r"(?:global|buffer)_store_\w+", text)))
        return dict(
            registers=number["vgpr_count"],
            spilled=number["vgpr_spill_count"],
            loads=loads,
            stores=stores,
            products=of_type,
        )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "k.cubin").write_bytes(k.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage", folder / "k.cubin")[1])[1])
        bytes_spilled = spilled(k.asm["ptx"], folder)
        loop, whole = instructions(tool("nvdisasm", "-c", folder / "k.cubin")[1])
    ops, per_thread = loop or whole, elements / (32 * warps)
    return dict(
        registers=registers,
        spilled=bytes_spilled,
        products=of_type,
        shared=k.metadata.shared,
        where="loops" if loop else "whole kernel",
        instructions=round(len(ops) / per_thread, 1),
        mufu=round(sum(op.startswith("MUFU") for op in ops) / per_thread, 1),
        barriers=sum(op.startswith("BAR") for op in loop),
        loads=sorted({op for op in ops if op.startswith("LDG")}),
        narrow_loads=sum(op.startswith("LDG") and not op.endswith(("128", "256")) for op in whole),
        stores=sorted({op for op in whole if op.startswith("STG")}),
    )
