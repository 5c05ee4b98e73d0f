"""Scaling laws of a sweep: read its rows, fit error against LLM size and visual tokens, say what to deploy.

Reads files alone: it imports neither vlmscale nor launch. `python -m analysis --help` shows the command.
"""
