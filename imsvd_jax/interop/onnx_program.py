"""The encoder as an ONNX program, for onnxruntime and what it runs on.

The converter is jax2onnx: it reads the JAX program itself, so that the file has
the normalization and the codes, whatever the backbone. (torch.onnx would need a
torch module of each.)
"""

import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import in_place_when_done
from imsvd_jax.runs.encoder import LoadedEncoder

FORMAT = "onnx"
# jax2onnx asks for an Orbax older than ours, which it needs for nothing here.
_INSTALL = (
  "pip install onnx onnx-ir onnxruntime equinox dm-pix einops orbax-export,"
  " then pip install --no-deps jax2onnx"
)


def make_model(encoder: LoadedEncoder, *, projector: bool = False) -> Any:
  """Returns the onnx.ModelProto images [B, S, S, C] -> outputs, any B.

  Args:
    encoder: The encoder, whose `images_of` the program takes.
    projector: Whether to return "embeddings", and "codes" if there are any,
      beside "features".

  Raises:
    UserError: jax2onnx is not installed.
  """
  try:
    from jax2onnx import to_onnx
  except ImportError as error:
    message = f"Writing ONNX needs jax2onnx ({error}): {_INSTALL}."
    raise UserError(message) from error
  variables = jax.tree.map(jnp.asarray, jax.device_get(encoder.variables))
  names = ["features"]
  if projector:
    names += ["embeddings", "codes"] if encoder.discrete else ["embeddings"]

  def encode(images: jax.Array) -> tuple[jax.Array, ...]:
    outputs = encoder.apply(variables, images, projector=projector)
    if not isinstance(outputs, dict):
      return (outputs,)
    return tuple(outputs[name] for name in names)

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in ("jax2onnx", "onnx_ir"):  # Of shapes that nothing uses.
      logging.getLogger(name).setLevel(logging.ERROR)
    return to_onnx(
      encode,
      [encoder.images_of("batch")],
      input_names=["images"],
      output_names=names,
    )


def write_onnx(
  path: str,
  encoder: LoadedEncoder,
  metadata: Mapping[str, Any],
  *,
  projector: bool,
) -> str:
  """Writes the program and its metadata, whole or not at all.

  Returns:
    Python that runs the file where this package is not installed.

  Raises:
    UserError: jax2onnx is not installed.
  """
  model = make_model(encoder, projector=projector)
  entry = model.metadata_props.add()
  entry.key = "metadata"
  entry.value = json.dumps({**metadata, "format_name": FORMAT})
  with in_place_when_done(path) as unfinished, open(unfinished, "wb") as file:
    file.write(model.SerializeToString())
  results = ", ".join(output.name for output in model.graph.output)
  comma = "" if projector else ","
  return f"""import onnxruntime  # pip install onnxruntime

session = onnxruntime.InferenceSession("{os.path.basename(path)}")
{results}{comma} = session.run(None, {{"images": images}})
# images: {metadata["program_input"]}
"""
