"""Sentence vectors: how a sentence encoder pools the hidden states of a sentence, and what its folder says of that.

A folder of sentence-transformers has the model, and beside it modules.json, which lists what is done in turn: the
transformer, the pooling and perhaps a normalisation to length 1. Older ones keep the model in 0_Transformer.
Source: Reimers and Gurevych 2019, arXiv 1908.10084; sentence-transformers 2 to 6.

Legend:  B sentences   T tokens of the longest one   C width
"""

import dataclasses
import pathlib

import torch
import torch.nn as nn

from minidistil import files, weights
from minidistil.errors import UserError
from minidistil.model import Encoder, initialise
from minidistil.tokenizer import Tokenizer

TYPES = "Transformer", "Pooling", "Normalize"  # of the modules, in their order
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}  # mode -> its flag in 1_Pooling
SETTINGS = "prompts", "default_prompt_name", "similarity_fn_name"  # of config_sentence_transformers.json


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Hidden states -> the vector of a sentence; without modules.json it is their mean, as in sentence-transformers."""

    mode: str = "mean"  # of the real tokens' hidden states, or "cls": the first token's
    normalize: bool = False  # whether users of the folder get vectors of length 1
    max_length: int | None = None  # tokens of a sentence that are read; None: as many as there are positions
    settings: dict = dataclasses.field(default_factory=dict)  # prompts and similarity, which are passed on

    def __call__(self, hidden, mask):
        """hidden (B, T, C), mask (B, T), True at real tokens -> vectors (B, C) of any length, fp32 or fp64."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.mode == "cls":
            return hidden[:, 0].to(dtype)
        return (hidden.to(dtype) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    @property
    def prompt(self):
        """The text that users of the folder get before each sentence without asking for it."""
        return (self.settings.get("prompts") or {}).get(self.settings.get("default_prompt_name")) or ""


class SentenceEncoder(nn.Module):
    """An encoder without a language-model head: ids (B, T) -> hidden states (B, T, C)."""

    hub_name, head = "Model", None

    def __init__(self, config, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None, key=None):
        return self.encoder(ids, mask, types, key=key)


def modules_folder(folder):
    """Returns the folder that has the modules.json of a model in `folder`, itself or its parent; None without one."""
    folder = pathlib.Path(folder)
    for place, path in ((folder, ("", ".")), (folder.parent, (folder.name,))):
        if (place / "modules.json").is_file() and _modules(place)[0].get("path") in path:
            return place
    return None


def transformer_folder(folder):
    """Returns where in a folder the model with its config.json is: there, or in its 0_Transformer; None if nowhere."""
    paths = [""]
    if (folder / "modules.json").is_file():
        paths.append(str(_modules(folder)[0].get("path")))
    return next((folder / path for path in paths if (folder / path / "config.json").is_file()), None)


def read_pooling(folder):
    """Returns the Pooling of the model in `folder`; UserError where it does more to a vector than is supported."""
    place = modules_folder(folder)
    if place is None:
        return Pooling()
    modules = _modules(place)
    types = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if tuple(types) not in (TYPES[:2], TYPES):
        supported = "a Transformer, a Pooling and perhaps a Normalize"
        raise UserError(f"{place / 'modules.json'} lists {', '.join(types)}: use a model of {supported}")
    path = place / str(modules[1].get("path")) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing, which says how the model pools: copy or download it again")
    length, settings = (_optional(place, name) for name in ("sentence_bert_config", "config_sentence_transformers"))
    if not length:  # of an older folder, beside the model
        length = _optional(pathlib.Path(folder), "sentence_bert_config")
    if length.get("do_lower_case"):  # of the text, whatever the vocabulary does
        tokenizer = Tokenizer.load(folder)
        if tokenizer.encode("A") != tokenizer.encode("a"):
            what = "sentence_bert_config.json has do_lower_case, and the vocabulary has capitals"
            raise UserError(f"{folder}: {what}: make the text lower case, and do_lower_case false")
    longest = length.get("max_seq_length") or _optional(pathlib.Path(folder), "tokenizer_config").get(
        "model_max_length"
    )
    return Pooling(
        _mode(path, weights.read_json(path)),
        len(types) == len(TYPES),
        longest if isinstance(longest, int) and 0 < longest < weights.SIZE_LIMIT else None,  # 1e30 stands for any
        {key: settings[key] for key in SETTINGS if key in settings},
    )


def _modules(place):
    modules = weights.read_json(place / "modules.json", list)
    if not modules or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{place / 'modules.json'} does not list modules: copy or download it again")
    return modules


def _optional(place, name):
    path = place / f"{name}.json"
    return weights.read_json(path) if path.is_file() else {}


def _mode(path, values):
    """Returns a key of MODES; folders of sentence-transformers 6 have one key `pooling_mode`, older ones flags."""
    flags = [key.removeprefix("pooling_mode_") for key in values if key.startswith("pooling_mode_") and values[key]]
    known = {flag.removeprefix("pooling_mode_"): mode for mode, flag in MODES.items()}
    found = values.get("pooling_mode") or [known.get(flag, flag) for flag in flags]
    found = [found] if isinstance(found, str) else list(found)
    if len(found) != 1 or found[0] not in MODES or values.get("include_prompt") is False:
        what = f"it pools by {', '.join(map(str, found)) or 'nothing'}"
        what += ", without its prompt" if values.get("include_prompt") is False else ""
        raise UserError(f"{path}: {what}: use a model that pools by {' or '.join(MODES)}, prompt included")
    return found[0]


def write_pooling(folder, pooling, config):
    """Writes what sentence-transformers needs beside a model of this `config`, in a form that its versions 2 to 6 read.

    Like `read_pooling`, but for what the model is: `modules.json`, `1_Pooling`, the longest sentence and prompts.
    """
    folder, package = pathlib.Path(folder), "sentence_transformers.models."
    paths = ["", "1_Pooling", "2_Normalize"][: 2 + pooling.normalize]
    modules = [{"idx": i, "name": str(i), "path": path, "type": package + TYPES[i]} for i, path in enumerate(paths)]
    flags = {flag: mode == pooling.mode for mode, flag in MODES.items()}
    flags |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    files.write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": config.width, **flags})
    length = min(pooling.max_length or config.positions, config.positions)
    files.write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    files.write_json(folder / "config_sentence_transformers.json", pooling.settings)
    files.write_json(folder / "modules.json", modules)  # last: with it the folder is one
