"""Unlabelled text for the students, and a training set of QNLI where only its dev set is at hand."""

import gzip
import hashlib
import itertools
import pathlib

from minidistil import files
from minidistil.downstream import glue
from minidistil.errors import UserError

# Bytes of the training texts of each task for up to ten minutes, repeated where it has fewer: less of SST-2, whose
# phrases are parts of each other, and more of MRPC, which is news (LOG.md). For more time there is as much more of
# IMDb, the largest, so that no sentence comes often. STS-B's are not read, since it scores the vectors.
THIRD = (1 << 20) // 3
SHARES = {"imdb": 3 * THIRD, "sst2": 2 * THIRD, "mrpc": 5 * THIRD, "qnli": 3 * THIRD}
MINUTES, GROWS = 10, "imdb"


def with_qnli(data, folder):
    """Returns the GLUE folder `data`, or where its QNLI has no training set, `folder` with one and links to the rest.

    The sets are halves of the dev set, by the hash of the question: all pairs of a question are on the same side.
    """
    data = pathlib.Path(data).resolve()
    names = [path.name for path in (data / "QNLI").glob("*")]
    dev = next((name for name in ("dev.tsv", "dev.tsv.gz") if name in names), None)
    if dev is None or {"train.tsv", "train.tsv.gz"} & set(names):
        return data
    with (gzip.open if dev.endswith(".gz") else open)(data / "QNLI" / dev, "rb") as file:
        header, *lines = file.read().splitlines(keepends=True)
    column, sides = header.decode().casefold().split("\t").index("question"), ([], [])
    for line in lines:
        sides[hashlib.sha256(line.split(b"\t")[column]).digest()[0] % 2].append(line)
    for name, side in zip(("train.tsv", "dev.tsv"), sides, strict=True):
        with files.replacing(folder / "QNLI" / name) as temporary:
            temporary.write_bytes(b"".join([header, *side]))
    for link in folder.iterdir():
        if link.is_symlink() and link.readlink().parent != data:  # of other data
            link.unlink()
    for path in data.iterdir():
        if path.is_dir() and path.name != "QNLI" and not (folder / path.name).is_symlink():
            (folder / path.name).symlink_to(path)
    return folder.resolve()


def write_texts(data, folder, minutes):
    """Writes the texts of the training sets in `data`, a text a line, for students that train for so many minutes.

    Returns the paths as text.
    """
    paths, more = [], int(max(0, minutes / MINUTES - 1) * sum(SHARES.values()))
    for name, share in SHARES.items():
        share += more if name == GROWS else 0
        if (data / glue.TASKS[name].folder).is_dir():
            train, _ = glue.load(name, data)
            texts = dict.fromkeys(text.replace("\n", " ") for example in train for text in example[:2] if text)
            ends = itertools.accumulate(len(text.encode()) + 1 for text in itertools.cycle(texts))
            kept = [text for text, end in zip(itertools.cycle(texts), itertools.takewhile(share.__ge__, ends))]
            paths.append(str(folder / f"{name}.txt"))
            files.write_text(paths[-1], "\n".join(kept) + "\n")
    if not paths:
        wanted = ", ".join(glue.TASKS[name].folder for name in SHARES)
        raise UserError(f"{data} holds no text to distil on: it needs one of {wanted}")
    return paths
