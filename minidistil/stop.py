"""Ctrl-C and SIGTERM as a question that a loop asks itself, so that it can save before it ends."""

import signal
import time


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that a loop reads where it can stop; a second one kills at once.

    Within a second it counts as the same: `torchrun` passes on to its processes what the terminal sent them already.
    """

    def __init__(self):
        self.signal, self.since = None, 0.0

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.signal is not None and time.monotonic() - self.since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
