"""The kernels as compiled for an H100, executed on the CPU: right at real sizes, and nothing races."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
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


def test_a_race_is_found(found):
    """Without the barrier of the projection's kernel a thread may read the label's logit after it is overwritten."""
    assert found["with its barrier"] is None
    said = found["without its barrier"]
    assert (
        "warps use the same bytes with nothing in between" in said and "ld.global.b16" in said and "st.global" in said
    )


def test_a_store_beyond_the_end_is_found(found):
    assert found["beyond the end"] == "an access of 4 bytes is outside of every tensor"
