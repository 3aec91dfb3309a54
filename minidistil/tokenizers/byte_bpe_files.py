"""The files of byte-level BPE, read and written: vocab.json, merges.txt, tokenizer.json and their kin.

A file spells each byte as one printable character: those that are printable in Latin-1 stand for themselves, the other
68 for U+0100 and up.
"""

import dataclasses
import re

from minidistil.errors import UserError
from minidistil.files import write_json, write_text
from minidistil.tokenizers.added_files import read_added_tokens
from minidistil.tokenizers.json_files import added_token, longest_sequence, read_json, read_text, switches

END_OF_TEXT = "<|endoftext|>"  # the special token of GPT-2
ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in _PRINTABLE}  # character -> byte
BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
_SPELLING = {byte: c for c, byte in BYTES.items()}
_CLASSES = "(GPT2|Roberta|Longformer|Bart)Tokenizer(Fast)?|PreTrainedTokenizerFast|TokenizersBackend"
_MARK = re.compile(r"<.*>|\[.*\]", re.DOTALL)  # a token that is special to somebody, which no merge makes


def spell(text):
    """The bytes of a text as the files spell them."""
    return text.encode("utf-8", "replace").decode("latin-1").translate(_SPELLING)


def bytes_of(token):
    """The bytes that a token of the files spells; those of its own characters where it spells none."""
    try:
        return bytes(map(BYTES.__getitem__, token))
    except KeyError:
        return token.encode("utf-8", "replace")


def read_folder(folder):
    """(path of the vocabulary, tokens without added ones, merges, settings with them) of a model's folder."""
    names = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    path, merges_path, json_path, config_path = (folder / name for name in names)
    data, config, model = read_json(json_path), read_json(config_path), read_json(folder / "config.json")
    default = "RobertaTokenizer" if "model_type" in model else "TokenizersBackend"
    kind = str(config.get("tokenizer_class") or model.get("tokenizer_class") or default)
    if not re.fullmatch(_CLASSES, kind):
        raise UserError(f"{config_path}: tokenizer_class is {kind}: use a model with GPT-2's or RoBERTa's tokenizer")
    if switches(config_path, config, {"add_prefix_space": "prefix"}).get("prefix"):
        raise UserError(f"{config_path}: add_prefix_space is True, which is not supported: use GPT-2's or RoBERTa's")
    stored = _read_tokenizer_json(json_path, data) if json_path.exists() else None
    if path.exists() and merges_path.exists():
        ids, merges = read_json(path), _read_merges(merges_path)
        if stored and stored != (ids, [*merges.values()]):
            raise UserError(f"{path} or merges.txt and tokenizer.json disagree: remove what is not the model's")
    elif stored:
        path = merges_path = json_path
        ids, merges = stored[0], {f"{json_path}, merge {i}": pair for i, pair in enumerate(stored[1], 1)}
    else:
        missing = merges_path if path.exists() else path
        raise UserError(f"there is no {missing}: add it, or the model's tokenizer.json")
    vocab = _in_order(path, ids)
    in_config = kind not in ("PreTrainedTokenizerFast", "TokenizersBackend")
    added, special = _read_added(folder, vocab, data, config, in_config)
    _check_merges(merges_path, merges, ids, special.values(), {token.content for token in added})
    settings = {"added": added, "sep": special["eos_token"], "purposes": _read_purposes(folder, config)}
    settings |= longest_sequence(config_path, config)
    return path, vocab, [*merges.values()], settings


def _in_order(path, ids):
    """The tokens of {token: id} in the order of their ids, which must be 0, 1, 2 ... and include all bytes."""
    if not ids or not all(type(i) is int for i in ids.values()):
        raise UserError(f"{path} holds no vocabulary of tokens and ids: fetch it again")
    vocab = sorted(ids, key=ids.get)
    for i, token in enumerate(vocab):
        if ids[token] != i:
            what = f"its ids are not 0, 1, 2, ...: {token!r} has {ids[token]} where {i} comes next"
            raise UserError(f"{path}: {what}: use the model's own file")
    for c, byte in BYTES.items():
        if c not in ids:
            what = f"it has no token {c!r}, which spells the byte {byte}, as byte-level BPE needs"
            raise UserError(f"{path}: {what}: use a model with GPT-2's or RoBERTa's tokenizer")
    return vocab


def _read_merges(path):
    """{place in the file: (left, right)} of a merges.txt."""
    merges = {}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line and not line.startswith("#version"):
            merges[f"{path}, line {n}"] = pair = tuple(line.split(" "))
            if len(pair) != 2 or not all(pair):
                raise UserError(f"{path}, line {n}: {line[:80]!r} is no pair of tokens: fetch the file again")
    return merges


def _read_tokenizer_json(path, data):
    """(token -> id, merges) of a tokenizer.json, if its tokenizer is byte-level BPE and nothing else."""
    model, splitter = data.get("model"), data.get("pre_tokenizer")
    model = model if isinstance(model, dict) else {}
    if isinstance(splitter, dict) and splitter.get("type") == "Sequence":
        parts = splitter.get("pretokenizers")
        splitter = parts[0] if isinstance(parts, list) and len(parts) == 1 else splitter
    splitter = splitter if isinstance(splitter, dict) else {}
    for name, value, accepted in (
        ("model.type", model.get("type"), ("BPE", None)),  # early files omit it
        ("model.dropout", model.get("dropout"), (None, 0)),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), (None, "")),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix"), (None, "")),
        ("model.byte_fallback", model.get("byte_fallback"), (None, False)),
        ("model.ignore_merges", model.get("ignore_merges"), (None, False)),
        ("normalizer", data.get("normalizer"), (None,)),
        ("pre_tokenizer.type", splitter.get("type"), ("ByteLevel",)),
        ("pre_tokenizer.add_prefix_space", splitter.get("add_prefix_space"), (False,)),
        ("pre_tokenizer.use_regex", splitter.get("use_regex"), (None, True)),
    ):
        if value not in accepted:
            value = value.get("type") if isinstance(value, dict) else value
            what = f"{path}: {name} is {value!r}, which is not supported"
            raise UserError(f"{what}: use a model with GPT-2's or RoBERTa's tokenizer")
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise UserError(f"{path} holds no vocabulary of tokens and merges: fetch it again")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges]
    for i, pair in enumerate(pairs, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(t and isinstance(t, str) for t in pair):
            raise UserError(f"{path}, merge {i}: {str(merges[i - 1])[:80]!r} is no pair of tokens: fetch it again")
    return ids, [*map(tuple, pairs)]


def _read_added(folder, vocab, data, config, in_config):
    """(AddedTokens, {"eos_token": ...} of all special tokens) of a folder."""
    found = read_added_tokens(folder, list(vocab), data, config, in_config, {}, "")
    if ROBERTA["mask"] in {*vocab, *(token.content for token in found)}:
        special = {f"{name}_token": token for name, token in ROBERTA.items()}
        special |= {"bos_token": ROBERTA["cls"], "eos_token": ROBERTA["sep"]}
        return read_added_tokens(folder, list(vocab), data, config, in_config, special, "RoBERTa"), special
    path, end = folder / "tokenizer_config.json", config.get("eos_token")
    if end is None and config.get("added_tokens_decoder") is None:
        path = folder / "special_tokens_map.json"
        end = read_json(path).get("eos_token")
    special = {"eos_token": END_OF_TEXT if end is None else added_token(path, end).content}
    return read_added_tokens(folder, list(vocab), data, config, in_config, special, "GPT-2"), special


def _read_purposes(folder, config):
    """{"pad_token": "<pad>" ...}: the tokens that a folder names for a purpose."""
    if config.get("added_tokens_decoder") is None:
        config = config | read_json(folder / "special_tokens_map.json")
    named = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
    return {key: added_token(folder / "tokenizer_config.json", value).content for key, value in named.items()}


def _check_merges(path, merges, ids, special, added):
    """Raises UserError where merges and vocabulary do not belong together, as where a file was cut short."""
    made = {left + right for left, right in merges.values()}
    parts = made.union(BYTES)
    for place, (left, right) in merges.items():
        problem = None
        if missing := [token for token in (left, right, left + right) if token not in ids]:
            problem = f"the vocabulary has no {missing[0][:80]!r}: use the files of one model"
        elif left not in parts or right not in parts:
            odd = right if left in parts else left
            problem = f"{odd[:40]!r} is neither a byte nor merged: use files of byte-level BPE"
        elif left + right in special:
            problem = f"{left + right!r} is a special token: use the files of one model"
        if problem:
            raise UserError(f"{place} merges {left[:40]!r} and {right[:40]!r}, but {problem}")
    lost = [
        token
        for token in ids
        if token not in parts and token not in added and not _MARK.fullmatch(token)
        if any(token[:i] in ids and token[i:] in ids for i in range(1, len(token)))
    ]
    if lost:
        what = f"{[*merges][-1] if merges else path} is the last, but no merge makes {len(lost):,} of the tokens"
        raise UserError(f"{what}, such as {lost[0][:40]!r}: the file was cut short: fetch it again")


def write_folder(folder, tokenizer):
    """Writes the five files of a ByteBPE, from which transformers makes the same ids."""
    special = tokenizer.special
    named = {"bos_token": special.get("cls", special["sep"]), "eos_token": special["sep"]}
    named["unk_token"] = special["sep"]  # as in GPT-2, which needs none
    named |= {f"{name}_token": token for name, token in special.items()} if tokenizer.masked else {}
    named |= tokenizer.purposes
    tokens = {str(i): dataclasses.asdict(token) for i, token in tokenizer.tokens.items()}
    config = {
        "tokenizer_class": "RobertaTokenizer" if tokenizer.masked else "GPT2Tokenizer",
        "model_max_length": tokenizer.max_length, "add_prefix_space": False, **named, "added_tokens_decoder": tokens,
    }  # fmt: skip
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokenizer.base)})
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer.json", _tokenizer_json(tokenizer))


def _tokenizer_json(tokenizer):
    """Returns the tokenizer.json with which the crate `tokenizers` gives the same ids."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    post_processor = level
    if tokenizer.masked:
        post_processor = {
            "type": "RobertaProcessing", "sep": [tokenizer.special["sep"], tokenizer.sep_id],
            "cls": [tokenizer.special["cls"], tokenizer.cls_id], "trim_offsets": True, "add_prefix_space": False,
        }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, **dataclasses.asdict(token)} for i, token in tokenizer.tokens.items()],
        "normalizer": None, "pre_tokenizer": level, "post_processor": post_processor, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokenizer.base)},
            "merges": [f"{a} {b}" for a, b in tokenizer.merges],
        },
    }  # fmt: skip
