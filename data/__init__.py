"""Text to token files, and text to vocabularies."""
