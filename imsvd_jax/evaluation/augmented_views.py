"""Embeddings of augmented views of images, as the objective sees them.

The evaluator `collapse` looks at them: true groups of views, from the run's own
crops and photometric augmentation, through the frozen network.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from imsvd_jax.base import agreement, hashing
from imsvd_jax.base import devices as sharding
from imsvd_jax.base.console import Progress
from imsvd_jax.data import host_pipeline, part
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import protocols
from imsvd_jax.evaluation.features import gather_rows
from imsvd_jax.models import Encoder
from imsvd_jax.objectives import soft_discretize
from imsvd_jax.training import augment, experiment


def some_images(source: Source, count: int, *, seed: int) -> Source:
  """Returns a fixed random part of a source; see `some_indices`."""
  if source.num_examples <= count:
    return source
  return part.take(source, some_indices(source, count, seed=seed))


def some_indices(source: Source, count: int, *, seed: int) -> np.ndarray:
  """Returns the ascending indices of at most `count` images of a source.

  Of a stream, which cannot be read at random, the first ones: TensorFlow
  Datasets has shuffled its records when it wrote them.
  """
  count = min(count, source.num_examples)
  if source.stream is not None:
    return np.arange(count)
  return np.sort(hashing.hash_order(source.num_examples, seed=seed)[:count])


class ViewEmbedder:
  """Maps images to the embeddings of several augmented views of each.

  Every process takes its share of the images; all get the rows of all.
  """

  def __init__(
    self,
    model: Encoder,
    config: ml_collections.ConfigDict,
    *,
    discrete: bool,
    batch_size: int,
  ) -> None:
    """Compiles nothing yet.

    `batch_size` counts the images of all processes; `discrete` says whether
    embeddings are soft discrete variables.
    """
    self._config = config
    self._soft = _soft_variables(config) if discrete else None
    self._mesh = sharding.make_mesh(jax.local_devices())
    self._batch_size = batch_size
    self._apply = jax.jit(functools.partial(_embed_two_views, model, config))

  def inputs(
    self,
    variables: dict[str, Any],
    source: Source,
    protocol: protocols.Collapse,
  ) -> dict[str, np.ndarray]:
    """Returns "embeddings", "view_groups" and, if discrete, "codes".

    Args:
      variables: {"params", "batch_stats"} on this process's devices.
      source: From `some_images`.
      protocol: How many groups and views.
    """
    embed = functools.partial(self.embed, variables, seed=protocol.seed)
    embeddings = embed(source, num_views=2)
    groups = some_images(source, protocol.lidar_groups, seed=protocol.seed)
    view_groups = embed(groups, num_views=protocol.lidar_views)
    result = {"embeddings": embeddings, "view_groups": view_groups}
    if self._soft:  # Of embeddings [n, V, D], probabilities [n, V, M, b].
      result["codes"] = np.stack(
        [np.asarray(self._soft(view)) for view in embeddings.swapaxes(0, 1)],
        axis=1,
      )
    return result

  def embed(
    self,
    variables: dict[str, Any],
    source: Source,
    *,
    num_views: int,
    seed: int,
  ) -> np.ndarray:
    """Returns float32 [n, V, D]: V views of every image of a source.

    Views come in pairs, the recipe's two global ones; V is rounded up to even.
    """
    num_pairs, size = -(-num_views // 2), source.num_examples
    total = num_pairs * size
    batches = train_crops(
      source, self._config, batch_size=self._batch_size, seed=seed
    )
    num_batches = -(-total // self._batch_size)
    num_cut = 2 * num_batches * self._batch_size
    meter = Progress("Embedding views", num_cut, unit="views")
    rows = []
    with agreement.together():
      for batch in itertools.islice(batches, num_batches):
        placed = sharding.shard_batch(batch, self._mesh)
        pairs = np.asarray(self._apply(variables, jax.random.key(seed), placed))
        rows.append((batch["index"], batch["epoch"], pairs))
        meter.add(2 * len(pairs) * jax.process_count())
    index, epoch, pairs = (
      gather_rows(np.concatenate(column)) for column in zip(*rows, strict=True)
    )
    wanted = epoch < num_pairs  # The last batch may begin another epoch.
    views = np.empty((size, num_pairs, 2, pairs.shape[-1]), np.float32)
    views[index[wanted], epoch[wanted]] = pairs[wanted]
    return views.reshape(size, 2 * num_pairs, -1)


def _soft_variables(
  config: ml_collections.ConfigDict,
) -> Callable[[np.ndarray], jax.Array]:
  """Returns the discretization of embeddings [n, D] into [n, M, b]."""
  settings = experiment.hyperparameters(config)
  wanted = {name: settings[name] for name in ("num_bins", "temperature")}
  return jax.jit(functools.partial(soft_discretize, **wanted))


def train_crops(
  source: Source,
  config: ml_collections.ConfigDict,
  *,
  batch_size: int,
  seed: int,
) -> Iterator[dict[str, Any]]:
  """Yields endless batches of the two global crops, as training cuts them.

  They are this process's part of what `host_pipeline.train_batches` returns for
  `batch_size` images over all processes.
  """
  return host_pipeline.train_batches(
    source,
    views=_global_views(config),
    batch_size=batch_size,
    seed=seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _global_views(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns the settings of the recipe's views without local ones."""
  views = config.views.copy_and_resolve_references()
  views.num_local = 0
  return views


def picture(
  source: Source, config: ml_collections.ConfigDict, *, columns: int = 8
) -> np.ndarray:
  """Returns a picture of some images as training sees them: two rows of views.

  The crops and the photometric augmentation are the recipe's; not collective.

  Args:
    source: Training images.
    config: The recipe.
    columns: How many images.

  Returns:
    uint8 [2 S, n S, C] of n = min(columns, images) images; C is 1 or 3: of
    other channels it shows the mean.
  """
  some = some_images(source, columns, seed=0)
  batch = next(
    host_pipeline.train_batches(
      some,
      views=_global_views(config),
      batch_size=some.num_examples,
      seed=0,
    )
  )
  batch = {name: batch[name] for name in ("views", "index", "epoch")}
  recipes = experiment.augmentation(config)
  augmented = jax.jit(functools.partial(augment.augment_views, recipes))
  rows = np.asarray(augmented(jax.random.key(0), batch)[0])  # [2, n, S, S, C]
  rows = rows * np.asarray(config.data.std) + np.asarray(config.data.mean)
  if rows.shape[-1] not in (1, 3):
    rows = rows.mean(-1, keepdims=True)
  pixels = np.clip(np.rint(255 * rows), 0, 255).astype(np.uint8)
  return np.concatenate([np.concatenate(row, axis=1) for row in pixels])


def _embed_two_views(
  model: Encoder,
  config: ml_collections.ConfigDict,
  variables: dict[str, Any],
  key: jax.Array,
  batch: Any,
) -> jax.Array:
  """Augments and embeds a batch of pairs of crops: float32 [B, 2, D]."""
  recipes = experiment.augmentation(config)
  views = augment.augment_views(recipes, key, batch)[0]  # [2, B, S, S, C]
  embeddings = [model.apply(variables, v, train=False)[1] for v in views]
  # A stochastic head gives the mean first, and after it the noise's spread.
  dimensions = config.model.projector[-1]
  return jnp.stack(embeddings, axis=1)[..., :dimensions]
