"""Checkpoints of parameters in and out: safetensors, no pickle, no torch."""
