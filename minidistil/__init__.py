"""minidistil: distil BERT into DistilBERT with code that fits in one's head."""

__version__ = "0.1.0"
