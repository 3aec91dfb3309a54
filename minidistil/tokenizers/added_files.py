"""The added tokens of a model's folder: they may stand in any of four files."""

from minidistil.errors import UserError
from minidistil.tokenizers.json_files import added_token, as_list, read_json, token_id


def read_added_tokens(folder, vocab, data, config, in_config, special, model):
    """The AddedTokens of all files of a folder, in the order in which transformers adds them to `vocab`.

    data, config: the contents of tokenizer.json and tokenizer_config.json. Where the latter lists the tokens
    (added_tokens_decoder), other lists do not count, but that of tokenizer.json does for a tokenizer that is read from
    it (not in_config). special: {"pad_token": "[PAD]" ...}, those that the files may name for these purposes, as in
    `model`. They are in the result only where a file gives them an id. A blank line at the end of `vocab` goes where a
    file has given its id to a token. Raises UserError where a token would have another id than its file says.
    """
    path, json_path, legacy = (folder / n for n in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json"))
    in_json = as_list(json_path, "added_tokens", data.get("added_tokens"))
    in_json = [(json_path, token.get("id") if isinstance(token, dict) else None, token) for token in in_json]
    if (config_lists := config.get("added_tokens_decoder")) is not None:
        named = _named_tokens(path, config, {}, special, model)
        if not isinstance(config_lists, dict):
            raise UserError(f"{path}: added_tokens_decoder is {config_lists!r}, no object of tokens: fetch it again")
        numbered = [(path, i, token) for i, token in config_lists.items()]
        numbered = numbered if in_config else in_json + numbered
    else:
        special_map = read_json(folder / "special_tokens_map.json")
        named = _named_tokens(path, config, special_map, special, model)
        special_map.pop("additional_special_tokens", None)  # do not make those of added_tokens.json special
        contents = {token.content for token in _named_tokens(path, config, special_map, special, model)}
        numbered = [
            (legacy, i, {"content": content, "special": content in contents})
            for content, i in read_json(legacy).items()
        ]
        numbered += in_json
    added, known = {}, set(vocab)
    for i, (path, value) in sorted({token_id(path, i): (path, token) for path, i, token in numbered}.items()):
        token = added_token(path, value)
        if token.content not in known and token.content not in added:
            if i < len(vocab) and not any(vocab[i:]):
                del vocab[i:]
            following = len(vocab) + sum(content not in known for content in added)
            if i != following:
                what = f"{path} gives {token.content!r} the id {i}, where the next free one is {following}"
                raise UserError(f"{what}: use the vocabulary that belongs to it")
        added[token.content] = token
    for token in named:
        if token.content not in special.values():
            added.setdefault(token.content, token)
    ours = set(special.values())
    if config.get("split_special_tokens") and any(t.special and t.content not in ours for t in added.values()):
        raise UserError(f"{folder / 'tokenizer_config.json'}: split_special_tokens is true: make it false")
    return [token for content, token in added.items() if content]


def _named_tokens(path, config, special_map, special, model):
    """The AddedTokens that the configuration names by their purpose; those in `special` must be the model's."""
    named = []
    for key, value in (config | special_map).items():
        if key.endswith("_token") and isinstance(value, (str, dict)):
            token = added_token(path, value)
            wanted = special.get(key, token.content)
            if token.content != wanted:
                what = f"{path}: {key} is {token.content!r}, in {model} {wanted!r}"
                raise UserError(f"{what}: use a {model} model's tokenizer")
            named.append(token)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for values in (extra or special_map.get("additional_special_tokens"), special_map.get("extra_special_tokens")):
        named += [added_token(path, value) for value in as_list(path, "extra_special_tokens", values)]
    return named
