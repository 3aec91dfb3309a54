"""Documents -> sentences, for text without labels: a wrong boundary costs little, so a few rules are enough.

A sentence ends at a line break (a newline, or HTML's <br>), and after a mark such as . ! ? with its closing quotes and
brackets, where white space follows and then no lower-case letter and no other mark. Full-width marks need no white
space. A dot after an initial, a dotted abbreviation (U.S.), a title (Dr.) or the number of a list's entry ends nothing.
Text that is wrapped at a width becomes a sentence a line; so does that of a language without such marks.
"""

import re

_LINE = re.compile(r"[\n\r\u2028\u2029]|<br\s*/?>", re.IGNORECASE)
_WIDE = "\u3002\uff01\uff1f\uff61"  # the full-width . ! ?
# . ! ? and the ellipsis; the marks of Arabic, Urdu, Hindi (two), Armenian, Ethiopic and Khmer
_MARKS = rf".!?\u2026\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4{_WIDE}"
_CLOSING = r"""'")\]}\u2018-\u201f\u00ab\u00bb\u2039\u203a\u3009\u300b\u300d\u300f\u3011\uff09"""
_END = re.compile(  # a run of marks is tried from its beginning only, or one of a million dots would take hours
    rf"[{_MARKS}](?<![{_MARKS}]{{2}})[{_MARKS}]*"
    rf"(?:[{_CLOSING}]*\s+(?=[^\w\s,;:)\]}}{_MARKS}]*([^\W_]))|(?<=[{_WIDE}])(?=[\w\u300c\u300e\u201c]))"
)
_TITLES = "mr|mrs|ms|dr|prof|st|gen|col|lt|sgt|capt|rev|hon|gov|sen|rep|vs|cf|fig|vol|pp"
_WHOLE = re.compile(  # what comes before a single dot that ends nothing, the dot, and what follows
    rf"(?:(?<!\w)(?<!\w['\u2019])(?:(?:[^\W\d_]\.)*[^\W\d_]|{_TITLES})|^\s*\d+)\.[^.]?$", re.IGNORECASE
)
_BEFORE = 16  # characters that _WHOLE looks at: more than such an abbreviation has


def sentences(document):
    """Yields the sentences of a text, stripped, none of them blank."""
    for line in _LINE.split(document):
        start = 0
        for end in _END.finditer(line):
            mark, following = end.start(), end[1] or ""
            if following.islower() or _WHOLE.search(line[max(start, mark - _BEFORE) : mark + 2]):
                continue
            yield line[start : end.end()].strip()
            start = end.end()
        if rest := line[start:].strip():
            yield rest
