"""Learns the vocabulary and merges of byte-level BPE, GPT-2's or RoBERTa's kind, from the counts of words.

GPT-2      256 bytes, a token a merge, <|endoftext|>
RoBERTa    <s> <pad> </s> <unk>, 256 bytes, a token a merge, <mask>: its models need <pad> to have the id 1
"""

from data.byte_pairs import byte_pairs
from minidistil.errors import UserError
from minidistil.tokenizers.byte_bpe import ByteBPE
from minidistil.tokenizers.byte_bpe_files import BYTES, END_OF_TEXT, ROBERTA, spell

LONGEST_WORD = 100  # bytes; longer words are left out of the counts
# kind -> the special tokens before the bytes and those after the merges
KINDS = {"gpt2": ([], [END_OF_TEXT]), "roberta": ([*ROBERTA.values()][:4], [ROBERTA["mask"]])}


def of_merges(kind, merges):
    """Returns the ByteBPE of this kind with these merges."""
    before, after = KINDS[kind]
    return ByteBPE([*before, *BYTES, *(left + right for left, right in merges), *after], merges)


def learn(counts, size, kind):
    """Returns a ByteBPE of `size` entries for words with these counts; kind: "gpt2" or "roberta".

    A piece is the merge of the two parts that the earlier merges leave of it; the few pieces of which they leave more
    are skipped. Raises UserError where the text or `size` is too small.
    """
    smallest = len(of_merges(kind, []).vocab)
    if size < smallest:
        raise UserError(f"--size {size} is too small: the bytes and the special tokens alone take {smallest}")
    words = {spell(word): n for word, n in sorted(counts.items())}
    words = {word: n for word, n in words.items() if len(word) <= LONGEST_WORD}
    wanted = size - smallest
    merges = {}  # (left, right) -> rank
    options = {"add_dummy_prefix": False, "max_sentencepiece_length": LONGEST_WORD}
    for piece in byte_pairs(words, size + 256, **options) if words and wanted else ():
        if len(parts := _parts(piece, merges)) == 2:
            merges[tuple(parts)] = len(merges)
    if len(merges) < wanted:
        found = smallest + len(merges)
        raise UserError(f"the text yields {found} entries, not {size}: lower --size or give more text")
    return of_merges(kind, [*merges][:wanted])


def _parts(piece, merges):
    """Returns what merges leave of a piece that is spelled in bytes."""
    parts = list(piece)
    while True:
        ranks = [merges.get(pair, len(merges)) for pair in zip(parts, parts[1:], strict=False)]
        if not ranks or min(ranks) == len(merges):
            return parts
        i = ranks.index(min(ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
