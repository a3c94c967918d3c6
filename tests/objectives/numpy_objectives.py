"""The objectives once more, in float64 NumPy, from the papers' formulas.

Each takes lists of V arrays and returns (loss, terms). They share nothing with
the package: plain loops over pairs, explicit inverses, no log-sum-exp.
"""

from functools import partial

import numpy as np


def pair_indices(num_views, num_global):
  pairs = set()
  for g in range(num_global):
    pairs |= {frozenset((g, v)) for v in range(num_views) if v != g}
  return [tuple(sorted(pair)) for pair in sorted(pairs, key=sorted)]


def over_pairs(pair_loss, num_views, num_global):
  results = [pair_loss(a, b) for a, b in pair_indices(num_views, num_global)]
  loss = np.mean([loss for loss, _ in results])
  names = results[0][1]
  return loss, {k: np.mean([terms[k] for _, terms in results]) for k in names}


def softmax(z, num_bins, temperature):
  z = np.asarray(z, np.float64) / temperature
  z = z.reshape(len(z), -1, num_bins)
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def plogp(p):
  p = p[p > 0]
  return (p * np.log(p)).sum()


def imsvd(
  zs,
  *,
  num_global,
  num_bins,
  temperature=1.0,
  diagonal_weight=1.0,
  off_diagonal_weight=1.0,
  invariance_weight=1.0,
):
  weights = diagonal_weight, off_diagonal_weight, invariance_weight

  qs = [softmax(z, num_bins, temperature) for z in zs]

  def pair(a, b):
    n, m = qs[a].shape[:2]
    p = np.tensordot(qs[a], qs[b], (0, 0)) / n  # [M, b, M, b]
    # einsum on equal indices: the diagonal entries of the diagonal blocks.
    diagonal = plogp(np.einsum("mdmd->md", p)) / m
    p_off = [p[i, :, j, :] for i in range(m) for j in range(m) if i != j]
    off_diagonal = plogp(np.array(p_off)) / (m * (m - 1))
    with np.errstate(divide="ignore"):
      invariance = -np.log((qs[a] * qs[b]).sum(-1)).mean()
    terms = {
      "diagonal": diagonal,
      "off_diagonal": off_diagonal,
      "invariance": invariance,
    }
    loss = sum(w * t for w, t in zip(weights, terms.values(), strict=True) if w)
    return loss, terms

  return over_pairs(pair, len(zs), num_global)


music = partial(imsvd, invariance_weight=0.0)


def barlow_twins(zs, *, num_global, redundancy_weight=0.0051):
  def pair(a, b):
    z1, z2 = (
      (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (zs[a], zs[b])
    )
    c = z1.T @ z2 / len(z1)
    invariance = sum((1 - c[i, i]) ** 2 for i in range(len(c)))
    redundancy = (c**2).sum() - (np.diag(c) ** 2).sum()
    terms = {"invariance": invariance, "redundancy": redundancy}
    return invariance + redundancy_weight * redundancy, terms

  return over_pairs(pair, len(zs), num_global)


def vicreg(zs, *, num_global, weights=(25.0, 25.0, 1.0)):
  def one_view(z):
    hinge = np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
    cov = np.cov(z, rowvar=False)
    return hinge, (cov[~np.eye(len(cov), dtype=bool)] ** 2).sum() / len(cov)

  def pair(a, b):
    (v1, c1), (v2, c2) = one_view(zs[a]), one_view(zs[b])
    terms = {
      "invariance": ((zs[a] - zs[b]) ** 2).mean(),
      "variance": v1 / 2 + v2 / 2,
      "covariance": c1 + c2,
    }
    return np.dot(weights, list(terms.values())), terms

  return over_pairs(pair, len(zs), num_global)


def unit(z):
  return z / np.linalg.norm(z, axis=1, keepdims=True)


def simclr(zs, *, num_global, temperature=0.1):
  def pair(a, b):
    n = len(zs[a])
    u = unit(np.concatenate([zs[a], zs[b]]))
    similarity = np.exp(u @ u.T / temperature)
    positives = similarity[np.arange(2 * n), np.roll(np.arange(2 * n), n)]
    others = similarity.sum(1) - np.diag(similarity)
    terms = {
      "alignment": -np.log(positives).mean(),
      "uniformity": np.log(others).mean(),
    }
    return -np.log(positives / others).mean(), terms

  return over_pairs(pair, len(zs), num_global)


def info_nce(z1, z2, temperature):
  similarity = np.exp(unit(z1) @ unit(z2).T / temperature)
  rows = -np.log(np.diag(similarity) / similarity.sum(1)).mean()
  columns = -np.log(np.diag(similarity) / similarity.sum(0)).mean()
  return (rows + columns) / 2


def superinfo(
  zs,
  *,
  num_global,
  noise,
  temperature=0.1,
  superfluous_weight_1=0.01,
  superfluous_weight_2=0.01,
  minimum_scale=1e-3,
):
  half = zs[0].shape[1] // 2
  means = [z[:, :half] for z in zs]
  scales = [np.log1p(np.exp(z[:, half:])) + minimum_scale for z in zs]
  samples = [m + s * e for m, s, e in zip(means, scales, noise, strict=True)]

  def kl(a, b):
    variance_a, variance_b = scales[a] ** 2, scales[b] ** 2
    squares = (variance_a + (means[a] - means[b]) ** 2) / variance_b
    return (np.log(variance_b / variance_a) + squares - 1).sum(1).mean() / 2

  def pair(a, b):
    terms = {
      "info_nce": info_nce(samples[a], samples[b], temperature),
      "superfluous_1": kl(a, b),
      "superfluous_2": kl(b, a),
    }
    weights = 1.0, superfluous_weight_1, superfluous_weight_2
    return np.dot(weights, list(terms.values())), terms

  return over_pairs(pair, len(zs), num_global)


def stein_score(z, eta=0.01, min_temperature=0.1):
  n = len(z)
  cosine = z @ z.T
  pairs = [1 - cosine[i, j] for i in range(n) for j in range(i)]
  tau = max(np.median(pairs), min_temperature)
  kernel = np.exp(cosine / tau)
  # sum_j of the gradient of k(z_i, z_j) with respect to z_j.
  g = np.stack(
    [sum(kernel[i, j] * z[i] / tau for j in range(n)) for i in range(n)]
  )
  return -np.linalg.inv(kernel + eta * np.eye(n)) @ g


def mveb(zs, *, targets, scores, num_global, group_size, weight=0.01):
  del group_size  # In the scores already.
  zs, targets = [unit(z) for z in zs], [unit(t) for t in targets]
  alignment, surrogate = [], []
  for view, (z, s) in enumerate(zip(zs, scores, strict=True)):
    partners = [t for i, t in enumerate(targets) if i != view]
    alignment.append(np.mean([(z * t).sum(1).mean() for t in partners]))
    surrogate.append(-(s * z).sum(1).mean())
  terms = {
    "alignment": np.mean(alignment),
    "entropy_surrogate": np.mean(surrogate),
  }
  assert len(targets) == num_global
  return -terms["alignment"] - weight * terms["entropy_surrogate"], terms


def mveb_scores(zs, group_size):
  scores = []
  for z in zs:
    groups = np.split(unit(z), len(z) // group_size)
    scores.append(np.concatenate([stein_score(g) for g in groups]))
  return scores
