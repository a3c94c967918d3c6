"""All numbers of an explanation, pass by pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, information, patch_codes, probes
from imsvd_jax.explain import captions as captions_lib
from imsvd_jax.explain import factors as factors_lib
from imsvd_jax.explain import sums as sums_lib
from imsvd_jax.explain.analysis import (
  Analysis,
  Code,
  FactorScores,
  Patches,
  Views,
)
from imsvd_jax.explain.explain_options import ExplainOptions
from imsvd_jax.explain.factors import Factor
from imsvd_jax.explain.images import (
  Batches,
  Images,
  TwoViews,
  as_shown,
  only,
  padded_batches,
  some_of,
)
from imsvd_jax.explain.interventions import Interventions, intervene
from imsvd_jax.explain.scan import scan
from imsvd_jax.explain.subject import Subject

NUM_MASKED = 2048  # Images whose patches are compared with their objects.
MAX_CAPTION_IMAGES = 20_000  # Of which half choose names, and half confirm.
_BLOCK = 256  # Drawings that are encoded together.
NUM_EXAMPLES = 6  # Images that are shown with their two views.


def analyze(
  subject: Subject,
  images: Images,
  options: ExplainOptions | None = None,
  *,
  untrained: Subject | None = None,
  key: jax.Array | None = None,
  mesh: Mesh | None = None,
  report: Callable[[str], None] = console.print_line,
) -> Analysis:
  """Streams over a data set: once, and once more for each further comparison.

  Args:
    untrained: The same encoder with random weights: where factors are known,
      what its variables tell of them is measured too.
    key: Random key of the single augmentations.
    mesh: Devices, along axis "data"; by default all local ones.

  Raises:
    UserError: The data set or the encoder's outputs do not fit, or there is
      more than one process.
  """
  if jax.process_count() > 1:
    raise UserError(
      f"The analysis runs in one process; found {jax.process_count()}. Run it "
      "on one host: it uses all devices of that host."
    )
  options = options or ExplainOptions()
  if not options.untrained:
    untrained = None
  common: dict[str, Any] = {
    "mesh": mesh or devices.make_mesh(jax.local_devices()),
    "report": report,
  }
  found, labels = scan(
    subject, images, num_top=options.num_top, joint=options.joint, **common
  )
  factors = factors_lib.known_factors(
    found.indices, labels, images.factors, images.label_names
  )
  found = dataclasses.replace(found, factors=factors)
  if found.code is None:
    return found
  return dataclasses.replace(
    found,
    interventions=_interventions(
      subject, images, options.max_flip_images, report
    ),
    captions=_captions(found, found.code, factors, images),
    scores=_scores(found.code, factors, untrained, images, common),
    views=_views(subject, images, found, options, common),
    patches=_patches(subject, untrained, images, found.code, common),
    edits=_edits(
      subject, images, found, options.max_flip_images, key=key, **common
    ),
  )


def _scores(
  code: Code,
  factors: tuple[Factor, ...],
  untrained: Subject | None,
  images: Images,
  common: dict[str, Any],
) -> FactorScores | None:
  """Measures what variables tell of the factors, trained and untrained."""
  if not factors:
    return None
  scores = score_factors(code, factors)
  if untrained is None:
    return scores
  random, _ = scan(
    untrained,
    images,
    num_top=1,
    joint=False,
    covariance=False,
    sample_size=1,
    what="random weights",
    **common,
  )
  if random.code is None:
    raise UserError("The encoder with random weights has no discrete code.")
  return dataclasses.replace(
    scores, nmi_untrained=score_factors(random.code, factors).nmi
  )


def _patches(
  subject: Subject,
  untrained: Subject | None,
  images: Images,
  code: Code,
  common: dict[str, Any],
) -> Patches | None:
  """Compares patch codes with the masks of objects, where they are known."""
  if images.masked is None or subject.patch_codes is None:
    return None
  count = min(NUM_MASKED, images.count or NUM_MASKED)
  found, random = (
    None
    if one is None
    else patch_codes.measure(
      one,
      images.masked(count),
      code.marginal.shape,
      count=count,
      what=what,
      **common,
    )
    for one, what in ((subject, "patches"), (untrained, "random weights"))
  )
  assert found is not None
  if random is None:
    return found
  return dataclasses.replace(found, patch_iou_untrained=random.patch_iou)


def score_factors(code: Code, factors: tuple[Factor, ...]) -> FactorScores:
  """Returns the class histograms and the NMI of every variable and factor."""
  counts = {factor.name: _class_counts(code, factor) for factor in factors}
  nmi, chance = (
    np.array([[score(c) for c in table] for table in counts.values()]).T
    for score in (
      information.normalized_mutual_information,
      information.chance_normalized_mutual_information,
    )
  )
  return FactorScores(class_counts=counts, nmi=nmi, nmi_chance=chance)


def _class_counts(code: Code, factor: Factor) -> np.ndarray:
  """Returns [M, b, K] images by most probable bin and value of the factor."""
  known = factor.values >= 0
  values, codes = factor.values[known], code.codes[known]
  return np.stack(
    [
      information.contingency(
        codes[:, m], values, code.num_bins, len(factor.names)
      )
      for m in range(code.num_variables)
    ]
  )


def _captions(
  found: Analysis, code: Code, factors: tuple[Factor, ...], images: Images
) -> captions_lib.Captions:
  """Names bins by the factors and by what pixels tell, on some images."""
  count = min(MAX_CAPTION_IMAGES, found.num_images)
  indices, facts = [], []
  for batch in _some_images(images, found, count):
    mask = np.asarray(batch.get("mask", np.ones(len(batch["index"]), bool)))
    indices.append(np.asarray(batch["index"], np.int64)[mask])
    facts.append(captions_lib.pixel_facts(np.asarray(batch["image"])[mask]))
  chosen = np.concatenate(indices)
  rows = found.rows(chosen)
  known = [factor._replace(values=factor.values[rows]) for factor in factors]
  for name in facts[0]:
    values = np.concatenate([fact[name] for fact in facts])
    known.append(factors_lib.make_factor(name, values))
  return captions_lib.name_bins(code.codes[rows], code.num_bins, known, chosen)


def _interventions(
  subject: Subject,
  images: Images,
  max_images: int,
  report: Callable[[str], None],
) -> Interventions | None:
  """Changes one factor at a time where images are drawn from factors."""
  drawing = images.drawing
  if drawing is None or not max_images:
    return None
  encode = jax.jit(subject.encode)

  def codes_of(pixels: np.ndarray) -> np.ndarray:
    blocks = []
    for start in range(0, len(pixels), _BLOCK):
      block = pixels[start : start + _BLOCK]
      padding = [(0, _BLOCK - len(block))] + [(0, 0)] * (pixels.ndim - 1)
      q = encode(subject.variables, np.pad(block, padding)).probabilities
      blocks.append(np.asarray(q)[: len(block)].argmax(axis=-1))
      meter.add(len(block))
    return np.concatenate(blocks)

  factors = drawing.factors[:max_images]
  # As they are, and once for each factor, less what happens not to change.
  most = len(factors) * (1 + len(set(drawing.names)))
  meter = console.Progress("changes of a factor", most, report=report)
  return intervene(codes_of, drawing.draw, factors, drawing.names)


def _some_images(images: Images, found: Analysis, count: int) -> Batches:
  """Returns batches of images from everywhere in the data set."""
  if images.some is not None:
    return images.some(count)
  return only(images.batches(), some_of(found.indices, count))


def _views(
  subject: Subject,
  images: Images,
  found: Analysis,
  options: ExplainOptions,
  common: dict[str, Any],
) -> Views | None:
  if images.views is None or found.code is None or not options.two_views:
    return None
  return compare_views(
    subject,
    images.views,
    found.code.marginal.shape,
    examples=some_of(found.features.sample_indices, NUM_EXAMPLES),
    joint=options.joint,
    count=len(found.indices),
    **common,
  )


def compare_views(
  subject: Subject,
  views: TwoViews,
  shape: tuple[int, int],
  *,
  examples: np.ndarray,
  mesh: Mesh,
  joint: bool = True,
  count: int | None = None,
  report: Callable[[str], None] = console.print_line,
) -> Views:
  """Streams over two views of every image once, for a code of shape (M, b).

  Keeps the images of ascending indices `examples` [n] with their views. `joint`
  says whether to measure the D x D cross-joint matrix.

  Raises:
    UserError: There are no views.
  """
  view_pass = accumulate.view_pass(
    subject.encode, views.augment, shape, mesh=mesh, joint=joint
  )
  variables = jax.device_put(subject.variables, devices.replicated(mesh))
  meter = console.Progress("views", count, report=report)
  sums = view_pass.start()
  crops: dict[int, np.ndarray] = {}
  for batch in padded_batches(views.crops(), mesh.size):
    sums, _ = view_pass.step(variables, sums, batch)
    for row in np.flatnonzero(np.isin(batch["index"], examples)):
      crops[int(batch["index"][row])] = batch["views"][row]
    meter.add(int(sums.count) - meter.done)  # Waits for the devices.
  missing = [int(i) for i in examples if int(i) not in crops]
  if missing or not meter.done:
    raise UserError(
      f"Found no views of image {missing[0] if missing else 0}; give two views"
      " of every image of the data set."
    )
  meter.finish()
  return Views(
    **_view_numbers(sums, shape),
    **_view_examples(subject, views, {int(i): crops[int(i)] for i in examples}),
  )


def _view_numbers(
  sums: accumulate.ViewSums, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
  num_variables, num_bins = shape
  count = int(sums.count)
  numbers = {
    "agreement": sums.agreement.value() / count,
    "soft_agreement": sums.soft_agreement.value() / count,
  }
  if sums.cross_joint is not None:
    cross_joint = sums_lib.mean_matrix(
      sums.cross_joint, num_variables * num_bins, count
    )
    numbers["cross_joint"] = cross_joint
    numbers["cross_mutual_information"] = information.mutual_information(
      cross_joint, num_bins
    )
  return numbers


def _view_examples(
  subject: Subject, views: TwoViews, crops: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
  """Augments a few images as the pass did, and encodes both views."""
  indices = np.array(list(crops), np.int64)
  stacked = np.stack(list(crops.values()))
  pixels = jax.jit(views.augment)(stacked, indices.astype(np.int32))
  encode = jax.jit(subject.encode)
  codes = [encode(subject.variables, x).probabilities for x in pixels]
  return {
    "example_indices": indices,
    "example_views": as_shown(np.asarray(pixels)).swapaxes(0, 1),
    "example_probabilities": np.stack([np.asarray(q) for q in codes], 1),
  }


def _edits(
  subject: Subject,
  images: Images,
  found: Analysis,
  max_images: int,
  **options: Any,
) -> Interventions | None:
  """Makes single edits of some images."""
  count = min(max_images, len(found.indices))
  if not count:
    return None
  some = _some_images(images, found, count)
  return probes.measure(subject, some, num_images=count, **options)
