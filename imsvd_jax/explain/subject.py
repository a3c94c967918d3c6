"""What is explained: a few functions of images, and nothing else.

This package never sees a model, a configuration or a checkpoint. A caller that
has one (the command line, a notebook) describes it as a `Subject`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Encoding(NamedTuple):
  """The outputs of one forward pass over a batch of images.

  Attributes:
    features: [B, F] float, the backbone's features.
    probabilities: [B, M, b] float, the soft variables q (each sums to 1 over
      its b bins), or None when the objective has no discrete code.
  """

  features: jax.Array
  probabilities: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
  """The functions of images that are to be explained.

  Images are pixels in 0..255, [B, H, W, C], uint8 or float32; the functions
  normalize them as in training. Every function is pure, traceable by jax and
  takes `variables` first, so that weights are arguments of the compiled
  program and not constants inside it. Images of a batch must not influence
  one another (batch normalization uses its running statistics).

  Attributes:
    encode: (variables, images) -> Encoding; one forward pass.
    feature_maps: (variables, images) -> [B, h, w, C], the last spatial
      features, or a tuple that begins with them; differentiable in float
      images. None: no attribution.
    bin_log_probabilities: (variables, feature maps) -> [B, M, b], log q as a
      differentiable function of the maps. None: no attribution.
    patch_codes: (variables, images) -> int [B, h, w, M], the most probable bin
      of each patch. None: no codes of patches.
    attention: (variables, images) -> [B, h, w] >= 0, of a transformer. None: it
      is none.
    variables: Pytree of arrays handed to the functions.
    name: What to call it in titles.
    objective: Name of the objective it was trained with, for sentences.
  """

  encode: Callable[[Any, jax.Array], Encoding]
  feature_maps: Callable[[Any, jax.Array], Any] | None = None
  bin_log_probabilities: Callable[[Any, Any], jax.Array] | None = None
  patch_codes: Callable[[Any, jax.Array], jax.Array] | None = None
  attention: Callable[[Any, jax.Array], jax.Array] | None = None
  variables: Any = ()
  name: str = "encoder"
  objective: str = ""


def no_code_sentence(subject: Subject) -> str:
  """Returns what a run without discrete code shows, and what it cannot show."""
  who = (
    f"{subject.objective} trains" if subject.objective else "This encoder has"
  )
  return (
    f"{who} a continuous embedding without discrete variables, so there are no "
    "bins, codes, joint matrix or per-bin attribution to show. The embedding "
    "map, the nearest neighbors and the spectrum of the features are here."
  )
