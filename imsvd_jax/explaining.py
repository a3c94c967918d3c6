"""Binds a run to the functions of images that `explain` looks at."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax import augment, data, metrics, sharding
from imsvd_jax.data import pipeline
from imsvd_jax.encoder import LoadedEncoder, data_settings, load_encoder
from imsvd_jax.errors import UserError
from imsvd_jax.explain import report
from imsvd_jax.explain.subject import Encoding, Subject
from imsvd_jax.objectives.soft_variables import log_soft_discretize

_BATCH_SIZE = 256  # Over all devices, rounded up to a multiple of them.


def subject_of(encoder: LoadedEncoder, name: str) -> Subject:
  """Writes a run down as the functions of images that are explained."""
  model, settings = encoder.model, encoder.config.data
  normalize = functools.partial(
    augment.normalize, mean=tuple(settings.mean), std=tuple(settings.std)
  )

  def log_probabilities(embeddings):
    chosen = encoder.config.objective[encoder.config.objective.name]
    return log_soft_discretize(
      embeddings, num_bins=chosen.num_bins, temperature=chosen.temperature
    )

  def encode(variables, images):
    features, embeddings = model.apply(
      variables, normalize(images), train=False
    )
    if not encoder.discrete:
      return Encoding(features)
    return Encoding(features, jnp.exp(log_probabilities(embeddings)))

  def feature_maps(variables, images):
    return model.apply(
      variables, normalize(images), train=False, method=model.feature_maps
    )

  def bin_log_probabilities(variables, maps):
    embeddings = model.apply(
      variables,
      jnp.mean(maps, axis=(1, 2)),
      method=lambda network, h: network.projector(h, False),
    )
    return log_probabilities(embeddings)

  return Subject(
    encode=encode,
    feature_maps=feature_maps if encoder.discrete else None,
    bin_log_probabilities=bin_log_probabilities if encoder.discrete else None,
    variables=encoder.variables,
    name=name,
    objective=encoder.config.objective.name,
  )


def view_of(settings: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Returns one view's recipe as (keys [B], images) -> pixels in 0..255.

  The crop is cut on the device, with the recipe's areas and aspect ratios; a
  box that leaves the image is fitted into it.
  """

  def one_crop(key, image):
    keys = jax.random.split(key, 4)
    low, high = settings.crop_scale
    area = jax.random.uniform(keys[0], (), minval=low, maxval=high)
    low, high = (math.log(ratio) for ratio in settings.crop_ratio)
    ratio = jnp.exp(jax.random.uniform(keys[1], (), minval=low, maxval=high))
    box = jnp.sqrt(area) * jnp.stack([1 / jnp.sqrt(ratio), jnp.sqrt(ratio)])
    box = jnp.minimum(box, 1.0)  # Height and width, of the image's.
    corner = jax.random.uniform(keys[2], (2,)) * (1.0 - box)
    size = jnp.array(image.shape[:2], jnp.float32)
    cut = jax.image.scale_and_translate(
      image.astype(jnp.float32),
      image.shape,
      (0, 1),
      1 / box,
      -corner * size / box,
      method="cubic",
    )
    flipped = jax.random.bernoulli(keys[3], settings.flip_prob)
    return jnp.where(flipped, cut[:, ::-1], cut)

  def view(keys, images):
    pairs = jax.vmap(jax.random.split)(keys)
    cut = jax.vmap(one_crop)(pairs[:, 0], images)
    cut = jnp.clip(jnp.round(cut), 0, 255).astype(jnp.uint8)
    return augment.augment(
      pairs[:, 1], cut, settings, mean=(0.0,), std=(1 / 255,)
    )

  return view


def _factors(source: Any) -> dict[str, np.ndarray]:
  """The factors that the images were drawn from, where they are known."""
  if source.factors is None:
    return {}
  columns = zip(source.factor_names, source.factors.T, strict=True)
  whole = lambda column: np.array_equal(column, np.round(column))
  return {
    name: column.astype(np.int32) if whole(column) else column
    for name, column in columns
  }


def _names(source: Any, count: int) -> Mapping[int, str]:
  return {index: source.describe(index) for index in range(count)}


def explain_run(
  workdir: str,
  *,
  step: int | None = None,
  use_target: bool = False,
  data_set: str = "",
  split: str = "train",
  output: str = "",
  max_images: int = 50_000,
  num_top: int = 12,
  integrated_per_bin: int = 2,
  figure_format: str = "pdf",
) -> report.Report:
  """Analyses a run's encoder on a data set and writes all there is to see.

  Args:
    workdir: The run.
    step: Which checkpoint; the newest by default.
    use_target: Look at the EMA target network.
    data_set: NAME or NAME=PATH of another data set than the run's own.
    split: "train" or "eval".
    output: Directory; workdir/explain-STEP by default.
    max_images: Images shown in the explorer; the numbers are of all.
    num_top: Best images shown for each bin, with Grad-CAM.
    integrated_per_bin: Of these, how many get integrated gradients too: about
      32 forward and backward passes each.
    figure_format: "pdf", "svg" or "png".

  Raises:
    UserError: The run, the data or the directory does not fit.
  """
  encoder = load_encoder(workdir, step, use_target=use_target)
  settings = data_settings(encoder, data_set)
  source = data.make_source(settings, split)
  if source is None:
    raise UserError(f"The data have no {split!r} split; use --split=train.")
  run = pathlib.Path(os.path.expanduser(workdir))
  output = output or run / f"explain-{encoder.step}"
  mesh = sharding.make_mesh(jax.local_devices())
  batch_size = math.ceil(_BATCH_SIZE / mesh.size) * mesh.size
  views = encoder.config.views
  lines = run / metrics.METRICS_FILE

  def batches() -> Iterator[dict[str, np.ndarray]]:
    return pipeline.eval_batches(
      source,
      batch_size=batch_size,
      resize=settings.resize,
      crop=settings.crop,
    )

  try:
    return report.explain(
      subject_of(encoder, f"{run.name}, step {encoder.step}"),
      batches,
      output,
      num_images=source.num_examples,
      views=(view_of(views.view1), view_of(views.view2)),
      key=jax.random.key(encoder.config.seed),
      factors=_factors(source),
      label_names=source.label_names or None,
      names=_names(source, min(source.num_examples, max_images)),
      num_top=num_top,
      grad_cam_per_bin=num_top,
      integrated_per_bin=integrated_per_bin,
      max_images=max_images,
      figure_format=figure_format,
      metrics=lines if lines.exists() else None,
      title=f"{run.name} at step {encoder.step}",
      mesh=mesh,
      progress=metrics.say,
    )
  except OSError as error:
    raise UserError(
      f"Cannot write to {output}: {error.strerror}. Choose --output."
    ) from error
