"""Atomic checkpoints and exact resume: one self-checksummed file holds all that an update depends on.

The order of the data and the random numbers are functions of (seed, update), so the state is small: the student's
weights, AdamW's two moments, the loss scale and the number of updates done.
"""

import json
import pathlib

import torch

from minidistil.errors import UserError
from minidistil.safetensors import read_safetensors, write_safetensors

NAME = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def choose_out(out, stem, resume, witness):
    """Returns the folder `out`, or runs/`stem` for the first number that is free; no run is ever written over.

    A folder that holds the file `witness` can be resumed. Raises UserError for another folder with something in it.
    """
    if out is None:
        numbers = (("" if n == 1 else f"-{n}") for n in range(1, 10**6))
        return next(p for p in (pathlib.Path("runs") / f"{stem}{n}" for n in numbers) if not p.exists())
    out = pathlib.Path(out)
    if out.is_dir() and any(out.iterdir()) and not resume:
        how = "add --resume to go on, or choose" if (out / witness).exists() else "choose"
        raise UserError(f"--out {out} is not empty: {how} another --out")
    return out


def path_of(out):
    return pathlib.Path(out) / "checkpoint" / NAME


def save(out, student, optimizer, info):
    """Writes `out`/checkpoint: weights, moments and `info` (a JSON-able dict with the key "update")."""
    tensors, adam_steps = {}, 0.0
    for name, parameter in student.named_parameters():
        tensors[f"student.{name}"] = parameter.detach()
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
                adam_steps = float(optimizer.state[parameter]["step"])
    info = {**info, "adam_steps": adam_steps}  # fewer than the updates where fp16 overflowed
    write_safetensors(path_of(out), tensors, {"info": json.dumps(info)}, checksum=True)


def load(out):
    """Returns (info, tensors) of the checkpoint in `out`; UserError where there is none or it is damaged."""
    if not path_of(out).is_file():
        raise UserError(f"nothing to resume in {out} (no {path_of(out)}): start without --resume")
    tensors, metadata = read_safetensors(path_of(out), checksum=True)
    return json.loads(metadata["info"]), tensors


@torch.no_grad()
def restore(tensors, student, optimizer, adam_steps):
    """Puts the tensors of `load` into a student and into its optimizer, which has taken `adam_steps` steps."""
    for name, parameter in student.named_parameters():
        parameter.copy_(tensors[f"student.{name}"])
        if f"exp_avg.{name}" in tensors:
            # the step counter stays where the fused optimizer keeps it: beside the parameter, in fp32
            state = {moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(adam_steps, device=parameter.device), **state}
