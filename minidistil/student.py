"""Student initialisation: from teacher layers, from a folder, or with random weights."""

import re

import torch

from minidistil import weights
from minidistil.errors import UserError
from minidistil.model import LanguageModel
from minidistil.narrow import narrowed, narrower


def student_layers(teacher_layers, k=None):
    """Returns k evenly spread teacher layers (default half): 0, 2, 4, 7, 9, 11 of 12, as in the published recipe.

    Raises UserError unless 1 <= k <= teacher_layers.
    """
    k = max(1, teacher_layers // 2) if k is None else k
    if not 1 <= k <= teacher_layers:
        raise UserError(f"cannot choose {k} layers of {teacher_layers}: ask for 1 to {teacher_layers}")
    return [round(i * (teacher_layers - 1) / max(1, k - 1)) for i in range(k)]


def student_from_teacher(teacher, layers):
    """Returns a model of `Config.student`'s shape in training mode: copies of these teacher layers and of the rest.

    It is of the teacher's class. BERT adds token-type row 0 to every position of a single segment; in a DistilBERT it
    is added to the position table, so a student with all layers computes what its teacher does. Raises UserError for a
    layer that does not exist.
    """
    L = teacher.config.layers
    if not layers or not all(0 <= layer < L for layer in layers):
        raise UserError(f"student layers {layers}: choose from the teacher's layers 0 to {L - 1}")
    source = teacher.state_dict()
    with torch.device("meta"):
        student = type(teacher)(teacher.config.student(len(layers)))
    state = {}
    for name in student.state_dict():
        theirs = re.sub(r"(?<=blocks\.)\d+", lambda match: str(layers[int(match[0])]), name)
        state[name] = source[theirs].clone()
    if teacher.config.token_types and not student.config.token_types:
        state["encoder.embeddings.positions.weight"] += source["encoder.embeddings.types.weight"][0]
    student.load_state_dict(state, assign=True)
    return student


def parse_layers(text, teacher_layers):
    """Parses --student-layers: `6` -> six evenly spread teacher layers; `0,2,4` -> these; None -> half of them."""
    try:
        numbers = [int(n) for n in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--student-layers {text} is neither a number nor a list such as 0,2,4,7,9,11") from None
    if len(numbers) > 1 or (text and "," in text):
        return numbers
    k = numbers[0] if numbers else None
    if k is not None and not 1 <= k <= teacher_layers:
        raise UserError(f"--student-layers {k}: the teacher has {teacher_layers} layers: choose 1 to {teacher_layers}")
    return student_layers(teacher_layers, k)


def build_student(teacher, source=None, layers=None, shape=None, seed=0, dropout=None, width=None):
    """Returns the student, in fp32 on the CPU, in training mode; it is of the teacher's class.

    `teacher` is a LanguageModel, SentenceEncoder or None; `source` of the weights is "teacher", "random", the folder of
    a model, or None: the teacher if there is one and no `shape`. `layers` is the text of --student-layers, `width` None
    for the teacher's, `shape` the path of a config.json, `dropout` None for the config's. Raises UserError where these
    contradict each other or the teacher.
    """
    source = source or ("teacher" if teacher and not shape else "random")
    kind = type(teacher) if teacher else LanguageModel
    if source not in ("teacher", "random"):
        if layers:
            raise UserError(f"--student-init {source} already has its layers: leave out --student-layers")
        student = weights.load_model(source, fresh_head=True, kind=kind)
    elif source == "teacher":
        student = student_from_teacher(teacher, parse_layers(layers, teacher.config.layers))
        student = student if width is None else narrowed(student, width)
    else:
        if shape:
            config = weights.read_config(shape)
        elif teacher:
            config = teacher.config.student(len(parse_layers(layers, teacher.config.layers)))
            config = config if width is None else narrower(config, width)
        else:
            raise UserError("a model without a teacher needs a shape: add --student-config or --student-init")
        student = kind(config, seed=seed)
    if dropout is not None:
        set_dropout(student, dropout)
    return student.train()


def set_dropout(model, p):
    """Sets every dropout probability of a model, attention included, but not its config, which is saved."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = p


def drops(model):
    """Whether any dropout of a model acts in training."""
    return any(getattr(module, "dropout", 0.0) for module in model.modules())
