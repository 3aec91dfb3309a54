"""Text to token files and to vocabularies."""
