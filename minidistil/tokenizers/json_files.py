"""Reads a tokenizer's files: text and JSON that nobody vouches for, and the added tokens in it."""

import dataclasses
import json
import re

from minidistil.errors import UserError
from minidistil.tokenizers.added_tokens import AddedToken


def read_text(path):
    """The text of a UTF-8 file, without the mark that some editors put at its beginning."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: name the vocabulary itself, or save it as UTF-8") from None


def read_json(path):
    """The object in a JSON file without its null values; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return {key: item for key, item in value.items() if item is not None}


def switches(path, values, names):
    """Returns {ours: bool} for names {theirs: ours} that `values` has; raises UserError where one is no bool."""
    found = {ours: (theirs, values[theirs]) for theirs, ours in names.items() if values.get(theirs) is not None}
    for theirs, value in found.values():
        if not isinstance(value, bool):
            raise UserError(f"{path}: {theirs} is {value!r}: make it true or false")
    return {ours: value for ours, (_, value) in found.items()}


def longest_sequence(path, config):
    """Returns {"max_length": ...} from a tokenizer_config.json, {} where it does not know."""
    length = config.get("model_max_length", config.get("max_len", 1e30))
    if type(length) not in (int, float) or not length >= 1:
        raise UserError(f"{path}: model_max_length is {length!r}: make it the longest sequence that the model reads")
    return {"max_length": int(length)} if length < 1e9 else {}  # transformers writes 1e30 for "unknown"


def as_list(path, key, values):
    """Returns a list or the values of an object; raises UserError for anything else that `key` may hold."""
    if values and not isinstance(values, (list, dict)):
        raise UserError(f"{path}: {key} is {values!r}, which is no list of tokens: fetch it again")
    return list(values.values()) if isinstance(values, dict) else values or []


def token_id(path, i):
    if type(i) not in (int, str) or not re.fullmatch("[0-9]{1,9}", str(i)):
        raise UserError(f"{path} adds a token with the id {i!r}, which is no number: fetch it again")
    return int(i)


def added_token(path, value):
    """The AddedToken that a JSON file spells as a string or as an object."""
    value = {"content": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{path} adds {value!r}, which is no token: fetch it again")
    flags = switches(path, value, {field.name: field.name for field in dataclasses.fields(AddedToken)[1:]})
    return AddedToken(value["content"], **{"normalized": not flags.get("special", True)} | flags)
