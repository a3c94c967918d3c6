"""Binds a run to the functions of images that `explain` looks at."""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from imsvd_jax import data
from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches
from imsvd_jax.evaluation import augmented_views
from imsvd_jax.explain import report
from imsvd_jax.explain.subject import Encoding, Subject
from imsvd_jax.objectives.soft_variables import log_soft_discretize
from imsvd_jax.runs import metrics
from imsvd_jax.runs.encoder import LoadedEncoder, data_settings, load_encoder
from imsvd_jax.training import augment
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

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
    # A backbone alone has not what its objective would train.
    objective=encoder.config.objective.name if encoder.has_projector else "",
  )


def untrained_subject(subject: Subject, encoder: LoadedEncoder) -> Subject:
  """The same functions with the weights that the run's seed begins from."""
  experiment = experiment_lib.build(encoder.config, encoder.config.batch_size)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  return dataclasses.replace(
    subject,
    variables={"params": state.params, "batch_stats": state.batch_stats},
    name=f"{subject.name}, random weights",
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
  found = {}
  for name, column in zip(source.factor_names, source.factors.T, strict=True):
    if np.array_equal(column, np.round(column)):
      column = column.astype(np.int32)
    if name in source.factor_values:
      column = np.array(source.factor_values[name])[column]
    found[name.replace("_", " ")] = column
  return found


def batches_of(
  source: Any, settings: Any, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Each image once, prepared as in evaluation, with at most one label."""
  for batch in evaluation_batches.eval_batches(
    source, batch_size=batch_size, resize=settings.resize, crop=settings.crop
  ):
    if source.multi_label:
      del batch["label"]
    yield batch


def _num_variables(subject: Subject, settings: Any) -> int:
  """M, known before any image is read; 0 without a code."""
  shape = (1, settings.crop, settings.crop, settings.channels)
  encoding = jax.eval_shape(
    subject.encode, subject.variables, jax.ShapeDtypeStruct(shape, np.uint8)
  )
  return (
    0 if encoding.probabilities is None else encoding.probabilities.shape[1]
  )


def _views(config: Any) -> tuple[Callable, Callable]:
  return view_of(config.views.view1), view_of(config.views.view2)


def folder_name(
  step: int, *, use_target: bool, split: str, data_set: str
) -> str:
  """Returns a name that two different reports of a run do not share."""
  parts = [f"explain-{step}"]
  if use_target:
    parts.append("target")
  if data_set:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", data_set).strip("-.")
    # What was replaced may have been all the difference.
    digest = hashlib.sha256(data_set.encode()).hexdigest()[:6]
    parts.append(name if name == data_set else f"{name}-{digest}")
  if split != "train":
    parts.append(split)
  return "-".join(parts)


def some_batches(
  source: Any, settings: Any, batch_size: int, count: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of `count` images from everywhere in the source."""
  some = augmented_views.some_images(source, count, seed=0)
  return batches_of(some, settings, batch_size)


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
  two_views: bool = True,
  untrained: bool = True,
  figure_format: str = "pdf",
  figure_variables: Sequence[int] | None = None,
) -> report.Report:
  """Analyses a run's encoder on a data set and writes all there is to see.

  Args:
    workdir: The run.
    step: Which checkpoint; the newest by default.
    use_target: Look at the EMA target network.
    data_set: NAME or NAME=PATH of another data set than the run's own.
    split: "train" or "eval".
    output: Local directory; `folder_name` in the workdir by default.
    max_images: Images shown in the explorer; the numbers are of all.
    num_top: Best images shown for each bin, with Grad-CAM.
    integrated_per_bin: Of these, how many get integrated gradients too:
      16 forward and backward passes each.
    two_views: Look at two augmented views of every image as well, for the
      cross-joint matrix and agreement: two more forward passes.
    untrained: Where labels or factors are known, measure what the network
      with random weights tells of them: one more forward pass.
    figure_format: "pdf", "svg" or "png".
    figure_variables: Variables of the figures; by default the 8 that know
      most of a factor, or of highest entropy.

  Raises:
    UserError: The run, the data or the directory does not fit.
  """
  if os.path.isfile(os.path.expanduser(workdir)):
    raise UserError(
      f"{workdir} is a file; make a run of it first: `python -m"
      f" imsvd_jax.import_weights --file={workdir} --workdir=NEW`."
    )
  output = os.path.expanduser(output)
  if "://" in output or ("://" in workdir and not output):
    raise UserError(
      f"{output or workdir} is not on this machine, and the report is written"
      " to local files; name a local directory with --output."
    )
  encoder = load_encoder(workdir, step, use_target=use_target)
  settings = data_settings(encoder, data_set)
  source = data.make_source(settings, split)
  if source is None:
    raise UserError(f"The data have no {split!r} split; use --split=train.")
  run = epath.Path(os.path.expanduser(workdir))
  output = output or run / folder_name(
    encoder.step, use_target=use_target, split=split, data_set=data_set
  )
  mesh = devices.make_mesh(jax.local_devices())
  batch_size = math.ceil(_BATCH_SIZE / mesh.size) * mesh.size
  subject = subject_of(encoder, f"{run.name}, step {encoder.step}")
  report.check_variables(_num_variables(subject, settings), figure_variables)
  lines = run / metrics.METRICS_FILE

  if source.multi_label:
    console.say("These images have several labels each; they are left out.")

  try:
    return report.explain(
      subject,
      lambda: batches_of(source, settings, batch_size),
      output,
      num_images=source.num_examples,
      some_batches=functools.partial(
        some_batches, source, settings, batch_size
      ),
      views=_views(encoder.config) if two_views else None,
      key=jax.random.key(encoder.config.seed),
      untrained=untrained_subject(subject, encoder)
      if untrained and encoder.discrete
      else None,
      factors=_factors(source),
      label_names=source.label_names or None,
      names=source.describe,
      num_top=num_top,
      grad_cam_per_bin=num_top,
      integrated_per_bin=integrated_per_bin,
      max_images=max_images,
      figure_format=figure_format,
      figure_variables=figure_variables,
      metrics=lines if lines.exists() else None,
      title=f"{run.name} at step {encoder.step}",
      mesh=mesh,
      progress=console.say,
    )
  except OSError as error:
    raise UserError(
      f"Cannot write to {output}: {error.strerror}. Choose --output."
    ) from error
