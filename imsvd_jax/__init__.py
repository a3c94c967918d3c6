"""Self-supervised image representation learning with discrete embeddings.

Importing the package imports nothing heavy: `load_encoder` and `pretrain` load
on first use.
"""

from typing import Any

__version__ = "0.1.0"
# Address for `git clone`, which the metadata and the notebook show; "": none is
# public yet.
REPOSITORY = ""

__all__ = ["REPOSITORY", "__version__", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
  if name == "load_encoder":
    from imsvd_jax.runs.encoder import load_encoder

    return load_encoder
  if name == "pretrain":
    from imsvd_jax.base import tensorflow_notes

    tensorflow_notes.hide(3)  # The next line imports it.
    from imsvd_jax.commands.one_call import pretrain

    return pretrain
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
