"""minidistil: distil BERT into DistilBERT with little code."""

__version__ = "0.1.0"
