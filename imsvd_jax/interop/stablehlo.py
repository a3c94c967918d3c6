"""The encoder as a StableHLO program that runs where only jax is installed.

The program contains weights and normalization, and takes any batch size.
`jax.export.deserialize` reads the file. A zip archive with `metadata.json`
follows the program in the same file: readers of the program stop before it, and
readers of zip archives start from the end.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import in_place_when_done
from imsvd_jax.runs.encoder import LoadedEncoder

FORMAT = "stablehlo"


def export_program(
  encoder: LoadedEncoder, *, projector: bool = False
) -> export.Exported:
  """Returns the program images [B, S, S, C] -> outputs, for any B.

  Args:
    encoder: The encoder, whose `images_of` the program takes.
    projector: Whether to return {"features", "embeddings"}, and "codes" if
      there are any, instead of the features.
  """
  # On the host, because the program is for one device.
  variables = jax.device_get(encoder.variables)

  def encode(images: jax.Array) -> Any:
    return encoder.apply(
      jax.tree.map(jnp.asarray, variables), images, projector=projector
    )

  (batch,) = export.symbolic_shape("batch")
  return export.export(jax.jit(encode), platforms=("cpu", "cuda", "tpu"))(
    encoder.images_of(batch)
  )


def write_stablehlo(
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
    UserError: flatbuffers is not installed.
  """
  try:
    program = export_program(encoder, projector=projector).serialize()
  except ImportError as error:
    raise UserError(
      "Writing StableHLO needs flatbuffers: pip install flatbuffers."
    ) from error
  with in_place_when_done(path) as unfinished:
    with open(unfinished, "wb") as file:
      file.write(program)
    with zipfile.ZipFile(unfinished, "a") as archive:
      described = {**metadata, "format_name": FORMAT}
      archive.writestr("metadata.json", json.dumps(described))
  result = 'outputs["features"]' if projector else "features"
  name = "outputs" if projector else "features"
  return f"""import jax  # pip install jax flatbuffers
from jax import export

with open("{os.path.basename(path)}", "rb") as file:
  encode = jax.jit(export.deserialize(file.read()).call)
{name} = encode(images)  # {metadata["program_input"]}
{result}  # float32 [B, F]
"""
