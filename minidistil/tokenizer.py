"""Text <-> token ids: what every tokenizer offers, and the one place that finds out which kind a model has.

    WordPiece   BERT, DistilBERT                        tokenizers/wordpiece.py
    ByteBPE     GPT-2, RoBERTa                          tokenizers/byte_bpe.py
    Unigram     XLM-R, and others of sentencepiece      tokenizers/unigram.py

The kind does not follow from the model's family: an encoder of BERT's shape may have XLM-R's vocabulary.
"""

import array
import pathlib

import numpy as np

from minidistil.errors import UserError
from minidistil.tokenizers.json_files import read_json


class Tokenizer:
    """A vocabulary and its way to split text; `load` returns the kind that a folder holds.

    vocab: tokens in the order of their ids. special: name -> token, of sep (which ends a document) and, where the
    vocabulary has them, cls, pad, unk and mask; their ids are `sep_id` and so on. added: AddedTokens. max_length: the
    longest sequence of the model. pair_separators: how many sep stand between two texts; second_type: the token type of
    the second one.
    """

    pair_separators, second_type = 1, 1

    @staticmethod
    def load(path):
        """Reads the tokenizer of a model's folder, or of one of its files; raises UserError for what is not one."""
        path = pathlib.Path(path)
        if not path.exists():
            raise UserError(f"there is no {path}: name a vocab.txt or a folder that holds one")
        return _kind(path).load(path)

    def set_special(self, special):
        """Sets `special` and the ids of its tokens."""
        self.special = dict(special)
        for name, token in special.items():
            setattr(self, f"{name}_id", self.ids[token])

    @property
    def special_ids(self):
        return [self.ids[token] for token in self.special.values()]

    def encode(self, text):
        """Returns the ids (a list) of plain text: "[SEP]" is three tokens, an added token such as "<url>" is one."""
        return memoryview(self._encode(text)).cast("I").tolist()

    def encode_documents(self, texts):
        """Returns the ids of all texts in one uint32 array, with `sep` after each text that has ids."""
        end = array.array("I", [self.sep_id]).tobytes()
        return np.frombuffer(b"".join(ids + end for ids in map(self._encode, texts) if ids), np.uint32)


def _kind(path):
    """Returns the class of the tokenizer in an existing file or folder."""
    from minidistil.tokenizers import unigram_files
    from minidistil.tokenizers.unigram import Unigram
    from minidistil.tokenizers.wordpiece import WordPiece

    folder, names = (path, None) if path.is_dir() else (path.parent, [path.name])

    def has(*wanted):
        return any(name in names if names else (folder / name).is_file() for name in wanted)

    if has("vocab.txt"):
        return WordPiece
    if has(*unigram_files.MODELS) or path.suffix == ".model":
        return Unigram
    model = read_json(folder / "tokenizer.json").get("model") if has("tokenizer.json") else {}
    model = model if isinstance(model, dict) else {}
    if model.get("type") == "Unigram" or ("type" not in model and isinstance(model.get("vocab"), list)):
        return Unigram
    return WordPiece  # which says what it lacks
