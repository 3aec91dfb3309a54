"""Byte-pair encoding (Sennrich et al. 2016) as sentencepiece learns it from the counts of words."""

import pathlib
import tempfile

import sentencepiece

RESERVED = "\u2585"  # stands for unknown text in sentencepiece's own, which leaves out words with it


def byte_pairs(words, size, **options):
    """Returns up to `size` pieces in the order of their merges; `options` are more of sentencepiece's."""
    words = {word: n for word, n in words.items() if RESERVED not in word}
    if not words:
        return []
    with tempfile.TemporaryDirectory() as folder:
        table, model = pathlib.Path(folder, "words.tsv"), pathlib.Path(folder, "model")
        table.write_text("".join(f"{word}\t{n}\n" for word, n in words.items()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(table),
            input_format="tsv",
            model_prefix=str(model),
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the words are already normalised and split
            split_by_unicode_script=False,
            split_by_number=False,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    return [processor.id_to_piece(i) for i in range(len(processor)) if not processor.is_unknown(i)]
