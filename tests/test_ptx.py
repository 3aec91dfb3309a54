"""The kernels as compiled for an H100, executed on the CPU: right at real sizes, and nothing races."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import ptx  # noqa: E402

SCRIPT = pathlib.Path(__file__).parent / "ptx_cases.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors lie on a CPU")


@pytest.fixture(scope="module")
def found():
    """{case: what was found}; a kernel that is wrong, or whose threads race, ends the script."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "sm_90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {row["case"]: row["found"] for row in map(json.loads, done.stdout.splitlines())}


def test_every_kernel_is_right(found):
    """The script compares with fp64; here only that each result of each kernel took part, and closely in fp32."""
    results = {name: set(errors) for name, errors in found.items() if isinstance(errors, dict)}
    assert len(results) == 13
    assert {frozenset(names) for names in results.values()} == {
        frozenset(names.split()) for names in ("kl ce dh", "kl ce dh dW db", "y dx dr dw db", "distance da")
    }
    assert all(max(e[0], e[2]) < 2e-5 for name in found if "float32" in name for e in found[name].values())


def test_a_large_mean_is_right_to_the_last_place(found):
    """PyTorch's error on a CPU is 6e-5 to 8e-5; a quotient two units off in the last place makes it 1.3e-4 or more."""
    assert found["large mean"] < 1.1e-4


def test_a_race_is_found(found):
    """Without the barrier of the projection's kernel a thread may read the label's logit after it is overwritten."""
    assert found["with its barrier"] is None
    said = found["without its barrier"]
    assert (
        "warps use the same bytes with nothing in between" in said and "ld.global.b16" in said and "st.global" in said
    )


def test_a_store_beyond_the_end_is_found(found):
    assert found["beyond the end"] == "an access of 4 bytes is outside of every tensor"


def run(*body, programs=1):
    """What programs of 64 threads find that execute `body`, and x (64 fp32 numbers, 0 at first), their argument."""
    lines = ["mov.u32 %r1, %tid.x", "shl.b32 %r2, %r1, 2", "xor.b32 %r3, %r2, 252", "cvt.u64.u32 %rd1, %r2",
             "ld.param.b64 %rd2, [x]", "add.s64 %rd3, %rd1, %rd2", "mov.b32 %r4, 0f40000000", *body, "ret"]  # fmt: skip
    head = ".visible .entry k(\n.param .u64 .ptr .global .align 1 x\n)\n.reqntid 64\n{\n"
    x = torch.zeros(64)
    memory, arguments = ptx.Memory([ptx.bytes_at(x)]), {"x": np.uint64(x.data_ptr()).tobytes()}
    code = ptx.Code(head + ";\n".join(lines) + ";\n}\n")
    with np.errstate(all="ignore"):
        return ptx.Launch(code, (programs, 1, 1), range(programs), arguments, memory, 256).run(), x


STORE, OTHERS, KEEP = "st.shared.b32 [%r2], %r1", "ld.shared.b32 %r5, [%r3]", "st.global.b32 [%rd3+0], %r5"
COPY = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4, 4"


@pytest.mark.parametrize(
    "body, said",
    [
        ((STORE, "bar.sync 0", OTHERS, KEEP), None),
        ((STORE, OTHERS, KEEP), "shared memory: warps use the same bytes"),
        (("st.shared.b32 [%r2], %r1", "xor.b32 %r3, %r2, 4", OTHERS), "shared memory: threads of a warp use"),
        (("st.shared.b32 [%r2], %r1", "bar.warp.sync -1", "xor.b32 %r3, %r2, 4", OTHERS), None),
        (("st.shared.b32 [%r2], %r1", "bar.warp.sync -1", OTHERS), "shared memory: warps use the same bytes"),
        ((COPY, "cp.async.commit_group", "cp.async.wait_group 0", "bar.sync 0", OTHERS), None),
        ((COPY, "cp.async.commit_group", "cp.async.wait_group 0", OTHERS), "shared memory: warps use the same bytes"),
    ],
)  # fmt: skip
def test_what_must_wait(body, said):
    found, _ = run(*body)
    assert bool(found) == bool(said) and (not said or said in found[0]), found


def test_what_a_copy_brings():
    """Nothing before its end is waited for, and then what was there."""
    begun = COPY, "cp.async.commit_group"
    assert run(*begun, "ld.shared.b32 %r5, [%r2]", KEEP)[1].isnan().all()
    assert (run(*begun, "cp.async.wait_group 0", "ld.shared.b32 %r5, [%r2]", KEEP)[1] == 0).all()
    assert run("ld.shared.b32 %r5, [%r2]", KEEP)[1].isnan().all()  # nothing was stored
    assert run(KEEP)[1].isnan().all()  # nor is there anything in the register
    # a thread waits for all but its own last groups: the first 32 threads have closed one more
    more = "setp.lt.u32 %p1, %r1, 32", "@%p1 cp.async.commit_group", "cp.async.wait_group 1"
    assert run(*begun, *more, "ld.shared.b32 %r5, [%r2]", KEEP)[1].isnan().tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize(
    "body, said",
    [
        (("add.s64 %rd3, %rd3, 2", KEEP), "an access of 4 bytes is not aligned"),
        (("add.s64 %rd3, %rd3, 4", KEEP), "an access of 4 bytes is outside of every tensor"),
        (("setp.lt.u32 %p1, %r1, 3", "@%p1 bar.sync 0"), "threads wait at a barrier that others"),
    ],
)
def test_what_a_gpu_would_not_survive(body, said):
    with pytest.raises(AssertionError, match=said):
        run(*body)


def test_threads_that_take_different_ways():
    """Each thread loops as often as its number says, then all meet."""
    loop = ("mov.b32 %r5, 0", "$L1:", "setp.ge.u32 %p1, %r5, %r1", "@%p1 bra $L2", "add.s32 %r5, %r5, 1", "bra.uni $L1")
    found, x = run(*loop, "$L2:", "bar.sync 0", "cvt.rn.f32.u32 %r5, %r5", KEEP)
    assert not found and x.tolist() == list(range(64))


def test_programs_that_store_to_the_same_place():
    (found,), _ = run("st.global.b32 [%rd3+0], %r4", programs=2)
    assert found.startswith("global memory: programs use the same bytes")
    assert not run("ld.global.b32 %r5, [%rd3+0]", programs=2)[0]


NUMBER = "cvt.rn.f32.u32 %r5, %r1"


@pytest.mark.parametrize(
    "body, expected",
    [
        ((NUMBER,), range(64)),
        (("redux.sync.max.u32 %r5, %r1, -1", "cvt.rn.f32.u32 %r5, %r5"), [31] * 32 + [63] * 32),
        ((NUMBER, "shfl.sync.bfly.b32 %r5, %r5, 1, 31, -1"), [i ^ 1 for i in range(64)]),
        ((NUMBER, "shfl.sync.idx.b32 %r5, %r5, 3, 31, -1"), [3] * 32 + [35] * 32),
        ((NUMBER, "mov.b64 %rd4, {%r5, %r4}", "fma.rn.f32x2 %rd5, %rd4, %rd4, %rd4", "mov.b64 {%r5, %r6}, %rd5"),
         [i * i + i for i in range(64)]),
        (("mov.b16 %rs1, 0x4040", "sub.rn.f32.bf16 %r5, %rs1, %r4"), [1] * 64),
        (("cvt.rn.bf16x2.f32 %r6, %r4, 0f3F800000", "add.bf16x2 %r6, %r6, %r6", "mov.b32 {%rs1, %rs2}, %r6",
          "cvt.f32.bf16 %r5, %rs1"), [2] * 64),
        (("cvt.rn.f16.f32 %rs1, 0f3F801000", "cvt.f32.f16 %r5, %rs1"), [1] * 64),  # a tie goes to even
        (("max.f32 %r5, %r4, 0f40400000, 0f3F800000",), [3] * 64),
        (("max.f32 %r5, %r4, 0f7FC00000",), [2] * 64),
        (("max.NaN.f32 %r5, %r4, 0f7FC00000",), [float("nan")] * 64),
        (("mul.wide.s32 %rd4, %r1, -3", "cvt.u32.u64 %r5, %rd4", "cvt.rn.f32.s32 %r5, %r5"),
         [-3 * i for i in range(64)]),
        (("mul.hi.u32 %r5, %r1, 0x80000000", "cvt.rn.f32.u32 %r5, %r5"), [i // 2 for i in range(64)]),
        (("shl.b32 %r6, %r1, 8", "bfe.u32 %r5, %r6, 9, 4", NUMBER.replace("%r1", "%r5")),
         [i // 2 % 16 for i in range(64)]),
        (("shr.u32 %r5, %r1, 32", NUMBER.replace("%r1", "%r5")), [0] * 64),
        (("setp.lt.u32 %p1, %r1, 5", "selp.f32 %r5, %r4, 0f00000000, %p1"), [2] * 5 + [0] * 59),
        (("mov.b32 %r5, 0f00000001", "mul.ftz.f32 %r5, %r5, 0f7F000000"), [0] * 64),  # a number below the normal ones
    ],
)  # fmt: skip
def test_instructions(body, expected):
    found, x = run(*body, KEEP)
    assert not found and np.array_equal(x.numpy(), np.array([*expected], np.float32), equal_nan=True)


def test_approximate_instructions():
    """They are a function of their operands, nearly right, and mostly not exactly."""
    _, x = run(NUMBER, "mul.f32 %r5, %r5, 0f3DCCCCCD", "ex2.approx.ftz.f32 %r5, %r5", KEEP)
    right = np.exp2(np.float64(np.float32(0.1) * np.arange(64, dtype=np.float32)))
    off = np.abs(x.double().numpy() / right - 1)
    assert x[0] == 1 and off.max() <= 2.0**-22 + 2.0**-24 and (off > 2.0**-24).sum() > 20
    _, x = run(NUMBER, "div.full.f32 %r5, %r5, %r4", KEEP)
    assert x.tolist() == [i / 2 for i in range(64)]  # by a power of two
