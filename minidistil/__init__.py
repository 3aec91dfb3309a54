"""minidistil: distil BERT, RoBERTa, XLM-R and GPT-2 with little code."""

__version__ = "0.1.0"
