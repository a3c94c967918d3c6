"""Binds a run to the functions and images that `explain` looks at."""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import re
import shlex
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from imsvd_jax import data
from imsvd_jax.base import console, devices, files
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches, named
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import augmented_views
from imsvd_jax.explain import report as report_lib
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.explain.health import NO_VERDICT, Indicator
from imsvd_jax.explain.images import Batch, Drawing, Images, TwoViews
from imsvd_jax.explain.subject import Encoding, Subject
from imsvd_jax.models import attention_maps
from imsvd_jax.objectives.soft_variables import log_soft_discretize
from imsvd_jax.runs import metrics, ownership
from imsvd_jax.runs.encoder import LoadedEncoder, data_to_read, load_encoder
from imsvd_jax.training import augment, verdict
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

# Columns of a factor that is a color: they change together.
_COMPONENT = re.compile("_(red|green|blue)$")
_BATCH_SIZE = 256  # Over all devices, rounded up to a multiple of them.


def subject_of(encoder: LoadedEncoder, name: str) -> Subject:
  """Describes a run as functions of images."""
  model, settings = encoder.model, encoder.config.data
  normalize = functools.partial(
    augment.normalize, mean=tuple(settings.mean), std=tuple(settings.std)
  )

  def log_probabilities(embeddings: jax.Array) -> jax.Array:
    chosen = encoder.config.objective[encoder.config.objective.name]
    return log_soft_discretize(
      embeddings, num_bins=chosen.num_bins, temperature=chosen.temperature
    )

  def encode(variables: Any, images: jax.Array) -> Encoding:
    features, embeddings = model.apply(
      variables, normalize(images), train=False
    )
    if not encoder.discrete:
      return Encoding(features)
    return Encoding(features, jnp.exp(log_probabilities(embeddings)))

  def feature_maps(variables: Any, images: jax.Array) -> Any:
    return model.apply(variables, normalize(images), method=model.spatial)

  def bin_log_probabilities(variables: Any, maps: Any) -> jax.Array:
    embeddings = model.apply(variables, maps, method=model.embed_spatial)
    return log_probabilities(embeddings)

  def patch_codes(variables: Any, images: jax.Array) -> jax.Array:
    maps, embeddings = model.apply(
      variables, normalize(images), method=model.patch_embeddings
    )
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    bins = jnp.argmax(log_probabilities(flat), axis=-1)
    return bins.reshape(*maps.shape[:3], -1)

  def attention(variables: Any, images: jax.Array) -> jax.Array:
    return attention_maps(model, variables, normalize(images))

  return Subject(
    encode=encode,
    feature_maps=feature_maps if encoder.discrete else None,
    bin_log_probabilities=bin_log_probabilities if encoder.discrete else None,
    patch_codes=patch_codes if encoder.discrete else None,
    attention=attention if model.has_attention else None,
    variables=encoder.variables,
    name=name,
    # A backbone alone lacks what its objective would train.
    objective=encoder.config.objective.name if encoder.has_projector else "",
  )


def untrained_subject(subject: Subject, encoder: LoadedEncoder) -> Subject:
  """Returns the same functions with the initial weights of the run's seed."""
  experiment = experiment_lib.build(encoder.config, encoder.config.batch_size)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  return dataclasses.replace(
    subject,
    variables={"params": state.params, "batch_stats": state.batch_stats},
    name=f"{subject.name}, random weights",
  )


def two_views(
  source: Source, config: ml_collections.ConfigDict, batch_size: int
) -> TwoViews:
  """Returns two views of every image, made as training makes them.

  The crops are those of the first epoch, and the colors follow the run's
  recipe. The evaluator `collapse` compares the same views if its seed is the
  run's, so that agreement means one thing.
  """
  key = jax.random.key(config.seed)
  # Without normalization, which is the subject's: pixels in 0..255.
  recipes = experiment_lib.augmentation(config)
  recipes = recipes._replace(mean=(0.0,), std=(1 / 255,))

  def augmented(views: jax.Array, indices: jax.Array) -> jax.Array:
    batch = {
      "views": (views,),
      "index": indices,
      "epoch": jnp.zeros_like(indices),
    }
    return augment.augment_views(recipes, key, batch)[0]

  crops = functools.partial(_crops_of_an_epoch, source, config, batch_size)
  return TwoViews(crops, augmented)


def _crops_of_an_epoch(
  source: Source, config: ml_collections.ConfigDict, batch_size: int
) -> Iterator[Batch]:
  """Yields two crops of every image that can be read, once."""
  batches = augmented_views.train_crops(
    source, config, batch_size=batch_size, seed=config.seed
  )
  for batch in itertools.islice(batches, -(-source.num_examples // batch_size)):
    # The last batch may begin another epoch; another image takes the place of
    # one that cannot be read.
    mask = batch["epoch"] == 0
    if "bad" in batch:
      mask &= ~batch["bad"]
    yield {"views": batch["views"][0], "index": batch["index"], "mask": mask}


def _factors(source: Source) -> dict[str, np.ndarray]:
  """Returns the factors that the images were drawn from, where known."""
  if source.factors is None:
    return {}
  found = {}
  for name, column in zip(source.factor_names, source.factors.T, strict=True):
    if np.array_equal(column, np.round(column)):
      column = column.astype(np.int32)
    if name in source.factor_values:
      column = np.array(source.factor_values[name])[column]
    found[_shown(name)] = column
  return found


def _drawing(
  source: Source, settings: ml_collections.ConfigDict
) -> Drawing | None:
  """Returns how the images are drawn, if the encoder sees them as drawn."""
  if source.draw is None or source.factors is None:
    return None
  shape = source.draw(source.factors[:1]).shape[1:3]
  if not shape == (settings.resize,) * 2 == (settings.crop,) * 2:
    return None
  names = tuple(_shown(_COMPONENT.sub("", n)) for n in source.factor_names)
  return Drawing(source.draw, source.factors, names)


def _shown(name: str) -> str:
  return name.replace("_", " ")


def batches_of(
  source: Source, settings: ml_collections.ConfigDict, batch_size: int
) -> Iterator[Batch]:
  """Yields each image once, prepared as in evaluation, with its only label."""
  for batch in evaluation_batches.eval_batches(
    source, batch_size=batch_size, resize=settings.resize, crop=settings.crop
  ):
    if source.multi_label:
      del batch["label"]
    yield batch


def folder_name(step: int, options: RunOptions) -> str:
  """Returns a name that two different reports of a run do not share."""
  parts = [f"explain-{step}"]
  if options.target:
    parts.append("target")
  if options.data:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", options.data).strip("-.")
    # Two names may differ only in what was replaced.
    digest = hashlib.sha256(options.data.encode()).hexdigest()[:6]
    parts.append(name if name == options.data else f"{name}-{digest}")
  if options.split != "train":
    parts.append(options.split)
  return "-".join(parts)


def images_of(
  source: Source,
  settings: ml_collections.ConfigDict,
  config: ml_collections.ConfigDict,
  batch_size: int,
  explorer: str = "",
  absolute_paths: bool = False,
) -> Images:
  """Describes a source as a data set to explain a subject by.

  The images are prepared by `settings`, and the views by the run's `config`.
  Names of images are paths relative to the data, which do not tell where they
  are on this machine, unless they shall be `absolute_paths`. Links are from
  pages in the folder `explorer`.
  """

  def some(count: int) -> Iterator[Batch]:
    part = augmented_views.some_images(source, count, seed=0)
    indices = augmented_views.some_indices(source, count, seed=0)
    for batch in batches_of(part, settings, batch_size):
      yield {**batch, "index": indices[batch["index"]]}

  def links(index: int) -> str:
    return _link(source.describe(index), explorer, absolute_paths)

  def masked(count: int) -> Iterator[Batch]:
    part = augmented_views.some_images(source, count, seed=0)
    assert part.masks is not None
    assert part.factors is not None
    # Cropped as the images are.
    masks = dataclasses.replace(part, images=part.masks(part.factors))
    for batch, mask in zip(
      batches_of(part, settings, batch_size),
      batches_of(masks, settings, batch_size),
      strict=True,
    ):
      yield {**batch, "object": mask["image"]}

  return Images(
    masked=None if source.masks is None else masked,
    batches=lambda: batches_of(source, settings, batch_size),
    count=source.num_examples,
    some=some,
    views=two_views(source, config, batch_size) if "views" in config else None,
    factors=_factors(source),
    drawing=_drawing(source, settings),
    label_names=source.label_names or None,
    names=source.describe if absolute_paths else source.relative_name,
    links=links if source.root and explorer else None,
  )


def _link(path: str, folder: str, absolute: bool) -> str:
  """Returns a link from a page in a folder to a file.

  "" if there is no such file; or unless `absolute`, if it shares no folder
  with the page: the link would tell where the images are on this machine.
  """
  if not os.path.isfile(path):
    return ""
  if absolute:
    return pathlib.Path(path).absolute().as_uri()
  both = [os.path.abspath(path), os.path.abspath(folder)]
  if os.path.commonpath(both) == os.path.sep:
    return ""
  return urllib.parse.quote(os.path.relpath(*both))


def _choose(
  config: ml_collections.ConfigDict, workdir: str, options: RunOptions
) -> tuple[ml_collections.ConfigDict, Source]:
  """Returns the settings and the source of the images to explain a run by."""
  _check_variables(config, options)
  if not options.data:
    ownership.check_data(workdir, config, trusted=options.trust_workdir)
  settings = data_to_read(config, options.data)
  source = data.make_source(settings, options.split)
  if source is None:
    raise UserError(
      f"The data have no {options.split!r} split; use --split=train."
    )
  return settings, source


def _check_variables(
  config: ml_collections.ConfigDict, options: RunOptions
) -> None:
  """Raises UserError for variables that the run's code does not have.

  What a file of weights does not say is checked when its code is known.
  """
  objective = config.objective.get(config.objective.name, {})
  widths = config.model.get("projector")
  if "num_bins" not in objective or not widths:
    return
  report_lib.check_variables(
    options.variables or (), widths[-1] // objective["num_bins"]
  )


def explain_run(
  workdir: str, options: RunOptions | None = None
) -> report_lib.Report:
  """Analyzes a run's encoder on a data set and writes all there is to see.

  Raises:
    UserError: The run, the data or the directory does not fit.
  """
  options = options or RunOptions()
  _check_local(workdir, options)
  if options.data:  # Before the weights are loaded, which takes longer.
    named.check(options.data)
  chosen: list[tuple[ml_collections.ConfigDict, Source]] = []
  encoder = load_encoder(
    workdir,
    options.step,
    use_target=options.target,
    check=lambda config: chosen.append(_choose(config, workdir, options)),
  )
  settings, source = chosen[-1]
  if source.multi_label:
    console.say("These images have several labels each; they are left out.")
  run = epath.Path(os.path.expanduser(workdir))
  output = os.path.expanduser(options.output)
  output = output or run / folder_name(encoder.step, options)
  mesh = devices.make_mesh(jax.local_devices())
  batch_size = math.ceil(_BATCH_SIZE / mesh.size) * mesh.size
  subject = subject_of(encoder, f"{run.name}, step {encoder.step}")
  untrained = None
  if options.untrained and encoder.discrete:
    untrained = untrained_subject(subject, encoder)
  records = metrics.read_metrics(run)
  try:
    return report_lib.explain(
      subject,
      images_of(
        source,
        settings,
        encoder.config,
        batch_size,
        os.path.join(output, report_lib.EXPLORER),
        options.absolute_paths,
      ),
      output,
      options,
      untrained=untrained,
      key=jax.random.key(encoder.config.seed),
      records=records,
      training=training_indicators(records, encoder.step),
      title=f"{run.name} at step {encoder.step}",
      mesh=mesh,
      report=console.say,
    )
  except OSError as error:
    raise UserError(
      f"Cannot write to {output}: {error.strerror}. Choose --output."
    ) from error


_LEVELS = {
  verdict.WARMING_UP: (NO_VERDICT, 0.2),
  verdict.TOO_SHORT: (NO_VERDICT, 0.2),
  verdict.LEARNING: ("good", 0.6),
  verdict.SLOWING: ("good", 0.8),
  verdict.CONVERGED: ("good", 1.0),
}


def training_indicators(
  records: Sequence[Mapping[str, float]], step: int
) -> list[Indicator]:
  """Returns the verdict on the training up to a step, if it was logged."""
  found = verdict.judge([line for line in records if line["step"] <= step])
  if found is None:
    return []
  found = verdict.at_end(found)
  level, share = _LEVELS.get(found.state, ("poor", 0.0))
  meaning = f"At step {step}: {found.why}. {found.advice}".strip()
  return [Indicator("Training", found.name, share, level, meaning)]


def _check_local(workdir: str, options: RunOptions) -> None:
  """Raises UserError unless there is a run, and a local place to write to."""
  if os.path.isfile(os.path.expanduser(workdir)):
    raise UserError(
      f"{workdir} is a file; make a run of it first: `imsvd import_weights"
      f" --file={shlex.quote(workdir)} --workdir=NEW`."
    )
  output = options.output
  if files.is_remote(output) or (files.is_remote(workdir) and not output):
    raise UserError(
      f"{output or workdir} is not on this machine, and the report is written"
      " to local files; name a local directory with --output."
    )
