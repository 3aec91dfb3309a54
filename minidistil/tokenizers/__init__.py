"""The kinds of tokenizers, and their files."""
