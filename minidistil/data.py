"""Token file -> packed sequences and their labels, in an order that is a pure function of seed and index.

`data/prepare.py` writes train.bin and val.bin as one stream: document [SEP] document [SEP] ... A sequence is
[CLS] + T - 2 consecutive tokens of that stream + [SEP]: always full, so it needs no padding and no attention mask. Of
a causal model it is T consecutive tokens, and the label of each is the next one.

The block and the masks of the g-th sequence of a run are pure functions of (seed, g). Update u uses sequences u * G ...
(u + 1) * G - 1 for any split into micro-batches, and a resumed run needs no saved data state. masking.py chooses the
masks; sentences.py makes the batches of a corpus of sentences.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import weakref

import numpy as np

from kernels import IGNORE  # noqa: F401  the label where there is none, for whoever imports Sequences
from minidistil import files
from minidistil.errors import UserError
from minidistil.masking import MASK_SHARE, Masking
from minidistil.rng import mix, permuted

AGAIN = "prepare the corpus again with data/prepare.py"


def meta_digest(meta):
    """SHA-256 of meta.json's contents without its own digest, which detects any change."""
    rest = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TokenFile:
    """A file of token ids, read a slice at a time: `len(tokens)`, `tokens[start:stop]` (an array).

    It is not memory-mapped: every page that a random block touches would count as memory of this process until the
    system reclaims it, ten gigabytes for a file of that size. Threads may share it.
    """

    def __init__(self, path, dtype):
        self.path, self.dtype = path, np.dtype(dtype)
        self.file = open(path, "rb", buffering=0)
        weakref.finalize(self, self.file.close)
        self.size = path.stat().st_size // self.dtype.itemsize

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.size)
        wanted = max(0, stop - start) * self.dtype.itemsize
        data = os.pread(self.file.fileno(), wanted, start * self.dtype.itemsize)
        if len(data) != wanted:
            raise UserError(f"{self.path} became shorter while it was read: prepare the corpus again")
        return np.frombuffer(data, self.dtype)


class Corpus:
    """A folder that `data/prepare.py` wrote: `train` and `val` TokenFiles, `counts` (V,) int64, `meta`.

    Of a corpus of sentences, `train_ends` and `val_ends` are TokenFiles of the index behind each sentence, and `prefix`
    is the text that stands before each; of any other corpus these are None.
    Opening it checks every byte against the hashes in meta.json (a second per 2 GB): a damaged file raises UserError.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            valid = self.meta["meta_sha256"] == meta_digest(self.meta)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.folder} is no corpus (no meta.json): make one with data/prepare.py") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise UserError(f"{self.folder / 'meta.json'} is damaged: {AGAIN}")
        if self.meta["format"] not in (1, 2):  # 2: of sentences, which older programs would read as running text
            what = f"corpus format {self.meta['format']}, this program reads 1 and 2"
            raise UserError(f"{self.folder} has {what}: {AGAIN}")
        for name, digest in self.meta["sha256"].items():
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name} is missing: {AGAIN}")
            if files.sha256(self.folder / name) != digest:
                raise UserError(f"{self.folder / name} is damaged (its SHA-256 differs from meta.json's): {AGAIN}")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.train, self.val = (TokenFile(self.folder / name, dtype) for name in ("train.bin", "val.bin"))
        self.counts = np.load(self.folder / "counts.npy")
        self.prefix = self.train_ends = self.val_ends = None
        if "sentences" in self.meta:
            self.prefix = self.meta["sentences"]["prefix"]
            self.train_ends, self.val_ends = (self._ends(name) for name in ("train", "val"))

    def _ends(self, split):
        ends, tokens = TokenFile(self.folder / f"{split}.ends.bin", "<i8"), getattr(self, split)
        if ends[len(ends) - 1 :].tolist() != [len(tokens)]:
            raise UserError(f"{ends.path} is damaged (it does not end where {tokens.path.name} does): {AGAIN}")
        return ends

    def check_tokenizer(self, tokenizer, owner):
        """Raises UserError where the corpus was tokenised with another vocabulary than `owner`'s."""
        if self.meta["tokenizer"] != tokenizer.digest:
            way = f"prepare the text with data/prepare.py --vocab {owner}"
            raise UserError(f"{self.folder} was tokenised with another vocabulary than {owner}'s: {way}")


class Sequences:
    """Sequences of T tokens from a stream of ids, and their labels; `batch(first, n)` is a pure function.

    `causal`: the labels are the next tokens, and nothing is masked. `label_share` is the share of tokens with a label,
    `mean_length` that of a sequence in tokens.

    With `shuffle`, each epoch has a new permutation of the blocks and a new offset of their boundaries; without
    (evaluation), sequence g is block g. `smoothing`: 0 masks uniformly, 0.7 is the published preference for rare words.
    """

    def __init__(
        self, tokens, T, tokenizer, seed, counts=None, smoothing=0.0, shuffle=False, mask_share=MASK_SHARE, causal=False
    ):
        self.tokens, self.T, self.tokenizer, self.seed, self.shuffle = tokens, T, tokenizer, seed, shuffle
        self.causal, self.label_share, self.mean_length = causal, 1.0 if causal else mask_share, T
        self.block = T if causal else T - 2  # [CLS] and [SEP] take two places
        spare = causal + (self.block - 1 if shuffle else 0)  # for the last label, and for the epoch's offset
        self.per_epoch = max(0, (len(tokens) - spare) // self.block)
        if causal:
            return
        self.masking = Masking(tokenizer, seed, counts, smoothing)
        self.masked_per_sequence = round(mask_share * T)

    def batch(self, first, n):
        """Returns (ids, labels) of sequences first ... first + n - 1: (n, T) int64, labels -100 where there is none."""
        index = np.arange(first, first + n, dtype=np.uint64)
        if self.shuffle:
            epoch, position = np.divmod(index, np.uint64(self.per_epoch))
            start = np.empty(n, np.int64)
            for e in np.unique(epoch):
                in_epoch = epoch == e
                offset = (mix(self.seed, 1, e)[0] % np.uint64(self.block)).astype(np.int64)
                blocks = permuted(position[in_epoch], self.per_epoch, self.seed, 2, e).astype(np.int64)
                start[in_epoch] = blocks * self.block + offset
        else:
            start = index.astype(np.int64) * self.block
        if self.causal:
            rows = np.stack([self.tokens[s : s + self.T + 1] for s in start]).astype(np.int64)
            return rows[:, :-1].copy(), rows[:, 1:].copy()
        ids = np.empty((n, self.T), np.int64)
        ids[:, 0], ids[:, -1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        for row, s in enumerate(start):
            ids[row, 1:-1] = self.tokens[s : s + self.block]
        return self.masking(ids, index, np.full(n, self.masked_per_sequence))


class Prefetcher:
    """Calls make(u) for consecutive u; for a GPU, a thread makes batch u + 1 while the GPU works on batch u.

    `make` returns numpy arrays, which become tensors, pinned for a GPU so that the copy to it is asynchronous. On a CPU
    the thread would only take time from the model.
    """

    def __init__(self, make, device):
        self.make, self.cuda = make, device.type == "cuda"
        self.pool, self.pending = concurrent.futures.ThreadPoolExecutor(1) if self.cuda else None, {}

    def __call__(self, u):
        if self.pool is None:
            return self._tensors(u)
        current = self.pending.pop(u, None) or self.pool.submit(self._tensors, u)
        self.pending = {u + 1: self.pool.submit(self._tensors, u + 1)}
        return current.result()

    def _tensors(self, u):
        import torch  # preparing a corpus does not need it

        tensors = [torch.from_numpy(array) for array in self.make(u)]
        return [tensor.pin_memory() for tensor in tensors] if self.cuda else tensors
