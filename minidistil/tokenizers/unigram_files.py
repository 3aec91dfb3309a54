"""The files of a Unigram tokenizer: a .model of sentencepiece or tokenizer.json, and what stands beside them.

A .model does not say which ids its pieces have: the class in tokenizer_config.json, or else the file's name, does. As
sentencepiece is the original, a .model counts before tokenizer.json where both are there; they must agree.
"""

import base64
import json

from minidistil.errors import UserError
from minidistil.tokenizers import sentencepiece_model, unigram_json
from minidistil.tokenizers.json_files import added_token, as_list, read_json, token_id
from minidistil.tokenizers.sentencepiece_model import CONTROL, UNKNOWN
from minidistil.tokenizers.unigram_json import USE

XLM_R, DEBERTA = "sentencepiece.bpe.model", "spm.model"  # ids as in XLM-R; ids as in the model
MODELS = (XLM_R, DEBERTA, "spiece.model", "tokenizer.model")
JSON, CONFIG, SPECIAL, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (*MODELS, JSON, CONFIG, SPECIAL, ADDED)
_CLASS_OF_FILE = {XLM_R: "XLMRobertaTokenizer", DEBERTA: "DebertaV2Tokenizer"}
_CLASS_OF_TYPE = {"xlm-roberta": "XLMRobertaTokenizer", "deberta-v2": "DebertaV2Tokenizer"}
_USUAL = {
    "cls": ("<s>", "[CLS]"), "pad": ("<pad>", "[PAD]"), "sep": ("</s>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"), "mask": ("<mask>", "[MASK]"),
}  # fmt: skip
_OTHER_KEYS = {"cls": "bos_token", "sep": "eos_token"}


def read_folder(folder):
    """The arguments of Unigram for a model's folder; UserError where a file is missing, damaged or another's."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    data, config, special_map = (read_json(folder / name) for name in (JSON, CONFIG, SPECIAL))
    path, pieces, charsmap = _read_pieces(folder, files, data, config)
    sentencepiece_model.check(path, pieces, charsmap)
    vocab = [text for text, _, _ in pieces]
    if path.name != JSON and JSON in files and vocab != [text for text, _ in unigram_json.entries(folder / JSON, data)]:
        raise UserError(f"{path} and {JSON} disagree: remove the one that is not the model's")
    if JSON in files and base64.b64encode(charsmap) not in files[JSON]:
        del files[JSON]  # another normalisation: `save` writes one with which transformers gives our ids
    tokens = _added_tokens(folder, vocab, data, config, special_map)
    special = _special(folder, {*vocab, *tokens}, special_map | config)
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    if special["unk"] != unknown:
        raise UserError(f"{path} has {unknown!r} for unknown text, where unk_token is {special['unk']!r}: {USE}")
    control = {*special.values(), *tokens}  # which plain text does not make
    return {
        "pieces": [(t, score, CONTROL if t in control and kind != UNKNOWN else kind) for t, score, kind in pieces],
        "charsmap": charsmap,
        "special": special,
        "added": [token for token in tokens.values() if token.content not in special.values()],
        "max_length": _max_length(folder / CONFIG, config),
        "pair_separators": unigram_json.separators(folder / JSON, data, special),
        "files": files,
    }


def _read_pieces(folder, files, data, config):
    """(path, pieces, charsmap) of the file that says which pieces there are; pieces in the order of their ids."""
    path = next((folder / name for name in MODELS if name in files), None)
    model = read_json(folder / "config.json")
    kind = config.get("tokenizer_class") or model.get("tokenizer_class")
    kind = str(kind or _CLASS_OF_TYPE.get(str(model.get("model_type")), "")).removesuffix("Fast")
    kind = kind or _CLASS_OF_FILE.get(path and path.name)
    if path and kind in _CLASS_OF_FILE.values() and not config.get("do_lower_case"):
        pieces, charsmap = sentencepiece_model.read(path)
        return path, _as_xlm_r(path, pieces) if kind == _CLASS_OF_FILE[XLM_R] else pieces, charsmap
    if JSON in files:
        return folder / JSON, *unigram_json.read(folder / JSON, data)
    if path:
        what = f"the class {kind} changes ids or text itself" if kind else "no tokenizer_config.json names its class"
        raise UserError(f"{path}: {what}, so its ids are not known: add the model's {JSON}, or {USE}")
    raise UserError(f"{folder} holds neither {XLM_R} nor {JSON}: add the model's vocabulary")


def _as_xlm_r(path, pieces):
    """The pieces of a model in the order of XLM-R's ids, which are fairseq's."""
    if [text for text, _, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise UserError(f"{path} does not begin with <unk>, <s> and </s>, as XLM-R's does: {USE}")
    first = [("<s>", 0.0, CONTROL), ("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    return [*first, *pieces[3:], ("<mask>", 0.0, CONTROL)]


def _special(folder, known, names):
    """name -> token: as the files name them, or as XLM-R and BERT do."""
    special = {}
    for name, usual in _USUAL.items():
        value = names.get(f"{name}_token") or names.get(_OTHER_KEYS.get(name))
        token = added_token(folder / CONFIG, value).content if value else next(filter(known.__contains__, usual), None)
        if token not in known:
            raise UserError(f"{folder} has no {name}_token, such as {usual[0]}, in its vocabulary: {USE}")
        special[name] = token
    if len({*special.values()}) < len(special):
        raise UserError(f"{folder}: two of {', '.join(special)} are the same token: {USE}")
    return special


def _added_tokens(folder, vocab, data, config, special_map):
    """content -> AddedToken of all files, in the order of ids; tokens that the vocabulary lacks follow its last id.

    Raises UserError where a token would have another id than its file says.
    """
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{folder / CONFIG}: added_tokens_decoder is {decoder!r}, no object of tokens: fetch it again")
    in_json = as_list(folder / JSON, "added_tokens", data.get("added_tokens"))
    numbered = [
        *((folder / JSON, token.get("id") if isinstance(token, dict) else None, token) for token in in_json),
        *((folder / CONFIG, i, token) for i, token in decoder.items()),
        *((folder / ADDED, i, token) for token, i in read_json(folder / ADDED).items()),
    ]
    ids, tokens = {text: i for i, text in enumerate(vocab)}, {}
    for i, _, path, value in sorted((token_id(p, i), order, p, t) for order, (p, i, t) in enumerate(numbered)):
        token = added_token(path, value)
        if not token.content or ids.setdefault(token.content, len(ids)) != i:
            what = f"{path} gives {token.content!r} the id {i}, which is not its own or the next free one"
            raise UserError(f"{what}: use the vocabulary that belongs to it")
        tokens.setdefault(token.content, token)
    for values in (config, special_map):
        named = [value for key, value in values.items() if key.endswith("_token") and isinstance(value, (str, dict))]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            named += as_list(folder / CONFIG, key, values.get(key))
        for value in named:
            token = added_token(folder / CONFIG, value)
            if token.content:
                tokens.setdefault(token.content, token)
    return tokens


def _max_length(path, config):
    length = config.get("model_max_length", 512)
    if type(length) not in (int, float) or not length >= 1:
        raise UserError(f"{path}: model_max_length is {length!r}: make it the longest sequence that the model reads")
    return int(length) if length < 1e9 else 512  # transformers writes 1e30 for "unknown"


def written(tokenizer):
    """name -> bytes of the files to write: those that were read, and what AutoTokenizer needs beside them.

    tokenizer.json is there always, because transformers reads a .model only with more packages installed.
    """
    files = dict(tokenizer.files)
    if JSON not in files:
        files[JSON] = _json(unigram_json.write(tokenizer))
    config = json.loads(files.get(CONFIG, b"{}").decode("utf-8-sig"))
    changed = {"model_max_length": tokenizer.max_length}
    if config.get("tokenizer_class") is None:
        names = {f"{name}_token": token for name, token in tokenizer.special.items()}
        names |= {"bos_token": tokenizer.special["cls"], "eos_token": tokenizer.special["sep"]}
        kind = next((_CLASS_OF_FILE[name] for name in _CLASS_OF_FILE if name in files), "PreTrainedTokenizerFast")
        changed |= {"tokenizer_class": kind, **names}
    if config.get("model_input_names") is None:  # DistilBERT's model rejects token_type_ids; all others do without
        changed["model_input_names"] = ["input_ids", "attention_mask"]
    if any(config.get(key) != value for key, value in changed.items()):
        files[CONFIG] = _json(config | changed)
    return files


def cut(files, ids):
    """The files for a vocabulary cut to the tokens of `ids` (token -> id); `written` adds tokenizer.json."""
    changed = {name: data for name, data in files.items() if name != JSON}
    for name in filter(files.__contains__, MODELS):
        changed[name] = sentencepiece_model.cut(files[name], ids)
    if ADDED in files:
        changed[ADDED] = _json({token: ids[token] for token in json.loads(files[ADDED].decode("utf-8-sig"))})
    config = json.loads(files.get(CONFIG, b"{}").decode("utf-8-sig"))
    if config.get("added_tokens_decoder"):
        tokens = config["added_tokens_decoder"].values()
        numbered = {ids[token if isinstance(token, str) else token["content"]]: token for token in tokens}
        changed[CONFIG] = _json(config | {"added_tokens_decoder": numbered})
    return changed


def _json(value):
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
