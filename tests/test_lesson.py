"""The ladder of kernels/lesson.py: what each rung gains, the traps that it still falls into, and a reader's kernel."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
LOSES_NAN = not triton.__version__.startswith("3.6.")  # the interpreter's maximum, as a GPU's
LESSON = pathlib.Path(__file__).parent.parent / "kernels" / "lesson.py"
INF, STUDENT, NAN = "-inf", "-inf of the student alone", "NaN"
LABEL, STRIDE = "a label outside the vocabulary", "row * stride in 32 bits, which end at 70,345 rows"


def run(*words):
    """Returns (exit status, {rung: (wrong checks, number of right ones, line of figures)}, what went to stderr)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, LESSON, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    rungs = {}
    for line in done.stdout.splitlines():
        if not line.startswith(" "):
            rungs[line] = found = [[], 0, ""]
        elif line.startswith("    WRONG"):
            assert ": see README.md, section " in line
            found[0].append(line.split("WRONG  ")[1].split(": see")[0])
        else:
            found[1] += line.startswith("    right")
            found[2] = line.strip()
    return done.returncode, rungs, done.stderr


@pytest.fixture(scope="module")
def ladder():
    status, rungs, said = run()
    assert status == 0, said
    return {rung[0]: found for rung, found in rungs.items()}


@pytest.mark.parametrize("rung, wrong, right", [
    ("1", [INF, STUDENT, LABEL, STRIDE], 6),
    ("2", [INF, STUDENT, LABEL, STRIDE], 6),
    ("3", [STUDENT, NAN, LABEL, STRIDE], 6),
    ("4", [STUDENT, NAN, LABEL, STRIDE], 6),
    ("5", [STUDENT, NAN, LABEL, STRIDE], 6),
    ("6", [], 9), ("7", [], 5), ("8", [], 1),
])  # fmt: skip
def test_each_rung_is_right_but_for_the_traps_of_later_ones(rung, wrong, right, ladder):
    kept = [name for name in wrong if name != NAN or LOSES_NAN]
    assert ladder[rung][:2] == [kept, right + len(wrong) - len(kept)]


def test_each_rung_executes_less(ladder):
    """The idea of each shows in the machine code; correctness costs next to nothing."""
    figures = [ladder[rung][2] for rung in "123456"]
    instructions = [float(line.split()[0]) for line in figures]
    assert instructions[:5] == sorted(instructions[:5], reverse=True) and instructions[4] < instructions[0] / 2
    assert instructions[5] < 25 and instructions[5] < instructions[4] + 1
    assert ["narrow" in line for line in figures] == [True, True, False, False, False, False]
    assert [int(re.search(r"(\d+) barriers", line)[1]) > 0 for line in figures] == [True] * 3 + [False] * 3
    assert all("0 bytes spilled" in line for _, _, line in list(ladder.values())[1:])


def test_a_kernel_of_the_reader(tmp_path):
    """The sixth rung passes under any block; without its floor for NaN it does not; other arguments are refused."""
    mine = tmp_path / "mine.py"
    whole = LESSON.read_text().split('if __name__ == "__main__":\n    from')[0].split("# ---- 1. Two passes")[1]
    head = "import torch, triton\nimport triton.language as tl\n" + whole.replace("BLOCK, WARPS", "IGNORED")
    mine.write_text(head + "\nBLOCK, WARPS, forward = 1024, 4, every_row\n")
    status, rungs, said = run("check", mine)
    assert status == 0 and [found[:2] for found in rungs.values()] == [[[], 9]], said
    mine.write_text(head.replace(", propagate_nan=tl.PropagateNan.ALL", "") + "\nforward = every_row\n")
    status, rungs, _ = run("check", mine)
    assert status == LOSES_NAN and [found[:2] for found in rungs.values()] == [[[NAN], 8] if LOSES_NAN else [[], 9]]
    mine.write_text(head + "\nforward = backward\n")
    status, _, said = run("check", mine)
    assert (
        status == 1
        and "must have the arguments s_ptr, t_ptr, labels_ptr, kl_ptr" in said
        and len(said.splitlines()) == 1
    )
    mine.write_text("x = 1\n")
    assert "has no function `forward` or `backward`" in run("check", mine)[2]
    mine.write_text("def forward(s_ptr): pass\n")
    assert "forward is no Triton kernel: put @triton.jit above it" in run("check", mine)[2]


@pytest.mark.parametrize("words, said", [(["check"], "name the file"), (["check", "nowhere.py"], "name the file"),
                                         (["9"], "9 is not a rung")])  # fmt: skip
def test_one_line_for_a_mistake(words, said):
    status, _, error = run(*words)
    assert status == 1 and said in error and len(error.splitlines()) == 1
