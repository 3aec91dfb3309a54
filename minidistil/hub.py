"""Model name or path -> local folder.

In this order: a local folder; `demo`, which this repository contains; the Hugging Face cache; a download into it.
"""

import contextlib
import os
import pathlib
import re

from minidistil.errors import UserError
from minidistil.pooling import modules_folder, transformer_folder
from minidistil.tokenizers import unigram_files
from minidistil.weights import no_config, weight_files

DEMO = pathlib.Path(__file__).resolve().parent.parent / "data" / "demo"
VOCABULARIES = ("vocab.txt", "tokenizer.json", "merges.txt", *unigram_files.MODELS)
TOKENIZER = [*VOCABULARIES, "vocab.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"]
SAFE = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
OLDER = "0_Transformer"  # where repositories of sentence-transformers had the model until its release 2
SENTENCES = ["modules.json", "*_Pooling/config.json", "config_sentence_transformers.json"]
# The Hub moved its first models from one-word names to these organisations; a cache may hold them under either name.
# The library sentence-transformers looks for one-word names in its own.
ORGANISATIONS = {
    "bert-": "google-bert/", "roberta-": "FacebookAI/", "xlm-roberta-": "FacebookAI/", "gpt2": "openai-community/",
    "distilbert-": "distilbert/", "distilroberta-": "distilbert/", "distilgpt2": "distilbert/",
    **dict.fromkeys(("all-", "multi-qa-", "paraphrase-", "msmarco-"), "sentence-transformers/"),
}  # fmt: skip
NAME = r"\w[\w.-]*(/\w[\w.-]*)?"  # of a model or a data set on the Hub
TIMEOUT = 10  # seconds for a server to answer


def resolve(name, vectors=False):
    """Returns the folder (pathlib.Path) of the model called `name`: a path, `demo`, or a Hugging Face name.

    The network comes last. `vectors`: those of sentences are wanted, so that a cache without modules.json, such as
    transformers leaves, is completed; where that fails, a line says how vectors are made. Raises UserError where there
    is no such model, with the places that were tried and a remedy.
    """
    folder = pathlib.Path(name).expanduser()
    if name == "demo" and not folder.is_dir():
        folder = DEMO
        if not folder.is_dir():
            raise UserError(f"the demo model is not in {DEMO}: get the whole repository, or name another model")
    if folder.is_dir():
        if (place := transformer_folder(folder)) is None:
            raise no_config(folder)
        return place
    if folder.exists():
        raise UserError(f"{name} is a file: give the folder of a model, such as {folder.parent}")
    if not re.fullmatch(NAME, name, re.ASCII):
        raise UserError(f"{name} is neither a folder nor the name of a model: give an existing folder, or `demo`")
    looked = []
    for known in _names(name):
        place = cache_folder() / f"models--{known.replace('/', '--')}"
        snapshot = _snapshot(place)
        missing = _missing(snapshot) if snapshot else "absent"
        if not missing:
            found = transformer_folder(snapshot)
            return _with_modules(known, found) if vectors and not modules_folder(found) else found
        looked.append(f"{place.name}: {missing}")
    return _download(name, f"{cache_folder()} ({', '.join(looked)})")


def _with_modules(name, folder):
    """Returns the folder of a cached model with the files that say how its sentence vectors are made, if it has any.

    They are of the cached revision, whose weights stay as they are.
    """
    snapshot = folder.parent if folder.name == OLDER else folder
    place, commit = snapshot.parent.parent, snapshot.name
    absent = place / ".no_exist" / commit / "modules.json"  # where the library, too, notes what the Hub has not
    if absent.exists():
        return folder
    try:
        if variable := _offline():
            raise UserError(f"{variable} forbids a download")
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(name, revision=commit, timeout=TIMEOUT)
        if any(file.rfilename == "modules.json" for file in info.siblings or []):
            known = dict(revision=commit, cache_dir=place.parent, etag_timeout=TIMEOUT)
            for patterns in (["sentence_bert_config.json", *SENTENCES[1:]], SENTENCES[:1]):  # modules.json comes last
                huggingface_hub.snapshot_download(name, allow_patterns=patterns, **known)
        else:
            with contextlib.suppress(OSError):  # a cache that may only be read
                absent.parent.mkdir(parents=True, exist_ok=True)
                absent.touch()
    except Exception as error:  # the library's and its HTTP client's errors share no base class
        why = " ".join(str(error).split()) or type(error).__name__
        way = "without one, sentence vectors are the mean of the tokens"
        print(f"{name} has no modules.json in the cache, and none could be fetched ({why}): {way}", flush=True)
    return folder


def _names(name):
    """Returns the names of a model on the Hub, the current one first."""
    short = name.rpartition("/")[2]
    for start, organisation in ORGANISATIONS.items():
        if short.startswith(start) and name in (short, organisation + short):
            return [organisation + short, short]
    return [name]


def published_name(name):
    """Returns the Hub's name of a model that `resolve` found in the Hugging Face cache; None for any other."""
    found = re.fullmatch(NAME, name or "", re.ASCII) and not pathlib.Path(name).exists()
    known = _names(name) if found else []
    cached = (cache_folder() / f"models--{each.replace('/', '--')}" for each in known)
    return known[0] if any(map(_snapshot, cached)) else None


def cache_folder():
    """Returns the Hugging Face cache, as huggingface_hub.constants has it, which a cached model does without.

    $HF_HUB_CACHE, its older name $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub or ${XDG_CACHE_HOME:-~/.cache}/huggingface/hub.
    """
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(general, "huggingface")
    older = os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return pathlib.Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or older)).expanduser()


def _snapshot(place):
    """Returns the folder of a cached model's main revision, or None."""
    reference = place / "refs" / "main"
    commit = reference.read_text(encoding="utf-8", errors="replace").strip() if reference.is_file() else ""
    folder = place / "snapshots" / commit
    return folder if re.fullmatch(r"\w+", commit, re.ASCII) and folder.is_dir() else None


def _missing(folder):
    """Returns what a folder lacks of a complete model with its vocabulary, such as "no config.json", or ""."""
    folder = transformer_folder(folder)
    if folder is None:
        return "no config.json"
    try:
        weight_files(folder)
    except UserError:
        return "no weights, or not all"
    return "" if any((folder / name).is_file() for name in VOCABULARIES) else "no vocabulary"


def _refusal(error, page):
    """Returns (what a failed download means, the first way on from there or "")."""
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    chain = [error]
    while cause := chain[-1].__cause__:  # the library wraps what a server said about a file
        chain.append(cause)
    answers = [e.response for e in chain if getattr(e, "response", None) is not None]
    status = answers[0].status_code if answers else None
    if status == 401:  # the Hub does not tell a stranger whether there is such a model
        return "no such model there, or one that is private or gated", f"if it is there, {login}; or "
    if status == 403:
        return "you may not read it: it is private or gated", f"ask for access on {page}, then {login}; or "
    if status == 404 and type(error).__name__ == "RepositoryNotFoundError":
        return "no such model there", ""
    return " ".join(str(error).split()) or type(error).__name__, ""


def _offline():
    """Returns the variable of the environment that forbids downloads, or None."""
    variables = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
    return next((name for name in variables if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def _download(name, cache):
    """Returns the folder of a snapshot downloaded into the cache; UserError says why not, and two remedies."""
    hub_name = _names(name)[0]
    failed = f"{name} is not a folder, nor whole in the cache {cache}"
    ways = (
        f"where there is a network, run `hf download {hub_name} --local-dir {name.rpartition('/')[2]}` and copy that "
        "folder; or name another model: a folder, or `demo`"
    )
    if variable := _offline():
        raise UserError(f"{failed}, and {variable} forbids a download: {ways}")
    import huggingface_hub  # reads HF_ENDPOINT and similar variables at import

    try:
        # first, because it fails at once without a network or such a model, where the download retries for long
        info = huggingface_hub.HfApi().model_info(hub_name, timeout=TIMEOUT)
        of_model = rf"({OLDER}/)?model(-.*)?\.safetensors"
        safe = any(re.fullmatch(of_model, file.rfilename) for file in info.siblings or [])
        patterns = ["config.json", *TOKENIZER, "sentence_bert_config.json", *(SAFE if safe else PICKLED)]
        patterns += [f"{OLDER}/{pattern}" for pattern in patterns] + SENTENCES
        folder = huggingface_hub.snapshot_download(
            hub_name, cache_dir=cache_folder(), allow_patterns=patterns, etag_timeout=TIMEOUT
        )
    except Exception as error:  # the library's and its HTTP client's errors share no base class
        source = huggingface_hub.constants.ENDPOINT
        reason, way = _refusal(error, f"{source}/{hub_name}")
        raise UserError(f"{failed}, nor to be had from {source} ({reason}): {way}{ways}") from error
    if missing := _missing(pathlib.Path(folder)):
        raise UserError(f"{hub_name} has {missing} on the Hub: name another model")
    return transformer_folder(pathlib.Path(folder))
