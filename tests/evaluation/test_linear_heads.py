"""Heads trained by SGD: the update rule, the grid, the protocols."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import linear, linear_heads, probe, protocols, scores
from imsvd_jax.evaluation.features import Features

NUM_CLASSES = 3


@pytest.fixture(scope="module")
def blobs():
  """Three overlapping clouds: 150 images to train, 60 to test."""
  generator = np.random.default_rng(0)
  labels = np.arange(210) % NUM_CLASSES
  centres = 1.5 * generator.normal(size=(NUM_CLASSES, 6))
  features = centres[labels] + generator.normal(size=(210, 6))
  features = features.astype(np.float32)
  train = Features(features[:150], labels[:150])
  return train, Features(features[150:], labels[150:])


def reference_steps(
  kernel, bias, batches, rates, momentum, weight_decay, trust=None
):
  """SGD or LARS in float64 NumPy, one head, from the update rule."""
  buffers = [np.zeros_like(kernel), np.zeros_like(bias)]
  parameters = [kernel.astype(np.float64), bias.astype(np.float64)]
  for (x, y, weights), rate in zip(batches, rates, strict=True):
    logits = x.astype(np.float64) @ parameters[0] + parameters[1]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p *= (weights / weights.sum())[:, None]
    gradients = [x.T.astype(np.float64) @ p, p.sum(axis=0)]
    for i in range(2):
      g = gradients[i] + weight_decay * parameters[i]
      norms = np.linalg.norm(parameters[i]), np.linalg.norm(g)
      if trust is not None and min(norms) > 0:
        g = g * trust * norms[0] / norms[1]
      buffers[i] = momentum * buffers[i] + g
      parameters[i] = parameters[i] - rate * buffers[i]
  return parameters


@pytest.mark.parametrize(
  ("optimizer", "weight_decay"), [("sgd", 0.1), ("lars", 0.0)]
)
def test_step_equals_the_update_rule(blobs, optimizer, weight_decay):
  train, labels = blobs[0]
  rates = np.array([0.5, 0.1], np.float32)
  mesh = devices.make_mesh()
  state = linear_heads.create_heads(
    2, 6, NUM_CLASSES, seed=1, deviation=0.01, mesh=mesh
  )
  kernel, bias = (np.asarray(part[0]) for part in state.heads)
  assert 0.005 < kernel.std() < 0.015
  weights = (np.arange(10) < 9).astype(np.float32)  # the tenth is padding
  batches = [
    (train[i : i + 10], labels[i : i + 10].astype(np.int32), weights)
    for i in (0, 10, 20)
  ]
  for batch in batches:
    placed = linear_heads.place_batch(mesh, *batch)
    assert placed[0].shape == (16, 6)  # padded to eight devices
    state, losses = linear_heads.train_step(
      state,
      *placed,
      rates,
      momentum=0.9,
      weight_decay=weight_decay,
      optimizer=optimizer,
      trust_coefficient=0.01,
    )
  assert losses.shape == (2,)
  for head, rate in enumerate(rates):
    expected = reference_steps(
      kernel,
      bias,
      batches,
      [float(rate)] * 3,
      0.9,
      weight_decay,
      trust=0.01 if optimizer == "lars" else None,
    )
    for found, wanted in zip(state.heads, expected, strict=True):
      np.testing.assert_allclose(np.asarray(found)[head], wanted, atol=1e-6)


def test_ranks_equal_those_of_the_metrics(blobs):
  generator = np.random.default_rng(2)
  kernel = generator.integers(-1, 2, size=(2, 4, NUM_CLASSES))  # many ties
  kernel = kernel.astype(np.float32)
  kernel[1, 0] = np.nan
  features = generator.integers(0, 2, size=(50, 4)).astype(np.float32)
  labels = generator.integers(0, NUM_CLASSES, 50).astype(np.int32)
  found = linear_heads.rank_classes(
    linear_heads.Heads(kernel, np.zeros((2, NUM_CLASSES), np.float32)),
    features,
    labels,
    block=16,
  )
  expected = [scores.class_ranks(features @ k, labels) for k in kernel]
  np.testing.assert_array_equal(found, expected)
  assert (found[1] == NUM_CLASSES).all()


PROBE = protocols.Probe((1e-5, 0.1, 1e6), batch_size=32, epochs=8)


@pytest.fixture(scope="module")
def probed(blobs):
  return probe.linear_probe(*blobs, PROBE)


def test_probe_learns_and_chooses_on_train(blobs, probed):
  assert probed.learning_rate == 0.1
  assert probed.accuracy.top1 > 0.8
  assert probed.test_top1[0.1] == probed.accuracy.top1
  assert probed.best_top1 >= probed.accuracy.top1
  assert max(probed.held_out_top1.values()) == probed.held_out_top1[0.1]
  train, test = blobs
  wrong = test._replace(labels=(test.labels + 1) % NUM_CLASSES)
  backwards = probe.linear_probe(train, wrong, PROBE)
  assert backwards.held_out_top1 == probed.held_out_top1
  assert backwards.learning_rate == probed.learning_rate


def test_a_grid_equals_one_rate_at_a_time(blobs, probed):
  protocol = dataclasses.replace(PROBE, learning_rates=(0.1,))
  alone = probe.linear_probe(*blobs, protocol)
  assert alone.test_top1[0.1] == probed.test_top1[0.1]
  assert alone.held_out_top1 == {}


def linear_protocol(**changes):
  settings = {"batch_size": 30, "epochs": 4, "learning_rate": 0.5, "seed": 3}
  return dataclasses.replace(
    protocols.PROTOCOLS["linear/imsvd"], **settings | changes
  )


def crops_of(train, labels):
  """Epochs of "images" whose embedding is a feature row, moved a little."""

  def train_epoch(epoch):
    generator = np.random.default_rng(epoch)
    order = generator.permutation(len(train))
    for start in range(0, len(train), 30):
      rows = order[start : start + 30]
      noise = generator.normal(size=(30, 6)).astype(np.float32)
      yield {"image": train[rows] + 0.1 * noise, "label": labels[rows]}

  return train_epoch


@pytest.fixture(scope="module")
def trained(blobs):
  train, test = blobs
  frozen = {"scale": jnp.full(6, 2.0)}
  embed = jax.jit(lambda images: images * frozen["scale"])
  test_features = test._replace(features=2 * test.features)
  train_epoch = crops_of(*train)
  protocol = linear_protocol()
  result = linear.train_linear(
    embed, train_epoch, test_features, protocol, num_classes=NUM_CLASSES
  )
  return embed, train_epoch, test_features, protocol, result


def test_linear_protocol_equals_numpy(trained):
  _, train_epoch, test, _, result = trained
  key = jax.random.key(3)
  kernel = 0.01 * np.asarray(jax.random.normal(key, (6, NUM_CLASSES)))
  batches, rates = [], []
  for epoch in range(4):
    for batch in train_epoch(epoch):
      weights = np.ones(30, np.float32)
      batches.append((2 * batch["image"], batch["label"], weights))
      rates.append(0.5 * 0.5 * (1 + np.cos(np.pi * epoch / 4)))
  kernel, bias = reference_steps(
    kernel, np.zeros(NUM_CLASSES), batches, rates, 0.9, 1e-6
  )
  np.testing.assert_allclose(result.heads.kernel[0], kernel, atol=1e-4)
  np.testing.assert_allclose(result.heads.bias[0], bias, atol=1e-4)
  ranks = scores.class_ranks(test.features @ kernel + bias, test.labels)
  np.testing.assert_array_equal(result.history[-1], ranks)
  reported = dict(scores.epochs_headline(result.history, 0.5))
  assert reported["final"] == scores.accuracy(ranks).top1 > 0.8
  top1 = [scores.accuracy(ranks).top1 for ranks in result.history]
  assert reported["best"] == max(top1) == top1[reported["best_epoch"]]
  assert reported["train_loss"] == 0.5
  assert len(result.train_loss) == 4
  assert result.train_loss[-1] < result.train_loss[0]


def test_padding_of_a_batch_teaches_nothing(trained):
  embed, train_epoch, test, protocol, result = trained

  def padded(epoch):
    for batch in train_epoch(epoch):
      wrong = {"image": np.full((2, 6), 1e3), "label": np.zeros(2, int)}
      yield {
        "image": np.concatenate([batch["image"], wrong["image"]]),
        "label": np.concatenate([batch["label"], wrong["label"]]),
        "mask": np.arange(32) < 30,
      }

  found = linear.train_linear(
    embed, padded, test, protocol, num_classes=NUM_CLASSES
  )
  np.testing.assert_allclose(found.heads.kernel, result.heads.kernel, atol=1e-5)


def test_learning_rates_follow_the_papers():
  cosine = protocols.PROTOCOLS["linear/imsvd"]
  assert cosine.learning_rate_at(0) == 0.02
  assert cosine.learning_rate_at(50) == pytest.approx(0.01)
  assert cosine.learning_rate_at(99) == pytest.approx(
    0.02 * 0.000246719, rel=1e-3
  )
  steps = protocols.PROTOCOLS["linear/cifar"]
  found = [steps.learning_rate_at(e) for e in (0, 59, 60, 79, 80, 99)]
  assert found == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
  assert protocols.PROTOCOLS["linear/simsiam"].learning_rate_at(0) == 1.6


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"train_epoch": lambda epoch: []}, "has no batch"),
    (
      {"train_epoch": lambda epoch: [{"image": np.ones((8, 6), np.float32)}]},
      "labels from -1",
    ),
    ({"num_classes": 2}, "Test has class 2"),
    ({"protocol": linear_protocol(learning_rate=1e38)}, "diverged in epoch 0"),
  ],
)
def test_a_mistake_is_one_clear_line(trained, change, message):
  names = ("embed", "train_epoch", "test", "protocol")
  arguments = dict(zip(names, trained, strict=False)) | {
    "num_classes": NUM_CLASSES
  }
  with pytest.raises(UserError, match=message):
    linear.train_linear(**arguments | change)
