"""Starts scripts in processes that are forked from one which has imported PyTorch: each saves seconds of imports.

`Script` is used like subprocess.Popen, `call` like subprocess.run, and `ranks` like torchrun, for our scripts; other
tests start Python as users do. The process that is forked has run no operator of PyTorch, so it has no threads.
"""

import concurrent.futures
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys

TESTS = os.path.dirname(os.path.abspath(__file__))
OURS = TESTS, os.path.dirname(TESTS)  # where pytest, but no user's Python, looks for modules
CONTEXT = multiprocessing.get_context("forkserver")
# beside PyTorch, what it imports in the first step of an optimiser, and what draws the curve
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.figure"])


def _run(words, environment, folder, stdout, stderr):
    """Becomes `python words...`."""
    for end, number in ((stdout, 1), (stderr, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=buffering, closefd=False)
                              for n, buffering in ((1, -1), (2, 1)))  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) not in OURS]
    sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(words[0]))]
    runpy.run_path(words[0], run_name="__main__")


class Script:
    """A running `python words...`, whose first word is a script."""

    def __init__(self, words, env=None, cwd="."):
        readers, writers = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
        arguments = [*map(str, words)], dict(os.environ if env is None else env), os.path.abspath(cwd), *writers
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        for end in writers:
            end.close()
        self.stdout, self.stderr = (open(os.dup(end.fileno()), encoding="utf-8") for end in readers)

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout} seconds"
        return self.returncode

    def communicate(self, timeout=300):
        """Returns what is left of (stdout, stderr), after the end."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # both at once: a full pipe would stop the process
            both = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            finally:
                if self.returncode is None:
                    self.kill()
        return tuple(future.result() for future in both)


def call(words, **options):
    """Runs a script to its end; returns a subprocess.CompletedProcess with its output as text."""
    script = Script(words, **options)
    stdout, stderr = script.communicate()
    return subprocess.CompletedProcess(words, script.returncode, stdout, stderr)


def ranks(words, size=2):
    """Starts a script on `size` ranks of this machine; returns their Scripts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    shared["OMP_NUM_THREADS"] = 1  # as torchrun has it: ranks with more threads than cores wait for each other's
    places = [shared | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(size)]
    return [Script(words, os.environ | {name: str(value) for name, value in place.items()}) for place in places]


def call_ranks(words, size=2):
    """Runs a script on `size` ranks to its end; returns a subprocess.CompletedProcess with the output of all."""
    scripts = ranks(words, size)
    said = [script.communicate() for script in scripts]
    code = max((script.returncode for script in scripts), key=abs)
    return subprocess.CompletedProcess(words, code, *map("".join, zip(*said, strict=True)))
