"""The cases of bench.py. Here: the flags that all of them have, and how they run the project's own scripts.

A case is a module with its flags (`Settings`), a generator of its rows (`bench`), their `table`, and perhaps a picture
of them (`draw`).
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
    tiny: bool = option(False, "seconds instead of minutes: shows that it runs, not how fast")
    out: str = option(None, "folder for the JSON files (default: results; with --tiny, runs/tiny)")

    @property
    def folder(self):
        folder = pathlib.Path(self.out or ("runs/tiny" if self.tiny else RESULTS))
        if self.tiny and folder.resolve() == RESULTS.resolve():
            raise UserError(f"--tiny measures nothing that belongs into {folder}: name another --out")
        return folder


def script(*words):
    """Runs `python words...` in the repository, as a user does; returns the JSON of its last line."""
    return last_line(subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT))


def last_line(done):
    """The JSON that a finished process ended with; UserError where it failed."""
    if done.returncode:
        raise UserError(f"{done.stderr.strip()}: see the command alone: {' '.join(done.args)}")
    return json.loads(done.stdout.splitlines()[-1])
