"""What a run chooses by itself: the same on an idle computer and on a busy one."""

import pytest
import torch

from minidistil import device
from minidistil.device import choose_dtype, versions

CPU = torch.device("cpu")


@pytest.mark.parametrize("amx, expected", [(True, "bf16"), (False, "fp32")])
def test_a_cpu_has_fast_bf16_with_amx_alone(amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx})
    assert choose_dtype("auto", CPU) == expected
    assert choose_dtype("fp32", CPU) == "fp32" and choose_dtype("bf16", CPU) == "bf16"


def test_a_cpu_that_says_nothing_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_dtype("auto", CPU) == "fp32"


def test_versions_name_a_gpus_software(monkeypatch):
    on_a_cpu = versions()
    assert on_a_cpu["torch"] == torch.__version__ and "driver" not in on_a_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "printed", lambda command, *_: {"nvidia-smi": "580.95\n580.95"}.get(command))
    on_a_gpu = versions()
    assert on_a_gpu["driver"] == "580.95" and {"triton", "cuda", "cudnn"} <= set(on_a_gpu)
    monkeypatch.setattr(device, "printed", lambda *_: None)  # no nvidia-smi
    assert versions()["driver"] is None
