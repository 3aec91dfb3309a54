"""The one place that finds out which kind of tokenizer a model has.

    WordPiece   BERT, DistilBERT                        tokenizers/wordpiece.py
    ByteBPE     GPT-2, RoBERTa                          tokenizers/byte_bpe.py
    Unigram     XLM-R, and others of sentencepiece      tokenizers/unigram.py

The kind does not follow from the model's family: an encoder of BERT's shape may have XLM-R's vocabulary.
"""

import pathlib

from minidistil.errors import UserError
from minidistil.tokenizers import unigram_files
from minidistil.tokenizers.base import BaseTokenizer
from minidistil.tokenizers.byte_bpe import ByteBPE
from minidistil.tokenizers.json_files import read_json
from minidistil.tokenizers.unigram import Unigram
from minidistil.tokenizers.wordpiece import WordPiece


class Tokenizer(BaseTokenizer):
    """Any tokenizer: `load` returns one of the right kind."""

    @staticmethod
    def load(path):
        """Reads the tokenizer of a model's folder, or of one of its files; raises UserError for what is not one."""
        path = pathlib.Path(path)
        if not path.exists():
            raise UserError(f"there is no {path}: name the folder of a model or tokenizer, or a vocab.txt")
        return _kind(path).load(path)


def _kind(path):
    """Returns the class of the tokenizer in an existing file or folder."""
    folder, names = (path, None) if path.is_dir() else (path.parent, [path.name])

    def has(*wanted):
        return any(name in names if names else (folder / name).is_file() for name in wanted)

    if has("vocab.txt"):
        return WordPiece
    if has("vocab.json", "merges.txt"):
        return ByteBPE
    if has(*unigram_files.MODELS) or path.suffix == ".model":
        return Unigram
    if path.is_dir() and not has("tokenizer.json"):
        files = f"vocab.txt, vocab.json and merges.txt, {', '.join(unigram_files.MODELS)}, nor tokenizer.json"
        raise UserError(f"{path} holds no vocabulary, neither {files}: add the model's")
    model = read_json(folder / "tokenizer.json").get("model") if has("tokenizer.json") else {}
    model = model if isinstance(model, dict) else {}
    kind = model.get("type")
    if kind == "BPE" or (kind is None and "merges" in model):
        return ByteBPE
    if kind == "Unigram" or (kind is None and isinstance(model.get("vocab"), list)):
        return Unigram
    return WordPiece  # which says what it lacks
