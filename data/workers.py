"""Worker processes that answer in order, in bounded memory, and end with their parent.

They are plain child processes with pickles on their pipes instead of `multiprocessing`: fork is not safe once torch has
threads, and spawn and forkserver import the caller's script again, torch included, in every worker. When the parent
dies, even by SIGKILL, a worker reads the end of its input and exits.
"""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import pickle
import queue
import subprocess
import sys
import traceback

if __name__ == "__main__":  # in a worker: makes `data` and `minidistil` importable
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

from minidistil.errors import UserError

_WINDOW = 16 << 20  # bytes of unanswered items per worker; a larger item is sent alone


def cores(wanted=None):
    """Returns `wanted`, or the number of cores this process may use; UserError where it is not positive."""
    if wanted is not None and wanted < 1:
        raise UserError(f"--workers {wanted} is not positive: leave it out to use every core")
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(count, setup, arguments, items, weigh=lambda item: 0):
    """Yields `handle(item)` for each item, in order, where `handle = setup(*arguments)` runs in `count` processes.

    At most two items, and about 16 MiB of `weigh(item)`, per worker are read ahead of the answers. With one worker,
    this process does the work. A `UserError` of a handler is raised here, in order.
    """
    if count == 1:
        handle = setup(*arguments)
        yield from map(handle, items)
        return
    with contextlib.ExitStack() as stack:
        idle = queue.SimpleQueue()
        threads = concurrent.futures.ThreadPoolExecutor(count)  # each waits on one worker's pipe
        stack.callback(threads.shutdown, cancel_futures=True)
        for _ in range(count):
            worker = _start(setup, arguments)
            stack.callback(_stop, worker)
            idle.put(worker)
        waiting = collections.deque()
        weight = 0
        for item in items:
            size = weigh(item)
            while waiting and (len(waiting) >= 2 * count or weight + size > _WINDOW * count):
                answer, answered = waiting.popleft()
                yield answer.result()
                weight -= answered
            waiting.append((threads.submit(_ask, idle, item), size))
            weight += size
        for answer, _ in waiting:
            yield answer.result()


def _start(setup, arguments):
    # in a separate session: Ctrl-C reaches only the parent, which then ends its workers
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        [sys.executable, __file__], stdin=pipe, stdout=pipe, start_new_session=True, env=environment
    )
    with contextlib.suppress(BrokenPipeError):  # already dead: the first question reports it
        pickle.dump((setup, arguments), worker.stdin)
        worker.stdin.flush()
    return worker


def _stop(worker):
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def _ask(idle, item):
    """Returns the answer of the next idle worker."""
    worker = idle.get()
    try:
        pickle.dump(item, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        answer, error = pickle.load(worker.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        raise UserError(
            f"a worker process died (exit code {worker.wait()}): memory may have run out; try fewer --workers"
        ) from None
    finally:
        idle.put(worker)
    if error is not None:
        raise error
    return answer


def _serve():
    """Answers questions from standard input; raises an exception of the pipe or of pickle when the parent ends."""
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not get into the pickles
    setup, arguments = pickle.load(questions)
    handle = None
    while True:
        item = pickle.load(questions)
        try:
            handle = handle or setup(*arguments)
            answer = handle(item), None
        except MemoryError:
            answer = None, UserError("a worker ran out of memory: try fewer --workers")
        except Exception as error:
            if hasattr(error, "add_note"):  # not before Python 3.11
                error.add_note(f"in a worker: {traceback.format_exc()}")
            answer = None, error
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError):  # the parent ended or closed the pipe
        _serve()
