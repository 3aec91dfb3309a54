"""Checks of the settings of finetune.py."""

import math

from minidistil.checks import check_seeds
from minidistil.downstream import table
from minidistil.errors import UserError
from minidistil.folder import check_name


def check_settings(settings):
    """Raises UserError for values that cannot work, before anything is read or written."""
    check_name(settings, "model", "words", "teacher")
    for name in ("epochs", "batch", "seq_len", "examples", "seeds", "clip", "temperature", "watts"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    for name in ("alpha_task", "alpha_ce", "alpha_mse", "augment", "unlabelled", "save_every", "grams_per_kwh"):
        value = getattr(settings, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")
    if not 0 <= settings.warmup <= 1:
        raise UserError(f"--warmup is {settings.warmup}: it is a share of the updates, between 0 and 1")
    if settings.seq_len is not None and settings.seq_len < 8:
        raise UserError(f"--seq-len is {settings.seq_len}: an example needs at least 8 tokens")
    if settings.unlabelled and settings.examples is None:
        raise UserError("--unlabelled counts training texts that --examples leaves out: give --examples too")
    check_seeds(settings.seed, settings.seeds)
    if settings.teacher and not settings.alpha_task + settings.alpha_ce + settings.alpha_mse:
        raise UserError("every weight of the objective is 0: give at least one --alpha- setting a positive value")
    if settings.words and settings.model != "bilstm":
        raise UserError("--words is for --model bilstm: leave it out")
    if settings.vectors and (settings.model == "bilstm" or "squad" in str(settings.task).split(",")):
        raise UserError("--vectors classifies sentence vectors, which neither a bilstm nor squad has: leave it out")
    if settings.resume and settings.out is None:
        raise UserError("--resume needs to know which run: name its folder with --out")
    if None in (settings.task, settings.model):
        raise UserError(f"{settings.out} holds no settings to resume with: repeat --task, --model and --data")
    own = table.is_table(settings.task)
    for name in ("data",) if own else ("columns", "dev", "held_out"):
        if getattr(settings, name) is not None:
            way = "the held-out examples of a file are in --dev" if own else "it is for a --task FILE of your own"
            raise UserError(f"--{name.replace('_', '-')} does not apply to --task {settings.task}: {way}")
    if settings.held_out is not None and (settings.dev or not 0 < settings.held_out < 1):
        raise UserError(f"--held-out is {settings.held_out}: it is a share between 0 and 1, where there is no --dev")
