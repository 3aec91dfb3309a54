"""The files of a WordPiece tokenizer, read and written: vocab.txt, tokenizer.json, tokenizer_config.json and their kin.

Added tokens may stand in any of them. As in transformers, the class of the tokenizer decides which file's settings
count: BertTokenizer's come from tokenizer_config.json, those of a TokenizersBackend from tokenizer.json.
"""

import dataclasses
import re

from minidistil.errors import UserError
from minidistil.tokenizers.added_files import read_added_tokens
from minidistil.tokenizers.added_tokens import AddedToken
from minidistil.tokenizers.json_files import longest_sequence, read_json, read_text, switches

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
LONGEST_WORD = 100  # characters, after normalisation; a longer word is [UNK]


def read_vocab(path):
    """The entries of a vocabulary file."""
    return [line.rstrip(" \t") for line in read_text(path).removesuffix("\n").split("\n")]


def read_folder(folder):
    """(path of the vocabulary, entries without added tokens, settings with them) of a model's folder."""
    path, json_path, config_path = (folder / n for n in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"))
    data, config, model = read_json(json_path), read_json(config_path), read_json(folder / "config.json")
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or ("model_type" in model and "BertTokenizer")
    kind = str(kind or "TokenizersBackend")
    if not re.fullmatch("(Distil)?BertTokenizer(Fast)?|PreTrainedTokenizerFast|TokenizersBackend", kind):
        raise UserError(f"{config_path}: tokenizer_class is {kind}: use a model with BERT's or DistilBERT's tokenizer")
    in_config = "BertTokenizer" in kind
    ids, settings = _read_tokenizer_json(json_path, data) if json_path.exists() else (None, {})
    settings_of_config = _read_tokenizer_config(config_path, config)
    if in_config and (config_path.exists() or json_path.exists()):  # with transformers' default values
        settings = {"lowercase": True} | settings_of_config
    elif ids is None:
        settings = settings_of_config
    else:  # where a null, which is left out, is no reason to look in the other file
        settings = {name: settings_of_config[name] for name in settings_of_config.keys() & {"max_length"}} | settings
    if path.exists():
        vocab = read_vocab(path)
        if ids is not None and _without_blanks(ids) != _without_blanks({token: i for i, token in enumerate(vocab)}):
            raise UserError(f"{path} and tokenizer.json disagree: remove the one that is not the model's")
    elif ids is not None:
        path = json_path
        vocab = sorted(ids, key=ids.get)
        if [ids[token] for token in vocab] != list(range(len(vocab))):
            raise UserError(f"{path}: its ids are not 0, 1, 2, ...: add the model's vocab.txt")
    else:
        raise UserError(f"{folder} holds neither vocab.txt nor tokenizer.json: add the model's vocabulary")
    special = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    added = read_added_tokens(folder, vocab, data, config, in_config, special, "BERT")
    return path, vocab, settings | {"added": [token for token in added if token.content not in special.values()]}


def _without_blanks(ids):
    """token -> id without an empty entry at the end, which a blank line makes."""
    return {token: i for token, i in ids.items() if token or i + 1 < len(ids)}


def _read_tokenizer_json(path, data):
    """(token -> id, settings) of a tokenizer.json, if its tokenizer is BERT's in every way."""
    for section, key, expected in (
        ("model", "type", "WordPiece"),
        ("model", "unk_token", SPECIAL_TOKENS["unk"]),
        ("model", "continuing_subword_prefix", "##"),
        ("model", "max_input_chars_per_word", LONGEST_WORD),
        ("normalizer", "type", "BertNormalizer"),
        ("normalizer", "clean_text", True),
        ("pre_tokenizer", "type", "BertPreTokenizer"),
    ):
        found = data[section].get(key) if isinstance(data.get(section), dict) else None
        if found is None and (section, key) == ("model", "type"):
            continue  # early files omit it
        if found != expected:
            raise UserError(f"{path}: {section}.{key} is {found!r}, in BERT {expected!r}: use a BERT model's tokenizer")
    ids = data["model"].get("vocab")
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise UserError(f"{path} holds no vocabulary of words and ids: fetch it again")
    for token in ids:
        if re.search("[\n\r\ud800-\udfff]|[ \t]$", token):
            raise UserError(f"{path}: a vocab.txt cannot hold the entry {token!r}: use a BERT model's tokenizer")
    names = {"lowercase": "lowercase", "strip_accents": "strip_accents", "handle_chinese_chars": "chinese"}
    return ids, switches(path, data["normalizer"], names)


def _read_tokenizer_config(path, config):
    """The settings of a tokenizer_config.json."""
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "chinese"}
    settings = switches(path, config, names)
    return settings | longest_sequence(path, config)


def added_tokens_json(tokenizer):
    """The special tokens and the added ones as tokenizer.json lists them, in the order of their ids."""
    tokens = [*map(AddedToken, SPECIAL_TOKENS.values()), *tokenizer.added]
    listed = [{"id": tokenizer.ids[token.content], **dataclasses.asdict(token)} for token in tokens]
    return sorted(listed, key=lambda token: token["id"]) if tokenizer.added else listed


def tokenizer_json(tokenizer, strip_accents, causal=False):
    """Returns the tokenizer.json with which the crate `tokenizers` gives the same ids; `causal`: of the text alone."""
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    start, end, end_of_pair = (
        {"SpecialToken": {"id": token, "type_id": segment}} for token, segment in ((cls, 0), (sep, 0), (sep, 1))
    )
    text, second_text = ({"Sequence": {"id": name, "type_id": segment}} for name, segment in (("A", 0), ("B", 1)))
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added_tokens_json(tokenizer),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": tokenizer.chinese,
            "strip_accents": strip_accents, "lowercase": tokenizer.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None if causal else {
            "type": "TemplateProcessing",
            "single": [start, text, end],
            "pair": [start, text, end, second_text, end_of_pair],
            "special_tokens": {t: {"id": t, "ids": [tokenizer.ids[t]], "tokens": [t]} for t in (cls, sep)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": SPECIAL_TOKENS["unk"], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": {token: i for i, token in enumerate(tokenizer.base)},
        },
    }  # fmt: skip
