"""How a student begins: from its teacher's layers, from a folder, or from random weights."""

import pathlib

from minidistil import weights
from minidistil.errors import UserError
from minidistil.model import MaskedLM


def chosen_layers(text, teacher_layers):
    """`6` -> six layers spread over the teacher's; `0,2,4` -> these; None -> half of them."""
    try:
        numbers = [int(n) for n in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--student-layers {text} is neither a number nor a list such as 0,2,4,7,9,11") from None
    if len(numbers) > 1 or (text and "," in text):
        return numbers
    k = numbers[0] if numbers else None
    if k is not None and not 1 <= k <= teacher_layers:
        raise UserError(f"--student-layers {k}: the teacher has {teacher_layers} layers: choose 1 to {teacher_layers}")
    return weights.student_layers(teacher_layers, k)


def build_student(settings, teacher, init):
    """Makes the student in fp32 on the CPU, as the settings of train.py say.

    `teacher` is a MaskedLM or None, `init` the folder that --student-init names, or None. Raises UserError where the
    settings contradict each other or the teacher.
    """
    source = settings.student_init or ("teacher" if teacher and not settings.student_config else "random")
    if init:
        if settings.student_layers:
            raise UserError(f"--student-init {source} already has its layers: leave out --student-layers")
        student = weights.load_model(init, fresh_head=True)
    elif source == "teacher":
        student = weights.student_from_teacher(teacher, chosen_layers(settings.student_layers, teacher.config.layers))
    else:
        if settings.student_config:
            path = pathlib.Path(settings.student_config)
            config, _ = weights.read_config(path.parent if path.name == "config.json" else path)
        elif teacher:
            config = teacher.config.student(len(chosen_layers(settings.student_layers, teacher.config.layers)))
        else:
            raise UserError("a student without a teacher needs a shape: add --student-config or --student-init")
        student = MaskedLM(config, seed=settings.seed)
    if settings.dropout is not None:
        set_dropout(student, settings.dropout)
    return student.train()


def set_dropout(model, p):
    """Sets every dropout probability of a model, attention included; what it is saved with stays its config's."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = p
