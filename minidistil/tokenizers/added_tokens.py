"""Added tokens: what is found in a text before it is split into pieces."""

import dataclasses
import re
import unicodedata

# joiners and letters in circles, which belong to words in the crate `tokenizers`
_OTHER_WORD = re.compile("[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before the rest is split; the flags are those of the crate `tokenizers`."""

    content: str
    single_word: bool = False
    lstrip: bool = False  # this and the next: take white space along, which makes no tokens here
    rstrip: bool = False
    normalized: bool = False  # matched in normalised text
    special: bool = True


class Matcher:
    """Finds tokens in a text, the longest of the leftmost; of equal ones the first counts."""

    def __init__(self, tokens):
        self.tokens = {}  # content -> (id, single_word)
        for content, i, single_word in tokens:
            self.tokens.setdefault(content, (i, single_word))
        longest_first = sorted(filter(None, self.tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text):
        """Yields (id, start, end) of all parts of the text; the id is None between the tokens."""
        last = 0
        for match in self._pattern.finditer(text):
            i, single_word = self.tokens[match[0]]
            start, end = match.span()
            if single_word and (_in_word(text[start - 1 : start]) or _in_word(text[end : end + 1])):
                continue
            if start > last:
                yield None, last, start
            yield i, start, end
            last = end
        if last < len(text):
            yield None, last, len(text)


def _in_word(c):
    r"""Returns whether the crate's `\w` matches this character; "" is none."""
    category = unicodedata.category(c) if c else ""
    return category[:1] in ("L", "M") or category in ("Nd", "Nl", "Pc") or bool(_OTHER_WORD.match(c))
