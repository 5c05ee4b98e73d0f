"""Evaluation: generation, scoring, the runner that writes answers and rows."""
