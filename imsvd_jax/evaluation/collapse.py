"""How much of its space an embedding uses, measured without labels.

Two families: numbers for any embedding (RankMe, LiDAR, alignment, uniformity)
and statistics of discrete codes, where every image is M variables of b bins.
All logarithms are natural, so entropies and informations are in nats.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import special

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import input_checks, protocols
from imsvd_jax.evaluation.inputs import Evaluator, Inputs

NEEDS = ("sample", "embeddings", "view_groups", "codes")


def run(
  inputs: Inputs, protocol: protocols.Collapse
) -> Iterator[tuple[str, float | Exception]]:
  """Yields the numbers that the inputs allow; at least one must be given.

  RankMe of the backbone's features needs `sample`; RankMe of the embeddings,
  alignment and uniformity need `embeddings`; LiDAR needs `view_groups`; the
  statistics of codes need `codes`. The entropy of each variable is
  "codes/variable/0/entropy" and so on. A number that cannot be computed is
  yielded as its exception.

  Raises:
    Exception: No number can be computed; the first one's.
  """
  if all(getattr(inputs, name) is None for name in NEEDS):
    inputs.need(*NEEDS)
  found: dict[str, float | Exception] = {}
  for name, compute in _measurements(inputs, protocol).items():
    try:
      # A diverged encoder overflows; what follows from it says so itself.
      with np.errstate(all="ignore"):
        numbers = compute()
    except Exception as error:
      found[name] = error
    else:
      found |= numbers if isinstance(numbers, dict) else {name: numbers}
  failures = [v for v in found.values() if isinstance(v, Exception)]
  if len(failures) == len(found):
    raise failures[0]
  yield from found.items()


def _measurements(
  inputs: Inputs, protocol: protocols.Collapse
) -> dict[str, Callable[[], float | dict[str, float]]]:
  """Returns the measurements by name; one that fails does not end another."""
  sample, views = inputs.sample, inputs.embeddings
  groups, codes = inputs.view_groups, inputs.codes
  found: dict[str, Callable[[], float | dict[str, float]]] = {}
  if sample is not None:
    features = sample.features
    found["rank_me/features"] = lambda: rank_me(_some(features, protocol))
  if views is not None:
    first = views[:, 0]
    found["rank_me/embeddings"] = lambda: rank_me(_some(first, protocol))
    if views.shape[1] > 1:
      found["alignment"] = lambda: alignment(first, views[:, 1])
    found["uniformity"] = lambda: uniformity(_some(first, protocol))
  if groups is not None:
    found["lidar"] = lambda: lidar(groups, delta=protocol.lidar_delta)
  if codes is not None:
    found["codes"] = lambda: _code_numbers(codes, protocol)
  return found


def _code_numbers(
  codes: np.ndarray, protocol: protocols.Collapse
) -> dict[str, float]:
  statistics = code_statistics(
    codes, saturated_share=protocol.saturated_share, seed=protocol.seed
  )
  numbers = {f"codes/{k}": v for k, v in statistics.summary().items()}
  for m, entropy in enumerate(statistics.entropies.tolist()):
    numbers[f"codes/variable/{m}/entropy"] = entropy
  return numbers


def rank_me(features: np.ndarray) -> float:
  """Returns RankMe: the effective number of dimensions of an embedding.

    p_k = sigma_k / sum_j sigma_j + 1e-7,   RankMe = exp(-sum_k p_k log p_k)

  with sigma the singular values of the features [N, F] (not centered). The
  value is meaningful for N well above F.
  """
  features = input_checks.check_features(features, "embedding")
  features = features.astype(np.float64)
  # The smaller Gram matrix in float64: as exact as a float32 decomposition of
  # the features themselves, and much cheaper.
  if features.shape[0] < features.shape[1]:
    features = features.T
  eigenvalues = np.linalg.eigvalsh(features.T @ features)
  return _effective_rank(np.sqrt(np.maximum(eigenvalues, 0)))


def _effective_rank(values: np.ndarray) -> float:
  """Returns exp(entropy) of values scaled to sum to one; 0 if all are 0."""
  total = values.sum()
  if total <= 0:
    return 0.0
  p = values / total + 1e-7  # Keeps the logarithm finite.
  return float(np.exp(-(p * np.log(p)).sum()))


def lidar(views: np.ndarray, *, delta: float = 1e-4) -> float:
  """Returns LiDAR: the rank of what tells images apart, not of what varies.

    mu_x   = mean of the views of image x,   mu = mean of all mu_x
    S_b    = mean_x (mu_x - mu)(mu_x - mu)^T
    S_w    = mean_{x, v} (z_xv - mu_x)(z_xv - mu_x)^T + delta I
    LiDAR  = exp(entropy(lambda / sum lambda + 1e-7)),
             lambda = eigenvalues of S_w^{-1/2} S_b S_w^{-1/2}

  Args:
    views: [N, V, D]: V augmented views of each of N images. The groups must be
      true views of one image; the paper takes N = 1000 and V = 50.
    delta: Ridge of the within-image covariance.
  """
  views = _checked_views(views)
  means = views.mean(axis=1, dtype=np.float64)  # [N, D]
  centered = means - means.mean(axis=0)
  if views.shape[0] * views.shape[1] < views.shape[2]:
    eigenvalues = _lidar_of_few(views, means, centered, delta)
    return _effective_rank(np.maximum(eigenvalues, 0))
  within = np.zeros((views.shape[2], views.shape[2]))
  for start in range(0, len(views), 64):  # A float64 copy of all is too large.
    block = views[start : start + 64] - means[start : start + 64, None]
    block = block.reshape(-1, views.shape[2])
    within += block.T @ block
  within /= views.shape[0] * views.shape[1]
  within += delta * np.eye(len(within))
  values, vectors = np.linalg.eigh(within)
  # The nonzero eigenvalues are the squared singular values of the whitened
  # means, which never forms the ill-conditioned product.
  whitened = centered @ (vectors / np.sqrt(values))  # [N, D]
  if len(whitened) < whitened.shape[1]:
    whitened = whitened.T
  eigenvalues = np.linalg.eigvalsh(whitened.T @ whitened)
  return _effective_rank(np.maximum(eigenvalues, 0))


def _lidar_of_few(
  views: np.ndarray, means: np.ndarray, centered: np.ndarray, delta: float
) -> np.ndarray:
  """LiDAR's nonzero eigenvalues where there are fewer views than dimensions.

  With A [N V, D] the deviations of the views from their mean over sqrt(N V),
  S_w^{-1} = (I - A^T (delta I + A A^T)^{-1} A) / delta, so that all matrices
  are of images and views and none is D x D.
  """
  deviations = (views - means[:, None]).reshape(-1, views.shape[2])
  deviations /= np.sqrt(len(deviations))
  gram = deviations @ deviations.T + delta * np.eye(len(deviations))
  mixed = deviations @ centered.T  # [N V, N]
  inner = centered @ centered.T - mixed.T @ np.linalg.solve(gram, mixed)
  return np.linalg.eigvalsh(inner / delta)


def alignment(first: np.ndarray, second: np.ndarray) -> float:
  """Returns the mean squared distance of two views of an image, 0 to 4.

  The embeddings [N, D] of both views are L2-normalized here.
  """
  first, second = input_checks.check_pair(first, second)
  difference = _normalized(first) - _normalized(second)
  return float((difference**2).sum(axis=1).mean())


def uniformity(features: np.ndarray) -> float:
  """Returns log mean exp(-2 |x - y|^2) over pairs of different images.

  0 when collapsed; about -4 when spread evenly in many dimensions. The features
  [N, D], N at least 2, are L2-normalized here; zeros stay zero, and are at
  distance 0 from each other.
  """
  features = _normalized(input_checks.check_features(features, "embedding"))
  count = len(features)
  if count < 2:
    raise UserError("Uniformity of one image; expected two or more.")
  total = 0.0
  squares = (features.any(axis=1)).astype(features.dtype)  # Of the lengths.
  for start in range(0, count, 1024):
    some = slice(start, start + 1024)
    distances = squares[some, None] + squares - 2 * features[some] @ features.T
    potential = np.exp(-2 * np.maximum(distances, 0))
    rows = np.arange(len(potential))
    potential[rows, start + rows] = 0  # An image is no pair with itself.
    total += potential.sum(dtype=np.float64)
  return float(np.log(total / (count * (count - 1))))


class CodeStatistics(NamedTuple):
  """What the discrete codes of N images look like; nats, M variables, b bins.

  Bins are those of largest probability, unless "soft" is said.
  """

  counts: np.ndarray  # int64 [M, b], images per bin
  entropies: np.ndarray  # [M], Miller-Madow
  soft_entropies: np.ndarray  # [M], of the mean probabilities
  confidence: float  # mean largest probability
  mutual_information: np.ndarray  # [M, M], Miller-Madow; diagonal: entropies
  shuffled_information: float  # the same, mean over pairs, of shuffled images
  agreement: float | None  # share of variables equal in two views
  soft_agreement: float | None  # mean_im sum_d q'(d) q''(d)
  kappa: float | None  # agreement beyond chance, 1 is perfect
  saturated_share: float  # of the images in one bin, above which it counts

  def dead_bins(self) -> np.ndarray:
    """Returns bool [M, b]: no image falls there."""
    return self.counts == 0

  def saturated_bins(self) -> np.ndarray:
    """Returns bool [M, b]: nearly all images fall there."""
    share = self.counts / self.counts.sum(axis=1, keepdims=True)
    return share >= self.saturated_share

  def summary(self) -> dict[str, float]:
    """Returns the numbers to log."""
    pairs: np.ndarray = ~np.eye(len(self.entropies), dtype=bool)
    information = self.mutual_information[pairs]
    result = {
      "entropy_mean": self.entropies.mean(),
      "entropy_min": self.entropies.min(),
      "soft_entropy_mean": self.soft_entropies.mean(),
      "entropy_limit": np.log(self.counts.shape[1]),
      "confidence": self.confidence,
      "dead_bins": self.dead_bins().mean(),
      "saturated_bins": self.saturated_bins().sum(),
      "agreement": self.agreement,
      "soft_agreement": self.soft_agreement,
      "kappa": self.kappa,
    }
    if information.size:
      result |= {
        "mutual_information_mean": information.mean(),
        "mutual_information_max": information.max(),
        "mutual_information_shuffled": self.shuffled_information,
      }
    return {k: float(v) for k, v in result.items() if v is not None}


def code_statistics(
  codes: np.ndarray, *, saturated_share: float = 0.9, seed: int = 0
) -> CodeStatistics:
  """Returns the statistics of discrete codes.

  Args:
    codes: float [N, V, M, b]: probabilities over the b bins of M variables for
      V views of N images. Agreement compares the first two views; everything
      else is of the first.
    saturated_share: See `CodeStatistics`.
    seed: Shuffles the images for the mutual information of unrelated variables.
  """
  codes = _checked_codes(codes)
  num_images, num_views, _, num_bins = codes.shape
  bins = codes.argmax(axis=-1)  # [N, V, M]
  counts = bin_counts(bins[:, 0], num_bins)
  information = mutual_information(bins[:, 0], num_bins)
  generator = np.random.default_rng(seed)
  shuffled = generator.permuted(bins[:, 0], axis=0)  # each variable by itself
  pairs: np.ndarray = ~np.eye(len(counts), dtype=bool)
  unrelated = mutual_information(shuffled, num_bins)[pairs]
  soft = codes[:, 0].mean(axis=0, dtype=np.float64)  # [M, b]
  agreement = soft_agreement = kappa = None
  if num_views > 1:
    agreement = float((bins[:, 0] == bins[:, 1]).mean())
    soft_agreement = float(
      np.einsum("nmd,nmd->", codes[:, 0], codes[:, 1], dtype=np.float64)
      / (num_images * len(counts))
    )
    kappa = _kappa(agreement, counts, bin_counts(bins[:, 1], num_bins))
  return CodeStatistics(
    counts=counts,
    entropies=miller_madow_entropy(counts),
    soft_entropies=special.entr(soft).sum(axis=-1),
    confidence=float(codes[:, 0].max(axis=-1).mean(dtype=np.float64)),
    mutual_information=information,
    shuffled_information=float(unrelated.mean()) if unrelated.size else 0.0,
    agreement=agreement,
    soft_agreement=soft_agreement,
    kappa=kappa,
    saturated_share=saturated_share,
  )


def bin_counts(bins: np.ndarray, num_bins: int) -> np.ndarray:
  """Counts images per bin: int [N, M] of bins to int64 [M, b]."""
  num_variables = bins.shape[1]
  cells = bins + num_bins * np.arange(num_variables)
  counts = np.bincount(cells.ravel(), minlength=num_variables * num_bins)
  return counts.reshape(num_variables, num_bins)


def miller_madow_entropy(counts: np.ndarray) -> np.ndarray:
  """Returns entropies in nats, corrected for the finite sample.

    H = -sum p log p + (K - 1) / (2 N),   K the number of cells that occur

  The plug-in entropy alone is too low by about (K - 1) / (2 N). The last axis
  of `counts` [..., K] is one distribution.
  """
  total = counts.sum(axis=-1)
  occupied = (counts > 0).sum(axis=-1)
  plug_in = special.entr(counts / total[..., None]).sum(axis=-1)
  return plug_in + (occupied - 1) / (2 * total)


def mutual_information(bins: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns I(m1; m2) in nats between the variables of a code, [M, M].

    I = H(m1) + H(m2) - H(m1, m2),   each entropy after Miller and Madow

  The plug-in value of independent variables is about (b - 1)^2 / (2 N), not 0;
  the correction removes that while N is well above b^2. Below, cells that never
  occurred hide and the value stays too high: compare with the value of shuffled
  images, which is exactly what unrelated variables would give. Corrected values
  can be slightly negative. The diagonal holds the entropies. `bins` are int
  [N, M], each below `num_bins` (b).
  """
  num_variables = bins.shape[1]
  bins = np.ascontiguousarray(bins.T)  # [M, N]
  entropies = miller_madow_entropy(bin_counts(bins.T, num_bins))
  result = np.diag(entropies)
  for m in range(num_variables - 1):
    # All pairs (m, later) at once: one histogram of b^2 cells for each.
    later = num_variables - m - 1
    cells = bins[m] * num_bins + bins[m + 1 :]  # [later, N]
    cells += num_bins**2 * np.arange(later)[:, None]
    joint = np.bincount(cells.ravel(), minlength=later * num_bins**2)
    joint = miller_madow_entropy(joint.reshape(later, -1))
    values = entropies[m] + entropies[m + 1 :] - joint
    result[m, m + 1 :] = result[m + 1 :, m] = values
  return result


def _kappa(
  agreement: float, first: np.ndarray, second: np.ndarray
) -> float | None:
  """Returns (agreement - chance) / (1 - chance), chance from the marginals."""
  p, q = (x / x.sum(axis=1, keepdims=True) for x in (first, second))
  chance = float((p * q).sum(axis=1).mean())
  return None if chance >= 1 else (agreement - chance) / (1 - chance)


def _normalized(features: np.ndarray) -> np.ndarray:
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.where(norms > 0, norms, 1)


def _some(features: np.ndarray, protocol: protocols.Collapse) -> np.ndarray:
  """Returns at most `max_images` rows, chosen by the protocol's seed."""
  if len(features) <= protocol.max_images:
    return features
  generator = np.random.default_rng(protocol.seed)
  chosen = generator.choice(len(features), protocol.max_images, replace=False)
  return features[np.sort(chosen)]


def _checked_views(views: np.ndarray) -> np.ndarray:
  views = np.asarray(views)
  if views.ndim != 3 or views.shape[0] < 2 or views.shape[1] < 2:
    raise UserError(
      f"LiDAR of embeddings of shape {views.shape}; expected [N, V, D] with at "
      "least two images and two views of each."
    )
  input_checks.check_features(views.reshape(len(views), -1), "view")
  return views


def _checked_codes(codes: np.ndarray) -> np.ndarray:
  codes = np.asarray(codes, np.float32)
  if codes.ndim != 4 or not codes.size:
    raise UserError(
      f"Codes of shape {codes.shape}; expected [N, V, M, b]: images, views, "
      "variables, bins."
    )
  input_checks.check_features(codes.reshape(len(codes), -1), "code")
  if np.abs(codes.sum(axis=-1) - 1).max() > 1e-3:
    raise UserError(
      "Codes do not sum to 1 over their bins; expected probabilities: pass the "
      "softmax, not the logits."
    )
  return codes


EVALUATOR = Evaluator(run, NEEDS, labels=False)
