"""Cases of bench.py that have a file of their own."""
