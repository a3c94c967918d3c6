"""One pass over a data set, and everything that follows from its sums.

The pass is streaming: on the devices it keeps sums whose size does not depend
on the number of images; on the host it keeps M bytes per image (the codes; 2M
when b > 256), 12 bytes more (index, label) and a uniform sample of features.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, information
from imsvd_jax.explain.subject import Subject

# Images beyond this many are sampled for what needs features per image.
DEFAULT_SAMPLE = 20_000


@dataclasses.dataclass
class Analysis:
  """What the pass found. N images, M variables, b bins, D = M * b, F features.

  Fields about codes are None for an encoder without discrete code; fields
  about two views are None when no views were given.

  Attributes:
    indices: [N] int64, ascending; rows of `codes` and factors follow it.
    codes: [N, M] uint8 or uint16, the most probable bin of each variable.
    marginal: [M, b] float64, p(m; d), mean of q.
    usage: [M, b] int64, images whose most probable bin it is.
    conditional_entropy: [M] nats, mean over images of the entropy of q.
    confidence: [M], mean over images of the largest probability.
    top_scores: [M, b, n] float32, the largest q of each bin, rounded to
      2^-16 so that noise does not rank certain images; -1: none.
    top_indices: [M, b, n] int64, their images, equal scores by lower
      index; -1: none.
    joint: [D, D] float32, P, or None when it was not asked for.
    cross_joint: [D, D] float32, Pc between two views (rows: view 1).
    mutual_information: [M, M] nats, from `joint`.
    floor: [M, M] nats, its finite-sample floor.
    cross_mutual_information: [M, M] nats, from `cross_joint`.
    agreement: [M], share of images whose two views have the same bin.
    soft_agreement: [M], mean over images of sum_d q'(d) q''(d).
    factors: Labels and other factors, in the order of `indices`.
    class_counts: By factor, [M, b, K] images by bin and value.
    nmi: [M, number of factors].
    nmi_chance: [M, number of factors], of independent variables.
    nmi_untrained: [M, number of factors], of the same network with random
      weights; filled by `explain`.
    feature_mean: [F] float64.
    feature_covariance: [F, F] float64, or None when not asked for.
    sample_indices: [S] int64, ascending, a uniform sample of the images.
    sample_features: [S, F] float32.
    flip_rates: By augmentation, [M]; filled by `flip_rates`.
    seconds: Duration of the pass, compilation included.
    images_per_second: Without the first batch, which compiles.
  """

  indices: np.ndarray
  feature_mean: np.ndarray
  sample_indices: np.ndarray
  sample_features: np.ndarray
  feature_covariance: np.ndarray | None = None
  codes: np.ndarray | None = None
  marginal: np.ndarray | None = None
  usage: np.ndarray | None = None
  conditional_entropy: np.ndarray | None = None
  confidence: np.ndarray | None = None
  top_scores: np.ndarray | None = None
  top_indices: np.ndarray | None = None
  joint: np.ndarray | None = None
  cross_joint: np.ndarray | None = None
  mutual_information: np.ndarray | None = None
  floor: np.ndarray | None = None
  cross_mutual_information: np.ndarray | None = None
  agreement: np.ndarray | None = None
  soft_agreement: np.ndarray | None = None
  factors: tuple[information.Factor, ...] = ()
  class_counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  nmi: np.ndarray | None = None
  nmi_chance: np.ndarray | None = None
  nmi_untrained: np.ndarray | None = None
  flip_rates: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  images_per_second: float = 0.0

  @property
  def num_images(self) -> int:
    """N."""
    return len(self.indices)

  @property
  def has_codes(self) -> bool:
    """Whether the encoder has discrete variables."""
    return self.codes is not None

  @property
  def num_variables(self) -> int:
    """M, 0 without a discrete code."""
    return 0 if self.marginal is None else self.marginal.shape[0]

  @property
  def num_bins(self) -> int:
    """b, 0 without a discrete code."""
    return 0 if self.marginal is None else self.marginal.shape[1]

  def entropies(self) -> np.ndarray:
    """[M] nats, H(p(m; .)); the information of a code is at most this."""
    return information.entropy(self.marginal)

  def redundant_pairs(self, count: int = 20) -> list[information.Pair]:
    """The pairs of variables that share most above the floor."""
    return information.most_redundant_pairs(
      self.mutual_information, self.floor, count
    )

  def save(self, path: str | pathlib.Path) -> None:
    """Writes every array to one .npz file (numbers in full precision)."""
    arrays = {
      name: value
      for name, value in vars(self).items()
      if isinstance(value, np.ndarray)
    }
    for name in ("seconds", "images_per_second"):
      arrays[name] = np.float64(getattr(self, name))
    for name, rates in self.flip_rates.items():
      arrays[f"flip_rate/{name}"] = rates
    for i, factor in enumerate(self.factors):
      arrays[f"factor/{i}/name"] = np.array(factor.name)
      arrays[f"factor/{i}/values"] = factor.values
      arrays[f"factor/{i}/names"] = np.array(factor.names, dtype=np.str_)
      if factor.name in self.class_counts:
        arrays[f"factor/{i}/counts"] = self.class_counts[factor.name]
    with open(path, "wb") as file:
      np.savez(file, **arrays)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Analysis":
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    plain = {n: v for n, v in arrays.items() if "/" not in n}
    for name in ("seconds", "images_per_second"):
      plain[name] = float(plain[name])
    result = cls(**plain)
    prefix = "flip_rate/"
    result.flip_rates = {
      n.removeprefix(prefix): v
      for n, v in arrays.items()
      if n.startswith(prefix)
    }
    factors = []
    while f"factor/{len(factors)}/name" in arrays:
      at = f"factor/{len(factors)}/"
      factor = information.Factor(
        str(arrays[at + "name"]),
        arrays[at + "values"],
        tuple(map(str, arrays[at + "names"])),
      )
      factors.append(factor)
      if at + "counts" in arrays:
        result.class_counts[factor.name] = arrays[at + "counts"]
    result.factors = tuple(factors)
    return result


# --- Batches ------------------------------------------------------------------


def pad_batch(
  batch: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
  """Pads a batch with masked images and sorts it by image index.

  Args:
    batch: "image" uint8 [b, H, W, C], "index" [b], optionally "label" [b] and
      "mask" [b] bool.
    batch_size: What to pad to.

  Returns:
    The same keys, with "mask" and "label" (-1: unlabelled) always there.
  """
  images = np.asarray(batch["image"])
  size = len(images)
  mask = np.asarray(batch.get("mask", np.ones(size, bool)), bool)
  index = np.asarray(batch["index"], np.int64)
  if index[mask].size and (
    index[mask].min() < 0 or index[mask].max() >= 2**31 - 1
  ):
    raise UserError(
      "Image indices must be in 0..2^31-2; found "
      f"{index[mask].min()}..{index[mask].max()}."
    )
  index = np.where(mask, index, accumulate.NO_IMAGE)
  labels = np.asarray(batch.get("label", np.full(size, -1)), np.int32)
  order = np.argsort(index, kind="stable")
  pad = batch_size - size
  return {
    "image": np.pad(images[order], ((0, pad), *[(0, 0)] * 3)),
    "label": np.pad(labels[order], (0, pad), constant_values=-1),
    "index": np.pad(
      index[order], (0, pad), constant_values=accumulate.NO_IMAGE
    ),
    "mask": np.pad(mask[order], (0, pad)),
  }


def padded_batches(
  batches: Iterable[Mapping[str, np.ndarray]], multiple: int
) -> Iterator[dict[str, np.ndarray]]:
  """Pads every batch to the first one's size, rounded up to `multiple`."""
  size = 0
  for batch in batches:
    count = len(batch["image"])
    if not size:
      size = count + -count % multiple
    # A batch larger than the first compiles once more, and is right.
    yield pad_batch(batch, max(size, count + -count % multiple))


class Progress:
  """A line every few seconds: images, images per second, time left."""

  def __init__(
    self,
    what: str,
    total: int | None,
    write: Callable[[str], None] | None,
    every: float = 5.0,
  ):
    self.what, self.total, self.write, self.every = what, total, write, every
    self.done = 0
    self.start = self.last = time.monotonic()
    self.warm_start, self.warm_done = None, 0

  def update(self, images: int) -> None:
    """Counts `images` as done."""
    self.done += images
    now = time.monotonic()
    if self.warm_start is None:  # The first batch compiles: not a rate.
      self.warm_start, self.warm_done = now, self.done
    if self.write is not None and now - self.last >= self.every:
      self.last = now
      self.write(self.line(now))

  @property
  def rate(self) -> float:
    """Images per second since the first batch."""
    if self.warm_start is None or self.done == self.warm_done:
      return self.done / max(time.monotonic() - self.start, 1e-9)
    elapsed = time.monotonic() - self.warm_start
    return (self.done - self.warm_done) / max(elapsed, 1e-9)

  def line(self, now: float) -> str:
    """One line for a person."""
    of = f" of {self.total:,}" if self.total else ""
    text = f"{self.what}: {self.done:,}{of} images, {self.rate:,.0f} images/s"
    if self.total and self.rate > 0:
      left = max(self.total - self.done, 0) / self.rate
      text += f", {_duration(left)} left"
    return text

  def finish(self) -> None:
    """Writes the last line."""
    if self.write is not None:
      took = time.monotonic() - self.start
      self.write(
        f"{self.what}: {self.done:,} images in {_duration(took)}, "
        f"{self.rate:,.0f} images/s"
      )


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class UniformSample:
  """The S images whose hashed index is smallest.

  A uniform sample without replacement that depends on the indices only: not
  on the order of the images, the batch size or the number of devices.
  """

  def __init__(self, size: int):
    self.size = size
    self.hashes = np.empty(0, np.uint64)
    self.indices = np.empty(0, np.int64)
    self.rows: np.ndarray | None = None

  def add(self, indices: np.ndarray, rows: np.ndarray) -> None:
    """Offers images [k] with their rows [k, F]."""
    hashes = hash_index(indices)
    if len(self.hashes) == self.size:
      wanted = hashes < self.hashes.max(initial=0)
      hashes, indices, rows = hashes[wanted], indices[wanted], rows[wanted]
    if self.rows is not None:
      hashes = np.concatenate([self.hashes, hashes])
      indices = np.concatenate([self.indices, indices])
      rows = np.concatenate([self.rows, rows])
    if len(hashes) > self.size:
      keep = np.argpartition(hashes, self.size - 1)[: self.size]
      hashes, indices, rows = hashes[keep], indices[keep], rows[keep]
    self.hashes, self.indices, self.rows = hashes, indices, rows

  def sorted(self) -> tuple[np.ndarray, np.ndarray]:
    """(indices [S], rows [S, F]) by ascending index."""
    order = np.argsort(self.indices)
    return self.indices[order], self.rows[order]


def hash_index(indices: np.ndarray) -> np.ndarray:
  """SplitMix64's finalizer: a bijection of 64-bit integers."""
  x = np.asarray(indices).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def some_of(indices: np.ndarray, count: int) -> np.ndarray:
  """Returns at most `count` of the indices, ascending, chosen by their hash.

  Not the first ones: data sets lie sorted by class.
  """
  order = np.argsort(hash_index(indices), kind="stable")
  return np.sort(np.asarray(indices)[order[:count]])


# --- The pass -----------------------------------------------------------------


@dataclasses.dataclass
class _Host:
  """What the host keeps per image."""

  sample: UniformSample
  indices: list[np.ndarray] = dataclasses.field(default_factory=list)
  labels: list[np.ndarray] = dataclasses.field(default_factory=list)
  codes: list[np.ndarray] = dataclasses.field(default_factory=list)

  def add(self, batch: Mapping, per_image: accumulate.PerImage) -> int:
    mask = batch["mask"]
    index = batch["index"][mask]
    self.indices.append(index)
    self.labels.append(batch["label"][mask])
    if per_image.codes is not None:
      self.codes.append(np.asarray(per_image.codes)[mask])
    self.sample.add(index, np.asarray(per_image.features)[mask])
    return len(index)

  def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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


def analyse(
  subject: Subject,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  num_images: int | None = None,
  num_top: int = 12,
  joint: bool = True,
  covariance: bool = True,
  views: tuple[Callable, Callable] | None = None,
  key: jax.Array | None = None,
  factors: Mapping[str, Any] | None = None,
  label_names: Sequence[str] | None = None,
  sample_size: int = DEFAULT_SAMPLE,
  mesh: Mesh | None = None,
  progress: Callable[[str], None] | None = None,
  what: str = "analysis",
) -> Analysis:
  """Streams over a data set once.

  Args:
    subject: The functions of images to explain.
    batches: Dicts of NumPy arrays: "image" uint8 [B, H, W, C], "index" [B],
      optionally "label" [B] (-1: unlabelled) and "mask" [B]; each image once.
    num_images: How many will come, for the time left.
    num_top: n, images kept for each bin.
    joint: Whether to accumulate the D x D joint matrix (and cross-joint).
    covariance: Whether to accumulate the F x F covariance of the features.
    views: Two functions (keys [B], images uint8 [B, H, W, C]) -> pixels in
      0..255, [B, H, W, C]; each costs one more forward pass per image.
    key: Random key of the views; an image's view is a function of the key,
      its index and the number of the view.
    factors: Further values by name, each indexed by image index (a sequence
      of length > largest index, or a mapping); see `make_factor`.
    label_names: Names of the classes.
    sample_size: Images whose features are kept, chosen uniformly.
    mesh: Devices, along axis "data"; by default all local ones.
    progress: Called with a line of text every few seconds.
    what: What these lines call the pass.

  Returns:
    The analysis.

  Raises:
    UserError: No images, an image twice, more than one process, or outputs
      that are not finite.
  """
  if jax.process_count() > 1:
    raise UserError(
      f"The analysis runs in one process; found {jax.process_count()}. Run it "
      "on one host: it uses all devices of that host."
    )
  mesh = accumulate.data_mesh() if mesh is None else mesh
  accumulator = accumulate.Accumulator(
    subject.encode,
    mesh=mesh,
    num_top=num_top,
    joint=joint,
    covariance=covariance,
    views=views,
    key=key,
  )
  start = time.monotonic()
  meter = Progress(what, num_images, progress)
  host = _Host(UniformSample(sample_size))
  state, encoding = _stream(
    accumulator, subject, padded_batches(batches, mesh.size), host, meter
  )
  if int(state.invalid):
    raise UserError(
      f"{int(state.invalid)} of {int(state.count)} images have features or "
      "probabilities that are not finite; check the checkpoint."
    )
  indices, labels, codes = host.arrays()
  result = _collect(indices, codes, host.sample, state, encoding)
  meter.finish()
  _add_factors(result, labels, factors or {}, label_names)
  result.seconds = time.monotonic() - start
  result.images_per_second = meter.rate
  return result


def _stream(accumulator, subject, batches, host, meter):
  """Feeds the devices one batch ahead of what the host reads back."""
  state = encoding = pending = None
  variables = accumulator.place(subject.variables)
  for batch in batches:
    if state is None:
      encoding = accumulator.shapes(variables, batch["image"])
      _check_encoding(encoding)
      state = accumulator.init(encoding)
    state, per_image = accumulator.step(
      variables, state, batch["image"], batch["index"], batch["mask"]
    )
    if pending is not None:
      meter.update(host.add(*pending))
    pending = (batch, per_image)
  if pending is None or not (meter.update(host.add(*pending)) or meter.done):
    raise UserError(
      "Found no images to explain. Give a data set with at least one image."
    )
  return state, encoding


def _check_encoding(encoding):
  if encoding.features.ndim != 2:
    raise ValueError(
      f"features must be [B, F]; found shape {encoding.features.shape}."
    )
  q = encoding.probabilities
  if q is not None and (q.ndim != 3 or q.shape[2] < 2):
    raise ValueError(
      "probabilities must be [B, M, b] with at least 2 bins; found shape "
      f"{q.shape}."
    )


def _collect(indices, codes, sample, state, encoding) -> Analysis:
  total = len(indices)
  sample_indices, sample_features = sample.sorted()
  shift = np.asarray(state.feature_shift, np.float64)
  offset = state.vectors["feature"].value() / total
  result = Analysis(
    indices=indices,
    feature_mean=shift + offset,
    sample_indices=sample_indices,
    sample_features=sample_features,
  )
  if "feature_moment" in state.matrices:
    rows = len(offset)
    moment = state.matrices["feature_moment"].value()[:rows] / total
    result.feature_covariance = moment - np.outer(offset, offset)
  if codes is not None:
    _collect_codes(result, codes, state, encoding.probabilities.shape[1:])
  return result


def _collect_codes(result, codes, state, shape):
  num_variables, num_bins = shape
  dimension = num_variables * num_bins
  total = result.num_images
  mean = lambda name: state.vectors[name].value() / total
  result.codes = codes
  result.usage = np.stack(
    [np.bincount(codes[:, m], minlength=num_bins) for m in range(shape[0])]
  )
  result.marginal = mean("marginal").reshape(shape)
  result.conditional_entropy = mean("conditional_entropy")
  result.confidence = mean("confidence")
  num_top = min(state.top_scores.shape[1], total)
  top = lambda x: np.asarray(x)[:dimension, :num_top].reshape(*shape, num_top)
  result.top_scores = top(state.top_scores)
  found = top(state.top_indices).astype(np.int64)
  result.top_indices = np.where(result.top_scores < 0, -1, found)
  if "agreement" in state.vectors:
    result.agreement = mean("agreement")
    result.soft_agreement = mean("soft_agreement")
  if "joint" in state.matrices:
    result.joint = _mean_matrix(state.matrices["joint"], dimension, total)
    result.mutual_information = information.mutual_information(
      result.joint, num_bins
    )
    result.floor = information.mutual_information_floor(
      result.joint, num_bins, total
    )
  if "cross_joint" in state.matrices:
    result.cross_joint = _mean_matrix(
      state.matrices["cross_joint"], dimension, total
    )
    result.cross_mutual_information = information.mutual_information(
      result.cross_joint, num_bins
    )


def _mean_matrix(sums, rows, count) -> np.ndarray:
  """(total + error) / count as float32, one device's rows at a time."""
  result = np.empty((rows, sums.total.shape[1]), np.float32)
  errors = {s.index[0].start or 0: s for s in sums.error.addressable_shards}
  for shard in sums.total.addressable_shards:
    start = shard.index[0].start or 0
    value = np.asarray(shard.data, np.float64)
    value += np.asarray(errors[start].data)
    value /= count
    stop = min(start + len(value), rows)
    result[start:stop] = value[: max(stop - start, 0)]
  return result


def _add_factors(result, labels, factors, label_names):
  """Labels and factors: class histograms and NMI of every variable."""
  known = []
  if (labels >= 0).any():
    known.append(information.make_factor("label", labels, label_names))
  for name, values in factors.items():
    if isinstance(values, Mapping):
      chosen = [values[int(i)] for i in result.indices]
    else:
      values = np.asarray(values)
      if len(values) <= result.indices[-1]:
        raise UserError(
          f"Factor {name!r} has {len(values)} values, but the data set has "
          f"an image of index {result.indices[-1]}; give one value per image."
        )
      chosen = values[result.indices]
    known.append(information.make_factor(name, np.asarray(chosen)))
  result.factors = tuple(known)
  if result.codes is None or not known:
    return
  for factor in known:
    result.class_counts[factor.name] = _class_counts(result, factor)
  tables = [result.class_counts[f.name] for f in known]
  score = information.normalized_mutual_information
  chance = information.chance_normalized_mutual_information
  result.nmi = np.array([[score(c) for c in t] for t in tables]).T
  result.nmi_chance = np.array([[chance(c) for c in t] for t in tables]).T


def _class_counts(result, factor) -> np.ndarray:
  """[M, b, K] images by most probable bin and value of the factor."""
  known = factor.values >= 0
  values, codes = factor.values[known], result.codes[known]
  return np.stack(
    [
      information.contingency(
        codes[:, m], values, result.num_bins, len(factor.names)
      )
      for m in range(result.num_variables)
    ]
  )
