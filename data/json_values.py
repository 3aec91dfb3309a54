"""The values of a JSON file, one after the other, in memory for one of them."""

import codecs
import json
import re

from data.documents import RECORD_BYTES
from data.stored import refuse
from minidistil.errors import UserError

_GAP = re.compile(r"[ \t\r\n\0]*")  # NUL: at the end of a file that was cut off
_BLOCK = 1 << 16


def values(file):
    """Yields the values in a JSON array, or those that follow one another; raises UserError for anything else."""
    text = _Window(file)
    array = text.next() == "["
    text.place += array
    number = 0
    while (mark := text.next()) and not (array and mark == "]"):
        number += 1
        if array and number > 1:
            if mark != ",":
                raise _fault(file, number)
            text.place += 1
            text.next()
        yield text.value(number)
    text.place += array
    if array and (mark != "]" or text.next()):
        raise _fault(file, number)


class _Window:
    """The part of a file that is being read: `text` from `place`."""

    def __init__(self, file):
        self.text, self.place = "", 0
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode

    def next(self):
        """Moves to the next character that is not white space and returns it; "" at the end."""
        while True:
            self.place = _GAP.match(self.text, self.place).end()
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def value(self, number):
        """Moves behind a value and returns it."""
        while True:
            try:
                value, self.place = self._scan(self.text, self.place)
                return value
            except (ValueError, RecursionError):  # perhaps because the rest of it has not been read
                if len(self.text) - self.place > RECORD_BYTES:
                    raise _fault(self._file, number, f", or has more than {RECORD_BYTES:,} characters") from None
                if not self._more():
                    raise _fault(self._file, number) from None

    def _more(self):
        """Reads on, as much as is waiting already; returns whether there was more."""
        block = self._file.stream.read(max(_BLOCK, len(self.text) - self.place))
        try:
            self.text = self.text[self.place :] + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            refuse(self._file.where)
        self.place = 0
        return bool(block)


def _fault(file, number, more=""):
    return UserError(f"{file.path}, record {number:,} is not JSON{more}: repair it or leave the file out")
