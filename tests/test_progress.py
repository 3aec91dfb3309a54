"""FLOPs by formula against PyTorch's counter; hours and costs by hand."""

import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidistil import progress
from minidistil.losses import Objective
from minidistil.model import BERT_BASE, DISTILBERT_BASE, Config, LanguageModel, attention_ref

TEACHER = Config(vocab_size=90, positions=16, layers=4, heads=2, width=16, mlp_width=48)
STUDENT = TEACHER.student(2)


@pytest.mark.parametrize("objective, teacher, rows", [
    (Objective(), TEACHER, 1.0),
    (Objective(kd_rows="masked"), TEACHER, 0.15),
    (Objective(kd_rows="masked"), TEACHER, 0.3),
    (Objective(alpha_ce=0.0), TEACHER, 0.15),  # the cosine still wants the teacher's hidden states
    (Objective(alpha_ce=0.0, alpha_cos=0.0), TEACHER, 0.15),
    (Objective(alpha_ce=0.0, alpha_cos=0.0), None, 0.15),
])  # fmt: skip
def test_formula_is_the_counter(objective, teacher, rows, monkeypatch):
    """A training step written out plainly, 20 sequences of 10 tokens, of which `rows` meet the vocabulary."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention",
                        lambda q, k, v, **options: attention_ref(q, k, v))  # fmt: skip
    B, T = 20, 10
    student, ids = LanguageModel(STUDENT, seed=0), torch.randint(5, 90, (B, T))
    chosen = torch.arange(round(rows * B * T))
    with FlopCounterMode(display=False) as counter:
        if teacher and objective.needs_teacher:
            with torch.no_grad():
                model = LanguageModel(teacher, seed=1).eval()
                hidden = model(ids).flatten(0, 1)
                if objective.on_logits:
                    model.logits(hidden[chosen])
        student.logits(student(ids).flatten(0, 1)[chosen]).sum().backward()
    counted = counter.get_total_flops() / (B * T)
    flops = progress.training_flops_per_token(objective, teacher, STUDENT, T, min(rows, 0.3))  # 1.0: all rows
    assert flops == pytest.approx(counted, rel=1e-12)


def test_published_recipe():
    """Issue-sized figures: 664 MFLOP a token with all rows at T = 512, about 500 with masked rows."""
    count = progress.training_flops_per_token
    assert count(Objective(), BERT_BASE, DISTILBERT_BASE, 512) / 1e6 == pytest.approx(664, abs=8)
    assert count(Objective(kd_rows="masked"), BERT_BASE, DISTILBERT_BASE, 512) / 1e6 == pytest.approx(500, abs=12)


def test_hours_and_costs():
    figures = progress.estimate_cost(7.2e6, 1000.0, 5e8, 2.0, ranks=4, price_per_hour=3.0, watts=250.0)
    assert figures == {
        "tflops_per_second": 0.125, "utilisation": 0.0625, "device_hours": 8.0, "cost": 24.0, "kwh": 2.0,
        "published_device_hours": 14000.0, "published_cost": 42000.0, "published_kwh": 3500.0,
    }  # fmt: skip
    figures = progress.estimate_cost(7.2e6, 1000.0, 5e8, None, ranks=1)
    assert figures["utilisation"] is None and figures["cost"] is None and figures["device_hours"] == 2.0
    assert figures["kwh"] is None and figures["published_kwh"] is None


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA A100-SXM4-40GB", "fp16", 312),
    ("NVIDIA L40S", "bf16", 362), ("NVIDIA L4", "bf16", 121), ("Tesla V100-SXM2-16GB", "fp16", 125),
    ("NVIDIA H200", "fp32", None), ("Something new", "bf16", None), ("NVIDIA L40", "bf16", 181),
    ("NVIDIA RTX A1000", "bf16", None), ("NVIDIA T400 4GB", "fp16", None), ("NVIDIA A10G", "bf16", None),
])  # fmt: skip
def test_peaks(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert progress.peak_tflops(types.SimpleNamespace(type="cuda"), dtype) == peak
    assert progress.peak_tflops(torch.device("cpu"), "bf16") is None
