"""What a run chooses by itself: the same on an idle computer and on a busy one."""

import pytest
import torch

from minidistil.machine import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("amx, expected", [(True, "bf16"), (False, "fp32")])
def test_a_cpu_has_fast_bf16_with_amx_alone(amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx})
    assert choose_dtype("auto", CPU) == expected
    assert choose_dtype("fp32", CPU) == "fp32" and choose_dtype("bf16", CPU) == "bf16"


def test_a_cpu_that_says_nothing_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_dtype("auto", CPU) == "fp32"
