"""Draws the pictures of concepts.md: `python docs/pictures.py`."""

import pathlib

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from imsvd_jax.objectives import (
  joint_probability,
  off_diagonal_floor,
  soft_discretize,
)

IMAGES = pathlib.Path(__file__).parent / "images"
BLUE, ORANGE, GRAY = "#3b6fb6", "#d9822b", "#8a8a8a"
mpl.rcParams.update(
  {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "imsvd_jax",  # The same picture is the same file.
    "savefig.facecolor": "white",  # Readable on a dark page too.
  }
)


def code() -> plt.Figure:
  """An embedding of 12 entries, and its three soft variables of four bins."""
  z = np.float32([[2.2, 0.1, -1, 0.4, 0.3, 0.2, 2.9, -0.6, 1, 0.8, -0.4, 0.9]])
  q = np.asarray(soft_discretize(z, num_bins=4))[0]
  figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), sharex=True)
  colors = np.repeat([BLUE, ORANGE, GRAY], 4)
  places = np.arange(12) + np.repeat([0, 1, 2], 4)
  left.bar(places, z[0], color=colors)
  left.axhline(0, color="black", linewidth=0.8)
  left.set(title="the embedding z of one image", ylabel="value")
  right.bar(places, q.reshape(-1), color=colors)
  right.set(title="its code q: a softmax for each variable", ylim=(0, 1))
  right.set_ylabel("probability")
  for axis in (left, right):
    axis.set_xticks(places, 3 * ["0", "1", "2", "3"])
    axis.set_xlabel("bin of variable 0, 1 and 2")
  return figure


def matrices() -> plt.Figure:
  """Cross-joint matrices of a collapsed, a redundant and an ideal code."""
  rng = np.random.default_rng(0)
  n, variables, bins = 4096, 3, 4
  free = rng.integers(bins, size=(n, variables))
  codes = {
    "collapsed": np.zeros_like(free),
    "redundant": np.repeat(free[:, :1], 3, axis=1),
    "views disagree": (free, rng.integers(bins, size=free.shape)),
    "ideal": free,
  }
  figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
  for axis, (title, code) in zip(axes, codes.items(), strict=True):
    views = code if isinstance(code, tuple) else (code, code)
    one_hot = [np.eye(bins, dtype=np.float32)[view] for view in views]
    joint = np.asarray(joint_probability(*one_hot))
    joint = joint.reshape(variables * bins, -1)
    axis.imshow(joint, cmap="Blues", vmin=0, vmax=1 / bins)
    for edge in (3.5, 7.5):
      axis.axhline(edge, color="black", linewidth=0.8)
      axis.axvline(edge, color="black", linewidth=0.8)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([1.5, 5.5, 9.5], ["0", "1", "2"])
    axis.set_yticks([1.5, 5.5, 9.5], ["0", "1", "2"])
    axis.set_xlabel("variable, view 2")
  axes[0].set_ylabel("variable, view 1")
  return figure


def floor() -> plt.Figure:
  """How much a batch of N images underestimates the entropy of a pair."""
  rng = np.random.default_rng(0)
  sizes = 2 ** np.arange(5, 14)
  figure, axis = plt.subplots(figsize=(5.6, 3.4))
  for bins, color in ((8, GRAY), (16, BLUE), (80, ORANGE)):
    ideal = 2 * np.log(bins)
    exact = [ideal + off_diagonal_floor(bins, int(n)) for n in sizes]
    axis.plot(sizes, exact, color=color, label=f"{bins} bins")
    drawn = [_entropy(rng.integers(bins, size=(2, n)), bins) for n in sizes]
    axis.plot(sizes, ideal - np.asarray(drawn), "o", color=color, markersize=4)
  axis.set_xscale("log", base=2)
  axis.set(
    xlabel="images in the batch",
    ylabel="entropy that is missing, nats",
    title="two independent variables look dependent",
  )
  axis.legend(title="line: the floor\ndots: one batch", frameon=False)
  return figure


def _entropy(pair: np.ndarray, bins: int) -> float:
  """Entropy in nats of the cells that a batch of two codes falls into."""
  counts = np.bincount(pair[0] * bins + pair[1])
  p = counts[counts > 0] / counts.sum()
  return float(-np.sum(p * np.log(p)))


if __name__ == "__main__":
  for draw in (code, matrices, floor):
    figure = draw()
    figure.savefig(
      IMAGES / f"{draw.__name__}.svg",
      bbox_inches="tight",
      metadata={"Date": None},
    )
