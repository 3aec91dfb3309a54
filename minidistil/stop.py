"""Ctrl-C and SIGTERM as a question that a loop asks itself, so that it can save before it ends."""

import signal


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that a loop reads where it can stop; a second one kills at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number
