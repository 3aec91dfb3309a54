"""Characters for the tests of tokenizers: CODE_POINTS."""

import sys

# without surrogates; of planes 4 to 13, in which no version of Unicode assigns anything, and of the private planes 15
# and 16 one in 61
CODE_POINTS = [
    chr(code)
    for code in range(sys.maxunicode + 1)
    if not 0xD800 <= code < 0xE000 and (code >> 16 in (0, 1, 2, 3, 14) or code % 61 == 0)
]
