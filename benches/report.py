"""Results of a bench, written to disk row by row, so that neither a failure nor a kill loses a row.

A bench is a generator of rows (dicts). It yields each row as soon as it is measured, and again after each update of it.
A provider that fails has a row with the key "error".
"""

import contextlib
import itertools
import os
import pathlib
import sys
import textwrap
import traceback

from minidistil import files
from minidistil.errors import is_out_of_memory


@contextlib.contextmanager
def attempt(row):
    """Stores an exception as the row's "error" and "traceback", so that the next provider can be measured."""
    try:
        yield
    except Exception as error:
        message = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
        row |= {"error": message, "traceback": traceback.format_exc()}
        print(f"{row['case']}, {row['provider']} failed: {message}", file=sys.stderr, flush=True)


class Report:
    """The rows of one case, in `folder`/CASE.partial.json until `finish` renames it to CASE.json.

    `head` (JSON-able) is what the file holds besides its rows. Tracebacks go to CASE.failures.txt.
    """

    def __init__(self, folder, case, head):
        self.folder, self.case, self.head, self.rows = pathlib.Path(folder), case, head, []
        self.partial, self.failures = (self.folder / f"{case}.{end}" for end in ("partial.json", "failures.txt"))
        self.failures.unlink(missing_ok=True)

    def put(self, row):
        """Adds a row, or writes an updated one again."""
        if "traceback" in row:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.failures, "a", encoding="utf-8") as file:
                what = {k: v for k, v in row.items() if k != "traceback"}
                file.write(f"{what}\n{row.pop('traceback')}\n")
        if not any(known is row for known in self.rows):
            self.rows.append(row)
        files.write_json(self.partial, {**self.head, "results": self.rows})

    def finish(self):
        os.replace(self.partial, self.folder / f"{self.case}.json")

    @property
    def failed(self):
        """Providers that failed; for providers other than ours, running out of memory is a result, not a failure."""
        return [r["provider"] for r in self.rows if "error" in r
                and (r["error"] != "out of memory" or r["provider"].startswith("ours"))]  # fmt: skip


def measured(rows):
    """Returns the rows with measurements."""
    return [row for row in rows if "error" not in row]


def fitted(table, width):
    """Returns a Markdown table as aligned text of at most `width` columns, as far as its longest words allow."""
    lines = [line for line in table.splitlines() if not line.startswith("|---")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    columns = [[row[i] if i < len(row) else "" for row in rows] for i in range(len(rows[0]))]
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    gap = 2 if sum(least) + 2 * (len(least) - 1) <= width else 1
    while sum(widths) + gap * (len(widths) - 1) > width and widths != least:
        spare = [now - low and now for now, low in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1  # of the widest column that can be narrower
    text = []
    for row in zip(*columns, strict=True):
        cells = [textwrap.wrap(cell, max(w, 1)) for cell, w in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            first, *others = zip(parts, widths, strict=True)
            text.append((gap * " ").join([first[0].ljust(first[1]), *(part.rjust(w) for part, w in others)]).rstrip())
    return "\n".join(text)


def speed_up(row, baseline, metric):
    """Returns the row's metric divided by the baseline's, None if one is missing; may be [low, median, high]."""
    values = [r.get(metric) for r in (row, baseline)]
    if None in values:
        return None
    ours, theirs = (v[1] if isinstance(v, list) else v for v in values)
    return round(ours / theirs, 2)
