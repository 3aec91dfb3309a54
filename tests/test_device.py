"""What is known of the device and its software."""

import torch

from minidistil import device
from minidistil.device import versions


def test_versions_name_a_gpus_software(monkeypatch):
    on_a_cpu = versions()
    assert on_a_cpu["torch"] == torch.__version__ and "driver" not in on_a_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "output_of", lambda command, *_: {"nvidia-smi": "580.95\n580.95"}.get(command))
    on_a_gpu = versions()
    assert on_a_gpu["driver"] == "580.95" and {"triton", "cuda", "cudnn"} <= set(on_a_gpu)
    monkeypatch.setattr(device, "output_of", lambda *_: None)  # no nvidia-smi
    assert versions()["driver"] is None
