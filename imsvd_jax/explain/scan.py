"""One pass over the images: features, codes, and what pairs of them share.

The pass is streaming: on the devices it keeps sums whose size does not depend
on the number of images; on the host it keeps M bytes per image (the codes; 2M
when b > 256), 12 bytes more (index, label) and a uniform sample of features.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices, hashing
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, information
from imsvd_jax.explain import sums as sums_lib
from imsvd_jax.explain.analysis import Analysis, Code, Features, Pairs
from imsvd_jax.explain.images import Batch, Images, padded_batches
from imsvd_jax.explain.subject import Encoding, Subject

# Images beyond this many are sampled for what needs features per image.
DEFAULT_SAMPLE = 20_000


def scan(
  subject: Subject,
  images: Images,
  *,
  mesh: Mesh,
  num_top: int = 12,
  joint: bool = True,
  covariance: bool = True,
  sample_size: int = DEFAULT_SAMPLE,
  what: str = "analysis",
  report: Callable[[str], None] = console.print_line,
) -> tuple[Analysis, np.ndarray]:
  """Streams over a data set once.

  Args:
    num_top: n, images kept for each bin.
    joint: Whether to measure the D x D joint matrix.
    covariance: Whether to measure the F x F covariance of the features.
    sample_size: Images whose features are kept, chosen uniformly.
    what: What progress lines call the pass.

  Returns:
    (what was found, labels [N] int32 in the order of its indices, -1 where
    unknown).

  Raises:
    UserError: There are no images, an image comes twice, or the encoder's
      outputs are not finite.
  """
  start = time.monotonic()
  meter = console.Progress(what, images.count, report=report)
  host = _Host(UniformSample(sample_size))
  make_pass = lambda shapes: accumulate.image_pass(
    subject.encode,
    shapes,
    mesh=mesh,
    num_top=num_top,
    joint=joint,
    covariance=covariance,
  )
  batches = padded_batches(images.batches(), mesh.size)
  sums = _stream(subject, batches, make_pass, mesh, host, meter)
  if int(sums.invalid):
    raise UserError(
      f"{int(sums.invalid)} of {int(sums.count)} images have features or"
      " probabilities that are not finite; check the checkpoint."
    )
  indices, labels, codes = host.arrays()
  code = pairs = None
  if codes is not None and sums.code is not None:
    code = _collect_code(codes, sums.code)
    pairs = _collect_pairs(sums.code.joint, code)
  features = _collect_features(sums.features, host.sample, len(indices))
  meter.finish()
  found = Analysis(
    indices=indices,
    features=features,
    code=code,
    pairs=pairs,
    seconds=time.monotonic() - start,
    images_per_second=meter.rate(),
  )
  return found, labels


def _stream(
  subject: Subject,
  batches: Iterator[Batch],
  make_pass: Callable[[Encoding], accumulate.Pass],
  mesh: Mesh,
  host: "_Host",
  meter: console.Progress,
) -> accumulate.ImageSums:
  """Feeds the devices one batch ahead of what the host reads back."""
  sums: Any = None
  pending = None
  variables = jax.device_put(subject.variables, devices.replicated(mesh))
  for batch in batches:
    if sums is None:
      image_pass = make_pass(encoding_shapes(subject, batch["image"]))
      sums = image_pass.start()
    sums, per_image = image_pass.step(variables, sums, batch)
    if pending is not None:
      meter.add(host.add(*pending))
    pending = (batch, per_image)
  if pending is not None:
    meter.add(host.add(*pending))
  if not meter.done:
    raise UserError(
      "Found no images to explain. Give a data set with at least one image."
    )
  return sums


def encoding_shapes(subject: Subject, images: np.ndarray) -> Encoding:
  """Returns the shapes of a subject's outputs for images like these.

  Raises:
    ValueError: They are not what a subject promises.
  """
  shapes = jax.eval_shape(
    subject.encode,
    subject.variables,
    jax.ShapeDtypeStruct(images.shape, images.dtype),
  )
  if shapes.features.ndim != 2:
    raise ValueError(
      f"features must be [B, F]; found shape {shapes.features.shape}."
    )
  q = shapes.probabilities
  if q is not None and (q.ndim != 3 or q.shape[2] < 2):
    raise ValueError(
      "probabilities must be [B, M, b] with at least 2 bins; found shape "
      f"{q.shape}."
    )
  return shapes


class UniformSample:
  """The S images whose hashed index is smallest.

  A uniform sample without replacement that depends on the indices only: not
  on the order of the images, the batch size or the number of devices.
  """

  def __init__(self, size: int) -> None:
    self.size = size
    self.hashes = np.empty(0, np.uint64)
    self.indices = np.empty(0, np.int64)
    self.rows = np.empty((0, 0), np.float32)

  def add(self, indices: np.ndarray, rows: np.ndarray) -> None:
    """Offers images [k] with their rows [k, F]."""
    hashes = hashing.mix(indices.astype(np.uint64))
    if len(self.hashes) == self.size:
      wanted = hashes < self.hashes.max(initial=0)
      hashes, indices, rows = hashes[wanted], indices[wanted], rows[wanted]
    if len(self.hashes):
      hashes = np.concatenate([self.hashes, hashes])
      indices = np.concatenate([self.indices, indices])
      rows = np.concatenate([self.rows, rows])
    if len(hashes) > self.size:
      keep = np.argpartition(hashes, self.size - 1)[: self.size]
      hashes, indices, rows = hashes[keep], indices[keep], rows[keep]
    self.hashes, self.indices, self.rows = hashes, indices, rows

  def sorted(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns (indices [S], rows [S, F]) by ascending index."""
    order = np.argsort(self.indices)
    return self.indices[order], self.rows[order]


@dataclasses.dataclass
class _Host:
  """What the host keeps of each image."""

  sample: UniformSample
  indices: list[np.ndarray] = dataclasses.field(default_factory=list)
  labels: list[np.ndarray] = dataclasses.field(default_factory=list)
  codes: list[np.ndarray] = dataclasses.field(default_factory=list)

  def add(self, batch: Batch, per_image: accumulate.PerImage) -> int:
    """Takes a batch and returns how many images it had."""
    mask = batch["mask"]
    index = batch["index"][mask]
    labels = batch.get("label", np.full(len(mask), -1))
    self.indices.append(index)
    self.labels.append(np.asarray(labels, np.int32)[mask])
    if per_image.codes is not None:
      self.codes.append(np.asarray(per_image.codes)[mask])
    self.sample.add(index, np.asarray(per_image.features)[mask])
    return len(index)

  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns indices, labels and codes, by ascending index."""
    indices = np.concatenate(self.indices)
    order = np.argsort(indices, kind="stable")
    indices = indices[order]
    if (indices[1:] == indices[:-1]).any():
      twice = indices[1:][indices[1:] == indices[:-1]][0]
      raise UserError(
        f"Image {twice} came more than once; each image must come exactly "
        "once. Check that the batches carry the right 'index' and 'mask'."
      )
    codes = np.concatenate(self.codes)[order] if self.codes else None
    return indices, np.concatenate(self.labels)[order], codes


def _collect_features(
  sums: accumulate.FeatureSums, sample: UniformSample, count: int
) -> Features:
  indices, rows = sample.sorted()
  offset = sums.first.value() / count
  covariance = None
  if sums.second is not None:
    moment = sums.second.value()[: len(offset)] / count
    covariance = moment - np.outer(offset, offset)
  return Features(
    feature_mean=np.asarray(sums.shift, np.float64) + offset,
    sample_indices=indices,
    sample_features=rows,
    feature_covariance=covariance,
  )


def _collect_code(codes: np.ndarray, sums: accumulate.CodeSums) -> Code:
  count, num_variables = codes.shape
  marginal = sums.marginal.value() / count
  dimension = len(marginal)
  num_bins = dimension // num_variables
  shape = (num_variables, num_bins)
  num_top = min(sums.top_scores.shape[1], count)
  top = lambda x: np.asarray(x)[:dimension, :num_top].reshape(*shape, num_top)
  scores = top(sums.top_scores)
  usage = [np.bincount(column, minlength=num_bins) for column in codes.T]
  return Code(
    codes=codes,
    marginal=marginal.reshape(shape),
    usage=np.stack(usage),
    conditional_entropy=sums.conditional_entropy.value() / count,
    confidence=sums.confidence.value() / count,
    top_scores=scores,
    top_indices=np.where(
      scores < 0, -1, top(sums.top_indices).astype(np.int64)
    ),
  )


def _collect_pairs(joint: sums_lib.Sums | None, code: Code) -> Pairs | None:
  if joint is None:
    return None
  count, num_bins = len(code.codes), code.num_bins
  matrix = sums_lib.mean_matrix(joint, code.marginal.size, count)
  return Pairs(
    joint=matrix,
    mutual_information=information.mutual_information(matrix, num_bins),
    floor=information.mutual_information_floor(matrix, num_bins, count),
  )
