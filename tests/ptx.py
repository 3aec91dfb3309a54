"""Executes the PTX of Triton's kernels on a CPU, thread by thread: what a GPU is asked to do, without a GPU.

    ptx.install("sm_90")    launches from now on compile for that architecture and run here, on CPU tensors

The interpreter of Triton runs a kernel's source, a block at a time. This runs what the compiler made of it, with its
shared memory, barriers and asynchronous copies, and says where a GPU could do something else:

* two threads that use the same bytes with nothing in between that makes one wait for the other, one of them writing;
* an address outside the arguments' tensors, or off the boundary that the width of the access needs;
* shared memory that is read before it is written, or before an asynchronous copy into it is known to have ended (NaN).

Approximate instructions (ex2, div.full, sqrt.approx ...) are off by as many units in the last place as NVIDIA's manual
allows, as a hash of their operands says. Up to LANES threads advance together; where they take different ways, those
behind go first. Programs beyond these follow later, so that a race of two programs is found among neighbours only.

    MINIDISTIL_PTX=sm_90 python -m pytest tests/test_layer_norm.py      the tests of a kernel, with its PTX

Source: NVIDIA, Parallel Thread Execution ISA.
"""

import ctypes
import functools
import operator
import re

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from kernels.machine_code import compiled

LANES = 4096  # threads that run at once: whole programs, at least one
POISON = 0xFF  # byte of memory that nothing has written: NaN in every float type
SMALLEST = np.float32(2.0**-126)  # normal number
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
BITS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}  # of the registers %p1, %rs1 ...
ULPS = {"ex2": 2, "lg2": 2, "div": 2, "sqrt": 1, "rsqrt": 1, "rcp": 1}  # of the approximate instructions
MIX = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B)  # odd factors, whose products look random
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}  # fmt: skip
# of fp32, and of halves as fp32; a product of two fp32 is exact in fp64
FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "fma": lambda a, b, c: (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32),
    # of two, or of three from sm_100 on
    "max": lambda *x: functools.reduce(np.fmax, x), "NaN max": lambda *x: functools.reduce(np.maximum, x),
    "min": lambda *x: functools.reduce(np.fmin, x), "NaN min": lambda *x: functools.reduce(np.minimum, x),
}  # fmt: skip
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def dtype_of(suffix):
    """numpy's type of a PTX type: u32, s64, f32, b16 ..."""
    if suffix == "pred":
        return np.dtype(np.bool_)
    kind, bits = suffix[0], int(suffix[1:])
    return np.dtype({"u": "u", "b": "u", "s": "i", "f": "f"}[kind] + str(bits // 8))


class Code:
    """The instructions of a kernel: (predicate, which may be empty, whether it is negated, opcode, operands)."""

    def __init__(self, text):
        body = text[text.index(".entry") :]
        header, body = body.split("{", 1)
        self.threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header)[1])
        self.params = re.findall(r"\.param\s+\.(\w+)\s+[^,)]*?(\w+)\s*[,)]", header)
        body = re.sub(r"//.*", "", body[: body.index("\n}")])
        self.labels, self.instructions = {}, []
        for line in re.sub(r"\.(reg|loc|file|pragma)\b[^;\n]*;?", "", body).splitlines():
            for word in re.findall(r"[$\w]+:(?!:)|[^;]+;", line):
                word = word.strip().rstrip(";").strip()
                if word.endswith(":"):
                    self.labels[word[:-1]] = len(self.instructions)
                elif word not in ("", "{", "}"):
                    guard, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", word, re.DOTALL).groups()
                    opcode, _, operands = rest.partition(" ") if " " in rest else rest.partition("\t")
                    guard = (guard or "").lstrip("!"), (guard or "").startswith("!")
                    found = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
                    self.instructions.append((*guard, opcode.strip(), found))


class Memory:
    """Bytes at addresses; a GPU's shared memory, or the tensors of a launch."""

    def __init__(self, places):
        """places: [(first address, uint8 array)], which do not overlap."""
        self.places = sorted(places, key=lambda place: place[0])
        self.starts = np.array([start for start, _ in self.places], np.uint64)

    def each(self, addresses, size):
        """Yields (indices into `addresses`, offsets, array) of the accesses of `size` bytes to each place."""
        if (addresses % np.uint64(size)).any():
            raise AssertionError(f"an access of {size} bytes is not aligned")
        number = np.searchsorted(self.starts, addresses, "right") - 1
        for n in np.unique(number):
            start, array = self.places[n]
            which = slice(None) if number[0] == n and (number == n).all() else (number == n).nonzero()[0]
            offsets = (addresses[which] - np.uint64(start)).astype(np.int64)
            if n < 0 or (offsets + size > len(array)).any():
                raise AssertionError(f"an access of {size} bytes is outside of every tensor")
            yield which, offsets, array

    def read(self, addresses, width, count):
        """Numbers of `width` bytes, `count` in a row at each address: (count, addresses)."""
        found = np.empty((count, len(addresses)), f"u{width}")
        for which, offsets, array in self.each(addresses, width * count):
            typed, first = array[: len(array) // width * width].view(f"u{width}"), offsets // width
            for i in range(count):
                found[i, which] = typed[first + i]
        return found

    def write(self, addresses, values):
        width, count = values.itemsize, len(values)
        for which, offsets, array in self.each(addresses, width * count):
            typed, first = array[: len(array) // width * width].view(f"u{width}"), offsets // width
            for i in range(count):
                typed[first + i] = values[i, which]


class Races:
    """Accesses to memory in the order of time, and which of them nothing orders."""

    def __init__(self):
        self.accesses = []  # (cells of 2 bytes, lane, epochs of its program and of its warp, whether it writes, where)

    def note(self, at, addresses, size, lanes, epochs, writes):
        cells = (addresses.astype(np.int64)[:, None] + np.arange(0, size, 2)) >> 1
        n = cells.shape[1]
        of_lanes = (np.repeat(x, n) for x in (lanes, *epochs))
        self.accesses.append((cells.ravel(), *of_lanes, np.full(cells.size, writes), np.full(cells.size, at)))

    def found(self, threads, between_programs):
        """Yields (sentence about what may happen in any order, numbers of such instructions)."""
        if not self.accesses:
            return
        cell, lane, epoch, of_warp, writes, at = (np.concatenate(x) for x in zip(*self.accesses, strict=True))
        program, warp = lane // threads, lane // 32
        # a barrier orders a program's threads, and what a whole warp must reach, such as a shuffle, those of the warp
        for who, of, keys in (
            ("programs", program if between_programs else np.zeros_like(program), [cell]),
            ("warps", warp, [cell, program, epoch]),
            ("threads of a warp", lane, [cell, warp, epoch, of_warp]),
        ):
            if len(both := self.unordered(keys, of, writes, at)):
                yield f"{who} use the same bytes with nothing in between, and one of them writes", both

    @staticmethod
    def unordered(keys, who, writes, at):
        """The instructions by which different ones of `who` use what has the same `keys`, one of them writing."""
        order = np.lexsort(keys[::-1])
        keys, who, writes = [key[order] for key in keys], who[order], writes[order]
        starts = np.flatnonzero(np.r_[True, np.any([key[1:] != key[:-1] for key in keys], axis=0)])
        several = np.minimum.reduceat(who, starts) != np.maximum.reduceat(who, starts)
        bad = several & np.logical_or.reduceat(writes, starts)
        return np.unique(at[order][np.repeat(bad, np.diff(np.r_[starts, len(who)]))])


def kind_of(register):
    return np.dtype(BITS[re.match(r"%([a-z]+)", register)[1]])


class Registers(dict):
    """{name: the value of each thread}; NaN where nothing was written."""

    def __init__(self, lanes):
        self.lanes = lanes

    def __missing__(self, name):
        return np.full(self.lanes, ~np.zeros((), kind_of(name)))


class Launch:
    """Some programs of a launch, side by side: registers are arrays of one value per thread."""

    def __init__(self, code, grid, programs, arguments, memory, shared):
        self.code, self.memory = code, memory
        self.lanes = len(programs) * code.threads
        lane = np.arange(self.lanes)
        self.program, thread = np.divmod(lane, code.threads)
        of_grid = np.array(np.unravel_index(np.asarray(programs), grid[::-1]))[::-1].astype(np.uint32)
        self.special = {"%tid.x": thread.astype(np.uint32), "%ntid.x": np.uint32(code.threads),
                        "%laneid": (thread % 32).astype(np.uint32)}  # fmt: skip
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = of_grid[axis][self.program]
            self.special[f"%nctaid.{name}"] = np.uint32(grid[axis])
            if axis:
                self.special |= {f"%tid.{name}": np.uint32(0), f"%ntid.{name}": np.uint32(1)}
        self.arguments, self.registers = arguments, Registers(self.lanes)
        room = max(16, -(-shared // 16) * 16)
        self.window = np.uint64(room) * self.program.astype(np.uint64)  # where a program's shared memory begins
        self.shared = Memory([(0, np.full(room * len(programs), POISON, np.uint8))])
        self.copies = []  # asynchronous: (lanes, numbers of their groups, addresses, values)
        self.groups = np.zeros(self.lanes, np.int64)  # that each thread has closed
        self.epochs = [np.zeros(self.lanes, np.int64) for _ in ("program", "warp")]
        self.races = {"global": Races(), "shared": Races()}
        self.steps = [self.step(*instruction) for instruction in code.instructions]

    def run(self):
        """Executes the kernel and returns what it found to be unordered."""
        ready, waiting, gone = {0: np.ones(self.lanes, bool)}, {}, np.zeros(self.lanes, bool)
        while ready:
            at = min(ready)
            active = ready.pop(at)
            while True:
                if at in ready:
                    active = active | ready.pop(at)
                elif ready and at > min(ready):
                    ready[at] = active
                    break
                guard, negated, opcode, operands = self.code.instructions[at]
                on = active if not guard else active & (self.registers[guard] ^ negated)
                at += 1
                if opcode.startswith("bra"):
                    if on.any():
                        target = self.code.labels[operands[0]]
                        ready[target] = ready.get(target, False) | on
                    active = active & ~on
                    if not active.any():
                        break
                elif opcode in ("ret", "exit"):
                    gone |= on
                    active = active & ~on
                    if not active.any():
                        break
                elif opcode in ("bar.sync", "barrier.sync"):
                    waiting[at] = waiting.get(at, False) | on
                    there = functools.reduce(np.bitwise_or, waiting.values()) | gone
                    whole = np.bincount(self.program, there) == self.code.threads
                    active = waiting[at] & whole[self.program]
                    waiting[at] = waiting[at] & ~active
                    self.epochs[0][active] += 1
                    if not active.any():
                        break
                elif on.any():
                    self.at = at - 1
                    self.steps[self.at](on)
        if any(lanes.any() for lanes in waiting.values()):
            raise AssertionError("threads wait at a barrier that others of their program never reach")
        return [
            f"{name} memory: {text}: {[' '.join(map(str, self.code.instructions[i][2:])) for i in where[:4]]}"
            for name, races in self.races.items()
            for text, where in races.found(self.code.threads, name == "global")
        ]

    # ---- operands

    def get(self, operand, dtype):
        """A function that returns the operand as `dtype`: an array of all threads, or a number."""
        if operand in self.special:
            value = self.special[operand]
            return lambda: value
        if operand.startswith("%"):
            if kind_of(operand).itemsize == dtype.itemsize:
                return lambda: self.registers[operand].view(dtype)
            return lambda: self.registers[operand].astype(f"u{dtype.itemsize}").view(dtype)  # its lower part
        if operand == "global_smem":
            return lambda: dtype.type(0)
        if float_bits := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
            bits = int(float_bits[1], 16)
        else:
            bits = int(operand.rstrip("U"), 0)
        value = np.array(bits % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]
        return lambda: value

    def put(self, name, value, on):
        """Sets a register of the threads `on`."""
        dtype = kind_of(name)
        value = np.asarray(value)
        if value.itemsize != dtype.itemsize:  # a wider register gets the sign, or zeros
            value = value.astype(f"{value.dtype.kind}{dtype.itemsize}")
        value = value.view(dtype) if value.dtype != dtype else value
        value = np.broadcast_to(value, self.lanes) if value.ndim == 0 else value
        if not on.all():
            value = np.where(on, value, self.registers[name])
        self.registers[name] = value if value.strides[0] else value.copy()

    def address(self, operand, shared=False):
        """A function that returns the addresses that [register + offset] names, as uint64."""
        base, offset = re.fullmatch(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        offset = np.uint64(int(offset or "0", 0) % 2**64)
        if base == "global_smem":
            return lambda: self.window + offset
        found = self.get(base, np.dtype("u4" if shared else "u8"))
        if shared:
            return lambda: found().astype(np.uint64) + offset + self.window
        return lambda: found() + offset

    def note(self, space, addresses, size, lanes, writes):
        self.races[space].note(self.at, addresses, size, lanes, [epoch[lanes] for epoch in self.epochs], writes)

    # ---- instructions

    def step(self, guard, negated, opcode, operands):
        """A function that executes an instruction for the threads `on`."""
        parts = opcode.split(".")
        if parts[0] in ("bra", "ret", "exit") or opcode in ("bar.sync", "barrier.sync"):
            return None
        name = "cp_async" if opcode.startswith("cp.async") else parts[0]
        try:
            return getattr(self, f"do_{name}")(parts, operands)
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise NotImplementedError(f"{opcode} {operands}: {error}") from error

    def pure(self, function, operands, dtype):
        """An instruction that computes operands[0] from the others, all of them of `dtype`."""
        to, gets = operands[0], [self.get(x, dtype) for x in operands[1:]]
        return lambda on: self.put(to, function(*(get() for get in gets)), on)

    def do_mov(self, parts, operands):
        to, of = operands
        if of.startswith("{"):  # the first is the lowest
            names = re.findall(r"[^\s,{}]+", of)
            small = np.dtype(f"u{dtype_of(parts[-1]).itemsize // len(names)}")
            gets = [self.get(name, small) for name in names]

            def join(on):
                pieces = [np.broadcast_to(get(), self.lanes) for get in gets]
                self.put(to, np.stack(pieces, -1).view(f"u{small.itemsize * len(names)}")[:, 0], on)

            return join
        get = self.get(of, dtype_of(parts[-1]))
        if to.startswith("{"):
            names = re.findall(r"[^\s,{}]+", to)
            small = f"u{dtype_of(parts[-1]).itemsize // len(names)}"

            def split(on):
                pieces = np.ascontiguousarray(np.broadcast_to(get(), self.lanes)).view(small).reshape(self.lanes, -1)
                for i, name in enumerate(names):
                    if name != "_":
                        self.put(name, pieces[:, i].copy(), on)

            return split
        return lambda on: self.put(to, get(), on)

    def do_ld(self, parts, operands):
        if parts[1] == "param":
            value, dtype = self.arguments[re.fullmatch(r"\[(\w+)\]", operands[1])[1]], dtype_of(parts[-1])
            bits = np.frombuffer(value[: dtype.itemsize], f"{'i' if dtype.kind == 'i' else 'u'}{dtype.itemsize}")[0]
            return lambda on: self.put(operands[0], bits, on)
        shared, width = parts[1] == "shared", dtype_of(parts[-1]).itemsize
        names, find = re.findall(r"%\w+", operands[0]), self.address(operands[1], shared)
        memory, space = (self.shared, "shared") if shared else (self.memory, "global")

        def load(on):
            lanes = on.nonzero()[0]
            addresses = find()[lanes]
            self.note(space, addresses, width * len(names), lanes, False)
            for name, values in zip(names, memory.read(addresses, width, len(names)), strict=True):
                whole = np.zeros(self.lanes, values.dtype)
                whole[lanes] = values
                self.put(name, whole, on)

        return load

    def do_st(self, parts, operands):
        shared, dtype = parts[1] == "shared", np.dtype(f"u{dtype_of(parts[-1]).itemsize}")
        find, names = self.address(operands[0], shared), re.findall(r"[^\s,{}]+", operands[1])
        gets, (memory, space) = [self.get(x, dtype) for x in names], (
            (self.shared, "shared") if shared else (self.memory, "global"))  # fmt: skip

        def store(on):
            lanes = on.nonzero()[0]
            addresses = find()[lanes]
            values = np.stack([np.broadcast_to(get(), self.lanes)[lanes] for get in gets])
            # all threads that hold a value may store it, and copies of a sum differ by rounding: they count as one
            program = (lanes // self.code.threads).astype(np.uint64) << np.uint64(48)
            once = np.unique(addresses + program, return_index=True)[1]
            self.note(space, addresses[once], dtype.itemsize * len(gets), lanes[once], True)
            memory.write(addresses, values)

        return store

    def do_ldmatrix(self, parts, operands):
        """Matrices of 8 x 8 halves, whose 16-byte rows eight threads each name: a thread gets four bytes of a row."""
        names, find, lane = re.findall(r"%\w+", operands[0]), self.address(operands[1], True), np.arange(self.lanes)

        def load(on):
            addresses, lanes = np.broadcast_to(find(), self.lanes), on.nonzero()[0]
            for m, name in enumerate(names):
                rows = addresses[lane // 32 * 32 + 8 * m + lane % 32 // 4]
                if (rows % np.uint64(16)).any():
                    raise AssertionError("a row of a matrix is not aligned")
                places = (rows + np.uint64(4) * (lane % 4).astype(np.uint64))[lanes]
                self.note("shared", places, 4, lanes, False)
                whole = np.zeros(self.lanes, np.uint32)
                whole[lanes] = self.shared.read(places, 4, 1)[0]
                self.put(name, whole, on)

        if "trans" in parts or "m8n8" not in parts:
            raise KeyError(".".join(parts))
        return load

    def do_cp_async(self, parts, operands):
        if parts[2] == "commit_group":
            return lambda on: self.groups.__iadd__(on)
        if parts[2] in ("wait_group", "wait_all"):
            most = int(operands[0]) if operands else 0

            def wait(on):
                copies, self.copies = self.copies, []
                for lanes, groups, addresses, values in copies:
                    ended = on[lanes] & (groups < self.groups[lanes] - most)
                    self.note("shared", addresses[ended], len(values) * values.itemsize, lanes[ended], True)
                    self.shared.write(addresses[ended], values[:, ended])
                    if not ended.all():
                        self.copies.append((lanes[~ended], groups[~ended], addresses[~ended], values[:, ~ended]))

            return wait
        to, of, size = self.address(operands[0], True), self.address(operands[1]), int(operands[2], 0)
        wanted = self.get(operands[3], np.dtype("u4")) if len(operands) > 3 else lambda: np.uint32(size)
        word = min(size, 4)

        def copy(on):
            lanes, filled = on.nonzero()[0], np.broadcast_to(wanted(), self.lanes)
            values, addresses = np.zeros((size // word, len(lanes)), f"u{word}"), to()[lanes]
            some = filled[lanes] == size
            if not (some | (filled[lanes] == 0)).all():
                raise AssertionError("part of an asynchronous copy is zeros")
            if some.any():
                values[:, some] = self.memory.read(of()[lanes[some]], word, size // word)
                self.note("global", of()[lanes[some]], size, lanes[some], False)
            self.note("shared", addresses, size, lanes, True)  # it may end at any time from now on
            self.shared.write(addresses, np.full_like(values, 2 ** (8 * word) - 1))
            self.copies.append((lanes, self.groups[lanes], addresses, values))

        return copy

    def do_createpolicy(self, parts, operands):  # of a cache: no result depends on it
        return lambda on: self.put(operands[0], np.uint64(0), on)

    def do_shfl(self, parts, operands):
        kind, to, get = parts[2], operands[0].split("|")[0], self.get(operands[1], np.dtype("u4"))
        other = self.get(operands[2], np.dtype("u4"))
        lane = np.arange(self.lanes)

        def shuffle(on):
            with_whom = np.broadcast_to(other(), self.lanes).astype(np.int64)
            source = lane ^ with_whom if kind == "bfly" else lane // 32 * 32 + with_whom % 32
            if not on[source][on].all():
                raise AssertionError("a thread takes a value of one that does not take part")
            self.epochs[1] += on
            self.put(to, np.broadcast_to(get(), self.lanes)[source], on)

        if kind not in ("bfly", "idx"):
            raise KeyError(kind)
        return shuffle

    def do_redux(self, parts, operands):
        """The maximum, sum ... of a value of all threads of a warp."""
        dtype, get = dtype_of(parts[-1]), self.get(operands[1], dtype_of(parts[-1]))
        function = {"max": np.fmax, "min": np.fmin, "add": np.add, "NaN max": np.maximum, "NaN min": np.minimum}[
            "NaN " * ("NaN" in parts) + parts[2]
        ]

        def reduce(on):
            if not (on.reshape(-1, 32).all(1) == on.reshape(-1, 32).any(1)).all():
                raise AssertionError("some threads of a warp do not take part")
            self.epochs[1] += on
            values = np.broadcast_to(get(), self.lanes).reshape(-1, 32)
            self.put(operands[0], np.repeat(function.reduce(values, 1).astype(dtype), 32), on)

        return reduce

    def do_bar(self, parts, operands):
        if parts[1:] != ["warp", "sync"]:
            raise KeyError(".".join(parts))
        return lambda on: self.epochs[1].__iadd__(on)

    def do_cvt(self, parts, operands):
        to, target, source = operands[0], parts[-2], parts[-1]
        if source in ("bf16", "f16") and target == "f32":
            get = self.get(operands[1], np.dtype("u2"))
            return lambda on: self.put(to, widened(np.asarray(get()), source), on)
        if target.removesuffix("x2") not in ("bf16", "f16"):
            get, dtype = self.get(operands[1], dtype_of(source)), dtype_of(target)
            if dtype.kind != "f" and dtype_of(source).kind == "f":
                raise KeyError(source)  # rounding to integers
            return lambda on: self.put(to, np.asarray(get()).astype(dtype), on)
        gets = [self.get(x, np.dtype("f4")) for x in operands[:0:-1]]  # the last is the lowest

        def convert(on):
            pieces = [np.broadcast_to(narrowed(np.asarray(get()), target), self.lanes) for get in gets]
            self.put(to, pieces[0] if len(gets) == 1 else np.stack(pieces, -1).view(np.uint32)[:, 0], on)

        return convert

    def do_setp(self, parts, operands):
        dtype = dtype_of(parts[-1])
        unordered = dtype.kind == "f" and parts[1].endswith("u") and parts[1] != "u"
        compare = COMPARE[parts[1][:-1] if unordered else parts[1]]
        to, a, b = operands[0], self.get(operands[1], dtype), self.get(operands[2], dtype)
        more = self.get(operands[3], np.dtype(bool)) if len(operands) > 3 else None

        def test(on):
            x, y = a(), b()
            result = compare(x, y)
            if compare is operator.ne and dtype.kind == "f" and not unordered:
                result = result & ~(np.isnan(x) | np.isnan(y))
            result = result | np.isnan(x) | np.isnan(y) if unordered else result
            self.put(to, LOGIC[parts[2]](result, more()) if more else result, on)

        return test

    def do_selp(self, parts, operands):
        dtype = np.dtype(f"u{dtype_of(parts[-1]).itemsize}")
        to, a, b, p = operands[0], *(self.get(x, dtype) for x in operands[1:3]), self.get(operands[3], np.dtype(bool))
        return lambda on: self.put(to, np.where(p(), a(), b()), on)

    def logical(self, parts, operands):
        return self.pure(LOGIC[parts[0]], operands, dtype_of(parts[-1]))

    do_and = do_or = do_xor = logical

    def shift(self, parts, operands):
        dtype = dtype_of(parts[-1])
        a, b, bits = self.get(operands[1], dtype), self.get(operands[2], np.dtype("u4")), dtype.itemsize * 8
        move = np.left_shift if parts[0] == "shl" else np.right_shift

        def shifted(on):
            x, by = np.asarray(a()), np.asarray(b())
            near = move(x, np.minimum(by, bits - 1).astype(dtype))
            beyond = near if dtype.kind == "i" and parts[0] == "shr" else np.zeros((), dtype)
            self.put(operands[0], np.where(by < bits, near, beyond), on)

        return shifted

    do_shl = do_shr = shift

    def do_bfe(self, parts, operands):
        dtype = dtype_of(parts[-1])
        a, (at, n) = self.get(operands[1], dtype), (int(x, 0) for x in operands[2:])
        up, down = (dtype.type(8 * dtype.itemsize - x) for x in (at + n, n))
        return lambda on: self.put(operands[0], np.right_shift(np.left_shift(a(), up), down), on)

    def arithmetic(self, parts, operands):
        """add, sub, mul, mad, fma, min, max, neg, abs: of integers, or of fp32 rounded once."""
        base, suffix, flush = parts[0], parts[-1], "ftz" in parts
        if parts[-2:-1] == ["f32"]:  # add, sub, fma of a half and fp32: the last operand is fp32
            *halves, last = (self.get(x, np.dtype(kind)) for x, kind in zip(
                operands[1:], [*["u2"] * (len(operands) - 2), "f4"], strict=True))  # fmt: skip
            function = FLOATS[base]
            return lambda on: self.put(
                operands[0], function(*(widened(np.asarray(get()), suffix) for get in halves), last()), on
            )
        if suffix in ("bf16", "f16", "bf16x2", "f16x2", "f32x2"):
            return self.packed(parts, operands)
        dtype = dtype_of(suffix)
        if dtype.kind == "f" and dtype.itemsize != 4:
            raise KeyError(suffix)
        if dtype.kind == "f":
            function = FLOATS["NaN " * ("NaN" in parts) + base]
            if flush:
                return self.pure(lambda *x: flushed(function(*map(flushed, x))), operands, dtype)
            return self.pure(function, operands, dtype)
        bits = 8 * dtype.itemsize
        if "wide" in parts:
            wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            gets = [self.get(x, dtype) for x in operands[1:3]]
            more = self.get(operands[3], wide) if base == "mad" else None

            def multiply(on):
                a, b = (np.asarray(get()).astype(wide) for get in gets)
                self.put(operands[0], a * b + more() if more else a * b, on)

            return multiply
        if "hi" in parts and bits == 32:
            wide = np.dtype(f"{dtype.kind}8")
            return self.pure(
                lambda a, b: (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> wide.type(32)).astype(dtype),
                operands, dtype,
            )  # fmt: skip
        if "hi" in parts:
            raise KeyError("hi")
        functions = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "mad": lambda a, b, c: a * b + c,
            "min": np.minimum,
            "max": np.maximum,
            "neg": np.negative,
            "abs": np.abs,
        }
        return self.pure(functions[base], operands, dtype)

    do_add = do_sub = do_mul = do_mad = do_fma = do_min = do_max = do_neg = do_abs = arithmetic

    def packed(self, parts, operands):
        """add, sub, mul, fma, min, max, neg of bf16 or f16, or of two in a register, fp32 too: rounded once."""
        of, count = parts[-1].removesuffix("x2"), 1 + parts[-1].endswith("x2")
        size, flush = 4 if of == "f32" else 2, flushed if "ftz" in parts else lambda x: x
        gets = [self.get(x, np.dtype(f"u{size * count}")) for x in operands[1:]]

        def compute(on):
            pieces = [np.ascontiguousarray(np.broadcast_to(get(), self.lanes)).view(f"u{size}") for get in gets]
            result = flush(FLOATS[parts[0]](*(flush(widened(x, of)) for x in pieces)))
            self.put(operands[0], narrowed(result, of).view(f"u{size * count}"), on)

        return compute

    def approximate(self, parts, operands):
        function = {"ex2": np.exp2, "lg2": np.log2, "div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal,
                    "rsqrt": lambda x: 1 / np.sqrt(x)}[parts[0]]  # fmt: skip
        exact = "rn" in parts

        def compute(*x):
            x = [flushed(value) for value in x] if "ftz" in parts else x
            value = function(*(np.float64(v) for v in x)).astype(np.float32)
            if not exact:  # a function of the operands, as in hardware
                mixed = sum(np.asarray(v, np.float32).view(np.uint32) * n for v, n in zip(x, MIX, strict=False))
                off = (mixed >> np.uint32(16)) % np.uint32(2 * ULPS[parts[0]] + 1) - np.uint32(ULPS[parts[0]])
                sound = np.isfinite(value) & (np.abs(value) > 2 * SMALLEST) & (np.abs(value) < 1e38)
                # exact: 2^0, and division by powers of two
                sound &= x[0] != 0 if parts[0] == "ex2" else np.frexp(x[-1])[0] != 0.5
                value = np.where(sound, value.view(np.uint32) + off, value.view(np.uint32))
                value = value.view(np.float32)
            return flushed(value) if "ftz" in parts else value

        return self.pure(compute, operands, np.dtype("f4"))

    do_ex2 = do_lg2 = do_div = do_sqrt = do_rcp = do_rsqrt = approximate


def flushed(x):
    """Numbers below the normal ones become 0, with their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x).astype(np.float32)


def widened(bits, kind):
    """fp32 numbers of the bits of bf16, f16 or f32 ones."""
    if kind == "f32":
        return bits.view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x, kind):
    """Bits of fp32 numbers, rounded to bf16 or f16, ties to even, or as they are."""
    if kind == "f32":
        return x.view(np.uint32)
    if kind.startswith("f16"):
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def bytes_at(tensor):
    """(address, uint8 array) of a tensor's storage."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return storage.data_ptr(), np.zeros(0, np.uint8)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return storage.data_ptr(), np.frombuffer(memory, np.uint8)


@functools.cache
def code_for(kernel, types, constants, warps, architecture):
    """(instructions, bytes of shared memory) of a kernel; `types` and `constants` are items of dictionaries."""
    binary = compiled(kernel, dict(types), dict(constants), warps, architecture)
    return Code(binary.asm["ptx"]), binary.metadata.shared


def launch(architecture, self, *arguments, grid, warmup=False, num_warps=4, **named):
    """Takes the place of JITFunction.run: compiles for what the arguments are, as it does, and executes the PTX."""
    given = dict(zip(self.arg_names, arguments, strict=False)) | named
    types, constants, values = {}, {}, []
    for parameter in self.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = "*" + DTYPES[value.dtype] + ("" if value.data_ptr() % 16 == 0 else ":any")
            values.append(np.uint64(value.data_ptr()).tobytes())
        elif type(value) is int:
            size = "i32" if -(2**31) <= value < 2**31 else "i64"
            types[name] = size + ("" if value % 16 == 0 else ":any")
            values.append(np.int64(value).tobytes())
        else:
            types[name] = "fp32"
            values.append(np.float32(value).tobytes())
    code, shared = code_for(self, tuple(types.items()), tuple(constants.items()), num_warps, architecture)
    places = dict(bytes_at(given[name]) for name, kind in types.items() if kind[0] == "*")
    values += [np.uint64(0).tobytes()] * (len(code.params) - len(values))  # scratch memory, which our kernels lack
    of_code = {name: value for (_, name), value in zip(code.params, values, strict=True)}
    grid = (*(grid(given) if callable(grid) else grid), 1, 1)[:3]
    programs, at_once = int(np.prod(grid)), max(1, LANES // code.threads)
    with np.errstate(all="ignore"):
        for first in range(0, programs, at_once):
            some = range(first, min(first + at_once, programs))
            memory = Memory([place for place in places.items() if len(place[1])])
            if found := Launch(code, grid, some, of_code, memory, shared).run():
                raise AssertionError(f"{self.__name__}: {'; '.join(found)}")


def install(architecture):
    """Replaces the launch of Triton's kernels."""
    JITFunction.run = lambda self, *arguments, **named: launch(architecture, self, *arguments, **named)
