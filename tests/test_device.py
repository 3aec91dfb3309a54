"""What is known of the device and its software."""

import types

import torch

from kernels import backend
from minidistil import device
from minidistil.device import versions


def test_versions_name_a_gpus_software(monkeypatch):
    on_a_cpu = versions()
    assert on_a_cpu["torch"] == torch.__version__ and "driver" not in on_a_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # which a build for CUDA asks a GPU for
    monkeypatch.setattr(device, "output_of", lambda command, *_: {"nvidia-smi": "580.95\n580.95"}.get(command))
    on_a_gpu = versions()
    assert on_a_gpu["driver"] == "580.95" and {"triton", "cuda", "cudnn"} <= set(on_a_gpu)
    monkeypatch.setattr(device, "output_of", lambda *_: None)  # no nvidia-smi
    assert versions()["driver"] is None


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    """Triton launches on the current one, and would find the tensors of another out of reach."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        device.choose_device(name)
    assert chosen == [torch.device("cuda:1")]


def test_without_triton_a_gpu_is_pytorchs(monkeypatch):
    row = types.SimpleNamespace(is_cuda=True)
    assert backend.on_triton(row) == backend.HERE
    monkeypatch.setattr(backend, "HERE", False)
    assert not backend.on_triton(row)
