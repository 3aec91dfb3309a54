"""The cases of bench.py; here, their common flags and helpers that run the project's scripts.

A case is a module with its flags (`Settings`), a generator of its rows (`bench`), their `table` and perhaps `draw`.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

from minidistil.cli import option
from minidistil.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


@dataclasses.dataclass
class Common:
    tiny: bool = option(False, "a test run of seconds, not a measurement")
    out: str = option(None, "folder for the JSON files (default: results; with --tiny, runs/tiny)")

    @property
    def folder(self):
        folder = pathlib.Path(self.out or ("runs/tiny" if self.tiny else RESULTS))
        if self.tiny and folder.resolve() == RESULTS.resolve():
            raise UserError(f"--tiny measures nothing that belongs into {folder}: name another --out")
        return folder


def script(*words):
    """Runs `python words...` in the repository, as a user would; returns the JSON of the last line."""
    return last_line(subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT))


def last_line(done):
    """Returns the JSON in the last line of a finished process; raises UserError where it failed."""
    if done.returncode:
        raise UserError(f"{done.stderr.strip()}: see the command alone: {' '.join(done.args)}")
    return json.loads(done.stdout.splitlines()[-1])
