"""What every tokenizer offers."""

import array

import numpy as np


class BaseTokenizer:
    """A vocabulary and its way to split text: the base class.

    vocab: tokens in the order of their ids. special: name -> token, of sep (which ends a document) and, where the
    vocabulary has them, cls, pad, unk and mask; their ids are `sep_id` and so on. added: AddedTokens. max_length: the
    longest sequence of the model. pair_separators: how many sep stand between two texts; second_type: the token type of
    the second one.
    """

    pair_separators, second_type = 1, 1
    hub_ids = {}  # keys of config.json that transformers needs to generate text

    def set_special(self, special):
        """Sets `special` and the ids of its tokens."""
        self.special = dict(special)
        for name, token in special.items():
            setattr(self, f"{name}_id", self.ids[token])

    @property
    def special_ids(self):
        return [self.ids[token] for token in self.special.values()]

    def shown(self, i):
        """Returns how a table shows a token."""
        return self.vocab[i]

    def encode(self, text):
        """Returns the ids (a list) of plain text: "[SEP]" is three tokens, an added token such as "<url>" is one."""
        return memoryview(self._encode(text)).cast("I").tolist()

    def encode_documents(self, texts):
        """Returns the ids of all texts in one uint32 array, with `sep` after each text that has ids."""
        end = array.array("I", [self.sep_id]).tobytes()
        return np.frombuffer(b"".join(ids + end for ids in map(self._encode, texts) if ids), np.uint32)

    def _encode(self, text):
        """The ids of plain text as the bytes of uint32."""
        if self.added:
            return b"".join(self._encode_parts(text, self._raw))
        return self._encode_plain(text)

    def _encode_parts(self, text, matcher):
        """Yields the ids of a text in which `matcher` finds tokens, part by part, as the bytes of uint32."""
        for token, start, end in matcher.split(text):
            yield self._encode_plain(text[start:end]) if token is None else array.array("I", [token]).tobytes()
