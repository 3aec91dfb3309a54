"""Refuses settings that cannot work, or that do not fit the models or the text, before a run has a folder."""

import dataclasses
import math

from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.folder import check_name
from minidistil.tokenizers.wordpiece import WordPiece

# settings of train.py or finetune.py that say how a teacher is learnt from
OF_MASKS = "mask_share", "mask_smoothing", "kd_rows"  # settings of train.py for masked tokens
OF_TEACHER = (
    "temperature", "alpha_ce", "alpha_cos", "alpha_mse", "alpha_emb", "alpha_task", "augment", "unlabelled", "kd_rows",
    "student_width",
)  # fmt: skip


def check_settings(settings):
    """Raises UserError for settings of train.py that cannot work, before anything is read."""
    check_name(settings, "teacher", "student_init")
    positive = "steps epochs batch accum lr clip temperature time_limit eval_tokens watts"
    for name in positive.split():
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    not_negative = (
        "alpha_ce alpha_mlm alpha_cos alpha_mse alpha_emb mask_smoothing eval_every save_every price_per_hour "
        "grams_per_kwh"
    )
    for name in not_negative.split():
        value = getattr(settings, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")
    if not 0 <= settings.warmup <= 1:
        raise UserError(f"--warmup is {settings.warmup}: it is a share of the updates, between 0 and 1")
    if settings.dropout is not None and not 0 <= settings.dropout < 1:
        raise UserError(f"--dropout is {settings.dropout}: it is a probability, 0 or more and below 1")
    share = settings.mask_share
    if not (0 < share < 1 and 1 <= round(share * settings.seq_len) < settings.seq_len):
        raise UserError(f"--mask-share is {share}: a sequence of {settings.seq_len} needs one masked token or more")
    if settings.micro_batch not in (None, "auto"):
        size = int(settings.micro_batch) if settings.micro_batch.isdecimal() else 0
        if size < 1 or settings.batch * settings.accum % size:
            raise UserError(
                f"--micro-batch {settings.micro_batch}: give auto, or a number that divides batch * accum = "
                f"{settings.batch * settings.accum}"
            )
    check_seeds(settings.seed)
    if settings.seq_len < 8:
        raise UserError(f"--seq-len is {settings.seq_len}: a sequence needs at least 8 tokens")
    if settings.student_config and settings.student_init not in (None, "random"):
        raise UserError("--student-config describes a fresh student: leave out --student-init")
    if settings.student_config and settings.student_layers:
        raise UserError("--student-config already says how many layers: leave out --student-layers")
    if settings.student_width is not None and settings.student_config:
        raise UserError("--student-config already says how wide: leave out --student-width")
    if settings.student_width is not None and settings.student_init not in (None, "teacher", "random"):
        raise UserError(f"--student-init {settings.student_init} already has its width: leave out --student-width")
    if settings.resume and settings.out is None:
        raise UserError("--resume needs to know which run: name its folder with --out")
    if settings.teacher == "none":
        if settings.student_init == "teacher":
            raise UserError("--student-init teacher needs a teacher: name one with --teacher")
        if settings.student_layers:
            raise UserError("--student-layers chooses among a teacher's layers: name one with --teacher")
    of_teacher = settings.teacher != "none" and (
        settings.alpha_ce or settings.alpha_cos or settings.alpha_mse or settings.alpha_emb
    )
    if not (settings.alpha_mlm or of_teacher):
        raise UserError("every weight of the objective is 0: give at least one --alpha- setting a positive value")


def check_needs_teacher(has_teacher, given):
    """Raises UserError where one of OF_TEACHER is among the settings `given` without a teacher."""
    for name in OF_TEACHER:
        if name in given and not has_teacher:
            raise UserError(f"--{name.replace('_', '-')} is for a teacher: name one with --teacher, or leave it out")


def check_seeds(first, n=1):
    """Raises UserError unless `first` and the n - 1 seeds after it are different to every generator: below 2^63."""
    if not 0 <= first <= 2**63 - n:
        raise UserError(f"--seed is {first}: it must be a whole number from 0 to {2**63 - n}")


def check_vocabulary(role, config, tokenizer, say=print):
    """Raises UserError where a vocabulary does not fit a model; says how many rows of the model's table are spare.

    It has more words than the table has rows, no [MASK] for a model of masked tokens, RoBERTa's or XLM-R's tokens
    around a text for one of next tokens, or another padding token than a RoBERTa, in which transformers counts
    positions by it. Published tables are often padded to a round number; a vocabulary that was cut short looks the
    same.
    """
    spare = config.vocab_size - len(tokenizer.vocab)
    if spare < 0:
        raise UserError(
            f"the {role} has {config.vocab_size} words, its vocabulary {len(tokenizer.vocab)}: "
            "give it the vocabulary that it was trained with, or as many words in the config.json of a new model"
        )
    if not config.causal and "mask" not in tokenizer.special:
        raise UserError(
            f"the {role} is a {config.family}, which fills in masked tokens, and its vocabulary has no token for them, "
            "as a GPT-2's: give it a vocabulary that has one, or use a gpt2"
        )
    if config.causal and "mask" in tokenizer.special and not isinstance(tokenizer, WordPiece):
        raise UserError(
            f"the {role} is a {config.family}, which continues texts, and its vocabulary is one for masked tokens: "
            "take a GPT-2's, or make one: python data/vocab.py TEXT --byte-level gpt2"
        )
    if FAMILIES[config.family].first_position and config.pad_id != tokenizer.pad_id:
        raise UserError(
            f"the {role}'s config.json says pad_token_id {config.pad_id}, but {tokenizer.special['pad']} is "
            f"{tokenizer.pad_id} in its vocabulary, and a {config.family} counts positions by it: take both from the "
            "same model"
        )
    if spare:
        say(f"the {role} has {config.vocab_size} rows for {len(tokenizer.vocab)} words: the last {spare} stay unused")


def score_words(role, model, tokenizer, say=print):
    """Runs `check_vocabulary` for a LanguageModel, and makes it score and learn real words only from here on."""
    check_vocabulary(role, model.config, tokenizer, say)
    model.words = len(tokenizer.vocab)


def check_predicts(teacher, student):
    """Raises UserError where models with these configs, the teacher's perhaps None, predict different tokens."""
    if teacher and teacher.causal != student.causal:
        families = f"the teacher is a {teacher.family} and the student a {student.family}"
        raise UserError(f"{families}: one predicts masked tokens, the other the next ones: use one family")


def check_family(teacher, student, settings):
    """Raises UserError where teacher and student predict different tokens, or `settings` are for masked ones only."""
    check_predicts(teacher and teacher.config, student.config)
    for field in dataclasses.fields(settings) if student.config.causal else ():
        if field.name in OF_MASKS and getattr(settings, field.name) != field.default:
            what = f"--{field.name.replace('_', '-')} is for masked tokens, and a {student.config.family} has none"
            raise UserError(f"{what}: leave it out")


def check_fit(objective, teacher, student, corpus, eval_corpus, sequences, G):
    """Raises UserError for combinations that would fail or mislead later. G: sequences in an update."""
    T = sequences.T
    shapes = [("student" if teacher else "model", student.config)] + ([("teacher", teacher.config)] if teacher else [])
    for role, config in shapes:
        if config.positions < T:
            raise UserError(f"the {role} has {config.positions} positions: use --seq-len {config.positions} or less")
    if sequences.per_epoch < G:
        raise UserError(
            f"{corpus.folder} holds {len(corpus.train)} tokens, {sequences.per_epoch} sequences of {T}, "
            f"fewer than one update of {G}: use more text, or a smaller --batch, --accum or --seq-len"
        )
    if corpus.prefix is None and len(eval_corpus.val) < sequences.block + sequences.causal:
        raise UserError(
            f"{eval_corpus.folder} holds out {len(eval_corpus.val)} tokens, not one sequence of {T}: "
            "use more text, a larger --val-share in data/prepare.py, or a smaller --seq-len"
        )


def check_sentences(objective, student, corpus, eval_corpus, pooling, compiles):
    """Raises UserError where sentence vectors cannot be learnt, or a corpus of sentences does not suit the run."""
    if objective.alpha_emb and student.config.causal:
        raise UserError(f"--alpha-emb is for sentence encoders, and a {student.config.family} is none: leave it out")
    for each in (corpus, eval_corpus):
        if objective.alpha_emb and each.prefix is None:
            way = "prepare one with data/prepare.py --sentences, and name it with --data"
            raise UserError(f"--alpha-emb needs a corpus of sentences, and {each.folder} is none: {way}")
        if pooling and pooling.prompt and pooling.prompt != each.prefix:
            what = f"the teacher reads {pooling.prompt!r} before each sentence, and {each.folder} has {each.prefix!r}"
            raise UserError(f"{what}: prepare the text with --prefix {pooling.prompt!r}")
        if (each.prefix is None) != (corpus.prefix is None):
            raise UserError(f"of {corpus.folder} and {each.folder} only one is of sentences: evaluate on the same kind")
    if compiles and corpus.prefix is not None:
        raise UserError("--compile is for sequences of one length, and sentences have many: leave it out")
