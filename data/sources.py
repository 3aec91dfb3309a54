"""Sources of text: files, folders, Wikipedia dumps, installed documentation, Hugging Face datasets.

A source is read in batches of about one megabyte. The reading process only splits bytes; the workers decode them into
documents by `batch.documents()`. Batches do not depend on the number of workers.
"""

import collections
import os
import pathlib
import zipfile

from data import docstrings, wikipedia
from data.documents import BATCH_BYTES, RECORD_BYTES, Batch
from data.formats import batches_of, layout_of, listed
from data.stored import OPENERS, Stored, codec, is_hidden, is_zip, members, package, whole
from minidistil.errors import UserError

DOCSTRINGS = "docstrings"  # the source of that name
_TEXT_ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet", ".zip", *OPENERS)
_NO_TEXT = set(
    ".7z .arrow .avi .db .doc .docx .epub .feather .gif .h5 .htm .html .jpeg .jpg .mobi .mp3 .mp4 .npy .npz .odt .pdf "
    ".pickle .pkl .png .ppt .pptx .pt .rar .rtf .safetensors .sqlite .svg .tar .tbz2 .tgz .txz .webp .xhtml "
    ".xls .xlsx .xml".split()
)


def check(sources):
    """Returns the stored bytes of all sources (0 where unknown); raises UserError for a missing source."""
    if not sources:
        raise UserError("no source of text: name files, folders, `docstrings`, `wikipedia:DUMP` or `hf:DATASET`")
    total = 0
    for source in map(str, sources):
        if source == DOCSTRINGS:
            total += sum(map(os.path.getsize, docstrings.python_files()))
        elif source.startswith("wikipedia:"):
            total += _size(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            package("datasets", "hf: sources")
        else:
            for path in text_files(source):
                _check_ending(path)
                total += _size(path)
    return total


def paths_first(sources):
    """Returns the sources of a command line: what exists as a path, such as a folder `docstrings`, is that path."""
    return [os.path.join(os.curdir, s) if _is_keyword(s) and os.path.exists(s) else s for s in sources]


def _is_keyword(source):
    return source == DOCSTRINGS or source.startswith(("wikipedia:", "hf:"))


def files_of(sources):
    """Returns what of paths is read and what is not: {"read": {ending: files}, "skipped": {ending: files}}."""
    read, skipped = collections.Counter(), collections.Counter()
    for source in map(str, sources):
        if not _is_keyword(source):
            chosen = set(text_files(source))
            read.update(map(_ending, chosen))
            if os.path.isdir(source):
                skipped.update(_ending(path) for path in _visible_files(source) if path not in chosen)
            for path in filter(is_zip, chosen):
                with whole(path), zipfile.ZipFile(path) as archive:
                    others = set(archive.namelist()) - set(members(path))
                    skipped.update(_ending(n) for n in others if n[-1:] != "/" and not is_hidden(n))
    return {"read": dict(sorted(read.items())), "skipped": dict(sorted(skipped.items()))}


def described(found):
    """Returns `files_of` as one line, or "" for a single file."""
    if not found["skipped"] and sum(found["read"].values()) < 2:
        return ""
    parts = {key: ", ".join(f"{n} {ending}" for ending, n in found[key].items()) for key in found}
    return f"files read: {parts['read']}; skipped, as of no known kind of text: {parts['skipped'] or 'none'}"


def _ending(path):
    return pathlib.Path(path).suffix.lower() or "without ending"


def _check_ending(path):
    """Raises UserError for a file that is not text, or whose reader is not installed."""
    inner = pathlib.Path(path[: -len(_ending(path))]) if _ending(path) in OPENERS else pathlib.Path(path)
    if inner.suffix.lower() in _NO_TEXT:
        dump = ", name a dump of Wikipedia as wikipedia:PATH" * (inner.suffix.lower() == ".xml")
        raise UserError(f"{path} is not text ({inner.suffix}): convert it to .txt{dump}, or leave it out")
    for ending, name in ((".parquet", "pyarrow"), (".zst", "backports.zstd")):
        if path.lower().endswith(ending):
            package(name, f"{ending} files")


def _size(path):
    if not os.path.isfile(path):
        kind = "a broken link" if os.path.islink(path) else "a pipe or device" if os.path.exists(path) else "missing"
        raise UserError(f"{path} is not a file but {kind}: write the text to a file, or leave it out")
    return os.path.getsize(path)


def text_files(path):
    """Returns `path` itself, or the text files below it in sorted order, without hidden files and folders."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: check the path, or use docstrings, wikipedia:DUMP, hf:NAME")
        return [str(path)]
    files = [file for file in _visible_files(path) if file.lower().endswith(_TEXT_ENDINGS) or _is_extracted(file)]
    if not files:
        raise UserError(f"no {' '.join(_TEXT_ENDINGS)} file below {path}: name a folder that holds text")
    return files


def _visible_files(path):
    """Returns the files below a folder without hidden ones; links to folders are followed, but to no folder twice."""
    files, seen = [], {os.path.realpath(path)}
    for folder, subfolders, names in os.walk(path, onerror=_raise, followlinks=True):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for name in visible:
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                subfolders.append(name)
        files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _raise(error):
    raise error  # os.walk leaves out a folder that it may not read


def _is_extracted(path):
    """Returns whether a file without ending is of WikiExtractor, in either of its layouts."""
    if pathlib.Path(path).suffix or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return layout_of(file.read(1 << 16)) != "text"


def batches(sources, field="text", encoding="utf-8"):
    """Yields the `Batch`es of all sources, in the order given.

    data/formats.py says what a document of a file is, data/documents.py where a long one is cut. Files that are not in
    `encoding` are refused.
    """
    encoding = codec(encoding)
    for source in map(str, sources):
        if source == DOCSTRINGS:
            yield from _docstrings()
        elif source.startswith("wikipedia:"):
            yield from _wikipedia(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            yield from _hugging_face(source.removeprefix("hf:"), field)
        else:
            for path in text_files(source):
                for member in members(path):
                    yield from batches_of(path, member, field, encoding)


def _docstrings():
    """Yields batches of Python files, about two megabytes of code (0.4 of prose) each."""
    paths, size = [], 0
    for path in docstrings.python_files():
        paths.append(path)
        size += os.path.getsize(path)
        if size >= 2 * BATCH_BYTES:
            yield Batch(docstrings.harvest, paths, size, size, unique=True)
            paths, size = [], 0
    if paths:
        yield Batch(docstrings.harvest, paths, size, size, unique=True)


def _wikipedia(path):
    """Yields batches of pages of a MediaWiki XML dump, split after a `</page>`."""
    with Stored(path) as file:
        rest = b""
        dropped = None
        while block := file.stream.read(BATCH_BYTES):
            block = rest + block
            end = block.rfind(b"</page>") + len(b"</page>")
            if end < len(b"</page>"):
                if len(block) > RECORD_BYTES:
                    fault = f"has {len(block):,} bytes without </page>"
                    raise UserError(f"{path} {fault}: take a dump of pages-articles, without their history")
                rest = block
                continue
            dropped = dropped or wikipedia.dropped_links(block)
            yield Batch(wikipedia.articles, (path, block[:end], dropped), end, file.progress())
            rest = block[end:]
        if b"<page>" in rest or not dropped:
            raise UserError(f"{path} is not a whole MediaWiki dump (no </page> at its end): fetch it again")


def _hugging_face(name, field):
    """Yields batches of rows of the training split of DATASET[:CONFIG[:COLUMN]], streamed."""
    name, config, column = (name.split(":", 2) + ["", ""])[:3]
    column = column or field
    texts, size = [], 0
    for row in _rows(name, config):
        if not isinstance(row.get(column), str | None):
            raise UserError(f"hf:{name}: column {column!r} is not text: name another with --field")
        if column not in row:
            raise UserError(f"hf:{name} has no column {column!r}, only {listed(row)}: name one with --field")
        texts.append(row[column] or "")
        size += len(texts[-1])
        if size >= BATCH_BYTES:
            yield Batch(list, texts, size, 0)
            texts, size = [], 0
    if texts:
        yield Batch(list, texts, size, 0)


def _rows(name, config):
    try:
        yield from package("datasets", "hf: sources").load_dataset(name, config or None, split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # of any of the libraries below `datasets`
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(f"hf:{name} cannot be read ({reason}): check its name and the network") from None
