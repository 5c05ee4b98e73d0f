"""vlmscale: inference-optimal scaling laws for vision-language models, in JAX."""

__version__ = "0.1.0"
