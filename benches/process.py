"""Our own scripts run as their users run them, in a process of their own."""

import json
import pathlib
import subprocess
import sys

from minidistil.cli import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def script(*words):
    """Runs `python words...` in the repository; returns the JSON of its last line."""
    return last_line(subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT))


def last_line(done):
    """The JSON that a finished process ended with; UserError where it failed."""
    if done.returncode:
        raise UserError(f"{done.stderr.strip()}: see the command alone: {' '.join(done.args)}")
    return json.loads(done.stdout.splitlines()[-1])
