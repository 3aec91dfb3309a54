"""minidistil: distil BERT, RoBERTa, XLM-R and GPT-2 with little code."""

import os

__version__ = "0.1.0"

if os.name == "nt":
    raise SystemExit("minidistil does not run on Windows itself: run it in WSL (https://aka.ms/wsl)")
