"""A name or a path -> a local folder that holds a model.

In this order: a local folder; `demo`, shipped with this repository; the Hugging Face cache; a download into that cache.
"""

import os
import pathlib
import re

from minidistil.cli import UserError
from minidistil.weights import weight_files

DEMO = pathlib.Path(__file__).resolve().parent.parent / "data" / "demo"
VOCABULARIES = ("vocab.txt", "tokenizer.json")
# the old one-word names have moved to these organisations; a cache may know them by either name
ORGANISATIONS = {"bert-": "google-bert/", "distilbert-": "distilbert/"}
WANTED = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
TIMEOUT = 10  # seconds that a server may take to answer


def resolve(name, files=None):
    """Returns the folder (pathlib.Path) of the model called `name`: a path, `demo`, or a Hugging Face name.

    `files` names what is needed where that is less than a model: `["vocab.txt"]`. Downloads only what no local folder
    and no cache has. Raises UserError where there is no such model, with what was looked for and two ways on.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return _local(folder, files)
    if folder.exists():
        raise UserError(f"{name} is a file: give the folder of a model")
    if name == "demo":
        if not DEMO.is_dir():
            raise UserError(f"the demo model is not in {DEMO}: get the whole repository, or give another model")
        return _local(DEMO, files)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        raise UserError(f"{name} is no folder, nor the name of a model: give an existing folder, or `demo`")
    names = _names(name)
    cached = [snapshot for known in names if (snapshot := _snapshot(known)) and not _lacks(snapshot, files)]
    return cached[0] if cached else _download(names, files)


def _local(folder, files):
    missing = [name for name in files or ["config.json"] if not (folder / name).is_file()]
    if missing:
        raise UserError(f"the folder {folder} has no {' and no '.join(missing)}: give the folder of a model")
    return folder


def _names(name):
    """Returns the names under which the Hub has known a model, today's first."""
    short = name.rpartition("/")[2]
    for start, organisation in ORGANISATIONS.items():
        if short.startswith(start) and name in (short, organisation + short):
            return [organisation + short, short]
    return [name]


def cache_folder():
    """Returns the Hugging Face cache: $HF_HUB_CACHE, $HF_HOME/hub or ${XDG_CACHE_HOME:-~/.cache}/huggingface/hub."""
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(general, "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return pathlib.Path(os.path.expandvars(cache)).expanduser()


def _cached(name):
    """Returns the folder that the cache keeps for a Hub name."""
    return cache_folder() / ("models--" + name.replace("/", "--"))


def _snapshot(name):
    """Returns the folder of the cached main revision of a Hub name, or None."""
    reference = _cached(name) / "refs" / "main"
    if not reference.is_file():
        return None
    commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    folder = _cached(name) / "snapshots" / commit
    return folder if re.fullmatch(r"\w+", commit, re.ASCII) and folder.is_dir() else None


def _lacks(folder, files):
    """Returns what a folder lacks of `files`, by default of a model with its vocabulary; "" where it lacks nothing."""
    missing = [name for name in files or ["config.json"] if not (folder / name).is_file()]
    if missing:
        return missing[0]
    if files is None and not any((folder / name).is_file() for name in VOCABULARIES):
        return "vocab.txt"
    try:
        return "" if files or weight_files(folder) else "weights"
    except UserError as error:
        return str(error)


def _download(names, files):
    """Returns the folder of a snapshot fetched into the cache, or raises UserError with the reason and two ways on."""
    name = names[0]
    looked = " and ".join(_cached(name).name for name in names)
    ways = (
        f"on a computer with a network run `hf download {name} --local-dir {name.rpartition('/')[2]}` and copy that "
        "folder here, or give another model's folder, or `demo`"
    )
    missing = f"{name} is not a folder, nor in the cache {cache_folder()} ({looked})"
    offline = [key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(os.environ.get(key, ""))]
    if offline:
        raise UserError(f"{missing}, and {offline[0]} forbids a download: {ways}")
    import huggingface_hub  # reads HF_ENDPOINT and its kin when it is imported

    try:
        # answers at once whether there is a network and such a model; snapshot_download would retry for minutes
        info = huggingface_hub.HfApi().model_info(name, timeout=TIMEOUT)
        safe = any(re.fullmatch(r"model(-.*)?\.safetensors", sibling.rfilename) for sibling in info.siblings or [])
        folder = huggingface_hub.snapshot_download(
            name,
            cache_dir=cache_folder(),
            allow_patterns=files or WANTED + ([] if safe else PICKLED),
            etag_timeout=TIMEOUT,
        )
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"{missing}, nor on {huggingface_hub.constants.ENDPOINT}: check the name, or {ways}") from None
    except Exception as error:  # each version of the library, and of its HTTP client, has its own families
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        source = huggingface_hub.constants.ENDPOINT
        raise UserError(f"{missing}, and cannot be downloaded from {source} ({reason}): {ways}") from error
    lacks = _lacks(pathlib.Path(folder), files)
    if lacks:
        raise UserError(f"{name} cannot be used: {lacks} is missing there: give another model")
    return pathlib.Path(folder)


def _is_on(value):
    """Whether an environment variable means yes, as huggingface_hub reads it."""
    return value.upper() in ("1", "ON", "YES", "TRUE")
