"""Tables that remember what they computed: most characters and most chunks of a text occurred before."""

CACHE_ENTRIES = 2**19  # 90 MB when full of words; IMDb, 33 million characters, has 281 thousand different chunks
CACHED_LENGTH = 32  # characters; longer chunks hardly repeat, and the cache must stay small on any text


class Table(dict):
    """A `str.translate` table that calls `replace(character)` once per distinct character."""

    def __init__(self, replace):
        self.replace = replace

    def __missing__(self, code):
        self[code] = replacement = self.replace(chr(code))
        return replacement


class Cache(dict):
    """chunk -> compute(chunk), with bounded size: when the younger half is full, it replaces the older half."""

    def __init__(self, compute, entries):
        self.compute, self.half, self.older = compute, entries // 2, {}

    def __missing__(self, chunk):
        if (value := self.older.get(chunk)) is None:
            value = self.compute(chunk)
        if len(chunk) <= CACHED_LENGTH:
            if len(self) >= self.half:
                self.older = dict(self)
                self.clear()
            self[chunk] = value
        return value
