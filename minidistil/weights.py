"""Loads and saves models as Hugging Face folders, by the tables of families.py.

A folder's weights are model.safetensors or pytorch_model.bin, whole or in shards. Every tensor of the files is used, or
ignored with a reason, and every parameter of the model is filled. Files are not trusted: any bytes load or are refused.
"""

import os
import pathlib
import re

import torch
import torch.nn.functional as F

from minidistil.errors import UserError
from minidistil.families import FAMILIES, IGNORED, OF_TASKS, SUPPORTED, WRAPPERS
from minidistil.files import sha256, write_json
from minidistil.model import Config, LanguageModel
from minidistil.safetensors import HEADER_LIMIT, damaged, parse_json, read_safetensors, write_safetensors

# the first one present counts
WEIGHT_FILES = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"


def weight_files(folder):
    """Returns the paths of a folder's weights, one file or the shards of an index; UserError where one is missing."""
    folder = pathlib.Path(folder)
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights: looked for {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    shards = _read_index(found)
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {_some(missing)}, named in {found.name}: copy or download it again")
    return [folder / name for name in shards]


def digests(folder):
    """Returns the SHA-256 of each file of weights in a folder: what the model is, wherever it lies."""
    return [sha256(path) for path in weight_files(folder)]


def read_weights(folder):
    """Returns a folder's tensors, perhaps views of a memory map, by their names there; UserError for damaged ones."""
    tensors = {}
    for path in weight_files(folder):
        part = read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_bin(path)
        if twice := tensors.keys() & part.keys():
            raise damaged(path, f"{min(twice)!r} is in another shard too")
        tensors |= part
    return tensors


def read_json(path, kind=dict):
    """Returns the JSON object, or list, in a file; raises UserError for anything else."""
    with open(path, "rb") as file:
        data = file.read(HEADER_LIMIT)
    try:
        return parse_json(data, kind)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}: copy or download it again") from None


def _read_index(path):
    """Returns the shards in an index, sorted; only plain file names are allowed, so no path leads out of the folder."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise damaged(path, "it has no weight_map")
    suffix = ".safetensors" if ".safetensors." in path.name else ".bin"
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(rf"\w[\w.-]*\{suffix}", shard, re.ASCII):
            raise damaged(path, f"{shard!r} is not the name of a {suffix} file")
    return sorted(set(shards.values()))


def _read_bin(path):
    """Returns the tensors of a pytorch_model.bin; its pickle may hold only tensors and dicts, and never runs."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # else the format of torch before 1.6, which cannot be mapped
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles raise all kinds of exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or holds more than tensors ({reason}): use a safetensors file") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _is_plain(x) for name, x in tensors.items()):
        raise UserError(f"{path} is not a plain dict of names to tensors: use a safetensors file")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_plain(tensor):
    """Whether this is a dense CPU tensor with memory for every element (stride 0 makes terabytes of four bytes)."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


REQUIRED = ("vocab_size", "positions", "layers", "heads", "width", "mlp_width")
SIZE_LIMIT = 2**24  # of any number, so that products stay below 2^63
LAYER_LIMIT = 256  # a model on the meta device is built in about a second


def read_config(place):
    """Returns the Config in a folder's config.json or any file; UserError where something in it is unsupported."""
    path = pathlib.Path(place)
    if not path.is_file():
        path = path / "config.json"
    if not path.is_file():
        raise no_config(place)
    values = read_json(path)
    family = _family(path, values)
    for key, *supported in (*SUPPORTED, *FAMILIES[family].config_only):
        if values.get(key) not in (*supported, None):
            raise UserError(f"{path}: {key} is {values[key]!r}: use a model with {supported[0]!r}")
    numbers = {"family": family, **FAMILIES[family].config_defaults}
    if family == "gpt2" and values.get("n_inner") is None and isinstance(values.get("n_embd"), int):
        values["n_inner"] = 4 * values["n_embd"]
    first, others = (Config.dropout if values.get(k) is None else values[k] for k in ("embd_pdrop", "resid_pdrop"))
    if family == "gpt2" and first != others:
        raise UserError(f"{path}: embd_pdrop is {first!r} and resid_pdrop {others!r}: give both the same value")
    for ours, theirs in FAMILIES[family].config_keys.items():
        if values.get(theirs) is not None:
            numbers[ours] = _number(path, ours, theirs, values[theirs])
        elif ours in REQUIRED:
            raise UserError(f"{path} has no {theirs}: copy or download it again")
    numbers["positions"] -= unused_positions(family, numbers.get("pad_id", Config.pad_id))
    try:
        config = Config(**numbers)
    except ValueError as error:
        raise UserError(f"{path}: {error}: correct it") from None
    if config.pad_id >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id is {config.pad_id}, beyond the {config.vocab_size} words: correct it")
    return config


def no_config(place):
    """Returns the UserError for a folder without config.json; it says what the folder seems to be."""
    place, way = pathlib.Path(place), "give the folder of a model"
    inside = [path.parent for path in sorted(place.glob("*/config.json")) if _holds_weights(path.parent)]
    if (place / "bert_config.json").is_file() and _holds_weights(place):
        way = "rename its bert_config.json to config.json"
    elif (place / "bert_config.json").is_file():
        way = "it is a TensorFlow release of BERT: give a folder with the same model's weights for PyTorch"
    elif inside:  # as sentence-transformers keeps a model
        way = f"give {inside[0]}"
    return UserError(f"{place} has no config.json: {way}")


def _holds_weights(folder):
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def _family(path, values):
    """Returns a key of FAMILIES; old files name the family only in `architectures`, or show it only by their keys."""
    family = values.get("model_type")
    if not family and values.get("architectures"):
        match = re.match(r"\['(\w+?)(?:For|Model|LMHead)", str(values["architectures"]))
        known = {table.architecture: name for name, table in FAMILIES.items()}
        family = known.get(match[1], values["architectures"]) if match else values["architectures"]
    elif not family:
        family = "distilbert" if "n_layers" in values else "gpt2" if "n_layer" in values else "bert"
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{path} describes a {family!r} model: use one of {', '.join(FAMILIES)}")
    return family


def _number(path, ours, theirs, value):
    """Returns one number of config.json; raises UserError where its type or range is wrong."""
    kind, what, least, most = float, "a number", 0, 1
    if isinstance(getattr(Config, ours), int):
        kind, what, least = int, "a whole number", 0 if ours == "pad_id" else 1
        most = LAYER_LIMIT if ours == "layers" else SIZE_LIMIT
    if type(value) not in (int, kind) or not least <= value <= most:
        raise UserError(f"{path}: {theirs} is {value!r}: it must be {what} from {least} to {most}")
    return kind(value)


def unused_positions(family, pad_id):
    """Returns how many rows at the beginning of a position table no token uses."""
    return pad_id + 1 if FAMILIES[family].first_position else 0


def write_config(folder, config, head=None, **extra):
    """Writes config.json as transformers' configuration of this family has it.

    `head` is how the name of the model's class ends there; None: as the language model's does.
    """
    family = FAMILIES[config.family]
    values = {theirs: getattr(config, ours) for ours, theirs in family.config_keys.items()}
    values[family.config_keys["positions"]] += unused_positions(config.family, config.pad_id)
    if "norm_eps" not in family.config_keys and config.norm_eps != Config.norm_eps:
        raise ValueError(f"a {config.family}'s config.json cannot say that norm_eps is {config.norm_eps}")
    if config.causal:
        values["embd_pdrop"] = config.dropout
    suffix = family.language_model if head is None else head
    values |= {"model_type": config.family, "architectures": [f"{family.architecture}{suffix}"]}
    values |= {**family.config_constants, "tie_word_embeddings": True, "torch_dtype": "float32", **extra}
    write_json(pathlib.Path(folder) / "config.json", dict(sorted(values.items())))


def _canonical(name):
    """Returns their name without wrapper prefixes, and with weight and bias for TensorFlow's gamma and beta."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _names(config, parameters):
    """Returns {our parameter: [their name, ...]} for the parameters of a model with this config."""
    rules = FAMILIES[config.family].tensors
    names = {}
    for ours in parameters:
        module, _, kind = ours.rpartition(".")
        layer = "".join(re.findall(r"blocks\.(\d+)", module))
        theirs = rules[re.sub(r"blocks\.\d+", "blocks.{i}", module)].replace("{i}", layer)
        parent, dot, last = theirs.rpartition(".")
        names[ours] = [f"{parent}{dot}{part}.{kind}" for part in last.split("|")]
    return names


def load_model(folder, fresh_head=False, kind=LanguageModel):
    """Returns the model of a Hugging Face folder in fp32 on the CPU, in eval mode: a LanguageModel or SentenceEncoder.

    `fresh_head` adds a head to a file without one: the identity, then GELU, LayerNorm and the tied decoder; a model
    with such a head has the attribute `fresh_head` True. Raises UserError unless every tensor of the file is used or
    ignored with a reason, and every parameter has a tensor.
    """
    config = read_config(folder)
    with torch.device("meta"):  # allocates and draws nothing: every tensor is replaced below
        model = kind(config)
    source, names = named_weights(folder, model)
    fresh = {}
    if not _with_head(source, names):
        if not fresh_head:
            way = f"give it one: `train.py --teacher none --student-init {folder}`, or learn its sentence vectors alone"
            raise UserError(f"{folder} has no masked-LM head: {way}")
        fresh = _fresh_head(config)
    elif kind is LanguageModel:
        check_decoder(folder, config)
    model.fresh_head = bool(fresh)
    return fill(folder, model, source, names, fresh).eval()


def has_head(folder):
    """Whether a model's files hold the head that predicts masked words; a causal model needs none."""
    with torch.device("meta"):
        model = LanguageModel(read_config(folder))
    return _with_head(*named_weights(folder, model))


def _with_head(source, names):
    of_head = [name for ours in names if ours.startswith("head.") for name in names[ours]]
    return not of_head or any(name in source for name in of_head)


def check_decoder(folder, config):
    """Raises UserError where config.json says that the decoder has weights of its own, and no file holds them."""
    (name, words), *_ = FAMILIES[config.family].tied
    if read_json(pathlib.Path(folder) / "config.json").get("tie_word_embeddings") is False:
        if not any(_canonical(theirs).endswith(name) for theirs in read_weights(folder)):
            way = f"take whole weights, or remove tie_word_embeddings if it equals {words}"
            raise UserError(f"{folder} lacks {name}, which its config.json says is not tied: {way}")


def named_weights(folder, model):
    """Returns ({their name: tensor}, {our parameter: [their name, ...]}) for a model from a folder's files."""
    tensors = read_weights(folder)
    _check_family(folder, model.config.family, tensors)
    names = _names(model.config, model.state_dict())
    return _by_their_names(folder, tensors, [name for group in names.values() for name in group]), names


def task_weights(folder):
    """Returns the tensors of a folder's files that heads of tasks use, the pooler among them, by their plain names."""
    tensors = read_weights(folder)
    plain = _plain_names(tensors)
    return {plain[n]: tensors[n] for n in tensors if any(re.fullmatch(pattern, plain[n]) for pattern, _ in OF_TASKS)}


def _check_family(folder, family, tensors):
    """Raises UserError for tensors of another family whose encoder has the same names: BERT's and RoBERTa's."""
    for name in tensors:
        plain = _canonical(name)
        if FAMILIES[family].first_position:
            other = "bert" if re.search(r"(^|\.)cls\.predictions\.", plain) else None
        else:
            other = "roberta" if "roberta" in name.split(".") or re.search(r"(^|\.)lm_head\.dense\.", plain) else None
        if other:
            way = f"if it is one, write {other!r} as the model_type there"
            raise UserError(
                f"{folder} holds {name}, as a {other} does, but its config.json describes a {family}: {way}"
            )


def fill(folder, model, source, names, fresh=()):
    """Fills a model on the meta device with the tensors of `fresh` (by our names), and of `source` for all others."""
    state = dict(fresh)
    wanted = [ours for ours in names if ours not in state]
    if missing := [name for ours in wanted for name in names[ours] if name not in source]:
        raise UserError(f"{folder} lacks {_some(missing)}: take weights and config.json from the same model")
    empty = model.state_dict()
    for ours in wanted:
        rows, *others = empty[ours].shape
        parts = []
        for name in names[ours]:
            transposed, unused = _layout(model.config, name)
            shape = (rows // len(names[ours]) + unused, *others)
            _check(f"{folder}: {name}", source[name], shape[::-1] if transposed else shape)
            parts.append((source[name].t() if transposed else source[name])[unused:])
        state[ours] = torch.cat(parts).float()
    model.load_state_dict(state, assign=True)
    return model


def _layout(config, name):
    """Returns (whether files hold their tensor `name` transposed, its first rows that no token uses)."""
    family = FAMILIES[config.family]
    unused = unused_positions(config.family, config.pad_id) if name.endswith("position_embeddings.weight") else 0
    return bool(re.search(family.transposed, name)), unused


def _by_their_names(folder, tensors, places):
    """Returns the tensors by the names `places` without tied and ignored ones; UserError names an unknown tensor."""
    tied = [(copy, original) for family in FAMILIES.values() for copy, original in family.tied if original in places]
    known = {_canonical(name): name for name in places + [copy for copy, _ in tied]}
    plain_names, found, unknown = _plain_names(tensors), {}, []
    for name, tensor in tensors.items():
        plain = plain_names[name]
        if plain not in known:
            unknown += [] if any(re.fullmatch(pattern, plain) for pattern, _ in IGNORED) else [name]
        elif known[plain] in found:
            raise UserError(f"{folder} holds {known[plain]} twice, also as {name}: remove one")
        else:
            found[known[plain]] = tensor
    if unknown:
        way = "correct config.json if the model needs it, or save the weights without it"
        raise UserError(f"{folder} holds {_some(unknown)}, which is not in the model of its config.json: {way}")
    for copy, original in tied:
        if (tensor := found.pop(copy, None)) is not None:
            other = found.setdefault(original, tensor)
            if tensor.dtype != other.dtype or not torch.equal(tensor, other):
                raise UserError(f"{folder}: {copy} differs from {original}: use a model with a tied decoder")
    return found


def _plain_names(tensors):
    """Returns {name in the files: canonical name} without what all begin with, where a module of its user's held it."""
    wrapper = re.match(r"(.*\.)?", os.path.commonprefix(list(tensors)))[0]
    return {name: _canonical(name.removeprefix(wrapper)) for name in tensors}


def _some(names):
    """Returns the first of some names and the number of the others."""
    return min(names) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _check(name, tensor, shape):
    """Raises UserError unless a tensor of the file is floating-point, finite and of this shape."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, but config.json asks for {shape}: correct it")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"{name} is {tensor.dtype}: convert it to float32, float16 or bfloat16")
    if not all(end.isfinite() for end in tensor.aminmax()):  # one pass without a temporary; both NaN if a value is
        raise UserError(f"{name} holds values that are not finite: take an earlier checkpoint")


def _fresh_head(config):
    """Returns the state of a head whose dense layer is the identity."""
    return {
        "head.dense.weight": torch.eye(config.width),
        "head.dense.bias": torch.zeros(config.width),
        "head.norm.weight": torch.ones(config.width),
        "head.norm.bias": torch.zeros(config.width),
        "head.bias": torch.zeros(config.vocab_size),
    }


def save_model(folder, model, **extra):
    """Writes config.json and model.safetensors of an fp32 model as transformers does; `load_model` inverts it.

    A LanguageModel becomes a BertForMaskedLM or, by its family, another; the tied decoder is left out, and so is a
    projection to a teacher's width. A Classifier becomes a ...ForSequenceClassification, a SpanReader a
    ...ForQuestionAnswering, a VectorClassifier a ...ForSentenceVectors, a SentenceEncoder a BertModel; `extra` more
    keys.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("projection.")}
    tensors, hub_name = {}, getattr(model, "hub_name", None)
    for ours, theirs in _names(model.config, state).items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            transposed, unused = _layout(model.config, name)
            part = F.pad(part, (0, 0, unused, 0)) if unused else part
            name = name.partition(".")[2] if hub_name == "Model" else name  # a model without a head has no prefix
            tensors[name] = part.t().contiguous() if transposed else part
    write_config(folder, model.config, hub_name, **extra)
    write_safetensors(pathlib.Path(folder) / "model.safetensors", tensors)
