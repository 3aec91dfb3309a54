"""The ways to make a student that are compared: a name and settings of train.py."""

UNTRAINED = "layers alone, untrained"
PEER = "sentence-transformers"
# "masked words" is as published (Sanh et al. 2019). It needs many words in an update; vectors learn more from many
# small updates of short sentences (LOG.md).
WORDS, VECTORS = "--batch 64 --seq-len 128 --lr 5e-4", "--batch 16 --seq-len 20 --lr 3.5e-4"
ALONE = "--alpha-emb 1 --alpha-cos 0 --alpha-ce 0 --alpha-mlm 0"
SHARED = "--accum 1 --dropout 0 --eval-tokens 8192"
RECIPES = {
    "undistilled": f"{WORDS} --alpha-emb 0 --alpha-cos 0 --alpha-ce 0 --alpha-mlm 1",
    "masked words": f"{WORDS} --alpha-emb 0 --alpha-cos 1 --alpha-ce 5 --alpha-mlm 2",
    "masked words (30 %)": f"{WORDS} --alpha-emb 0 --alpha-cos 1 --alpha-ce 5 --alpha-mlm 2 --mask-share 0.3",
    "vectors": f"{VECTORS} {ALONE}",
    "vectors from a random start": f"{VECTORS} {ALONE} --student-init random",
    "vectors + cosine": f"{VECTORS} --alpha-emb 1 --alpha-cos 1 --alpha-ce 0 --alpha-mlm 0",
    "vectors + cosine + masked words": f"{VECTORS} --alpha-emb 1 --alpha-cos 1 --alpha-ce 0.5 --alpha-mlm 0.2",
    PEER: "benches/retention/peer.py",  # a script, with the settings of the library's own example
}
NO_HEAD = "--alpha-ce 0"  # of a teacher without a masked-LM head, which gives no word a probability


def flags(recipe, with_head):
    """Returns a recipe's settings of train.py as text, without the KL where the teacher has no head for it."""
    if recipe == PEER:
        return RECIPES[PEER]
    return " ".join([SHARED, RECIPES[recipe], *([] if with_head else [NO_HEAD])])  # the last of equal flags counts
