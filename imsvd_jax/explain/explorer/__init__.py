"""The explorer: a folder of static files about what an encoder learned."""

from imsvd_jax.explain.explorer.writer import build

__all__ = ["build"]
