"""The explorer at the size of the paper: 102 variables of 80 bins.

  pytest -m slow -s tests/explain/test_scale.py

Synthetic codes of 50,000 images; prints size on disk, load time and, for each
interaction, how long the page's thread computes and how long it does not draw.
"""

import time

import numpy as np
import pytest

from imsvd_jax.explain import (
  analysis,
  factors,
  illustrations,
  information,
  interventions,
)
from imsvd_jax.explain.explorer import writer
from imsvd_jax.explain.subject import Subject
from tests.explain import chromium, shapes_subject

N, M, BINS, TOP = 50_000, 102, 80, 12


def synthetic_analysis():
  """Codes of which each variable follows a hidden class half of the time."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 1000, N).astype(np.int32)
  table = rng.integers(0, BINS, (1000, M)).astype(np.uint8)
  codes = rng.integers(0, BINS, (N, M)).astype(np.uint8)
  follows = rng.random((N, M), np.float32) < 0.5
  codes = np.where(follows, table[label], codes)
  usage = np.stack([np.bincount(codes[:, m], minlength=BINS) for m in range(M)])
  joint = np.empty((M * BINS, M * BINS), np.float32)
  for m in range(M):
    for n in range(M):
      block = information.contingency(codes[:, m], codes[:, n], BINS, BINS)
      rows, columns = slice(m * BINS, (m + 1) * BINS), slice(n * BINS, None)
      joint[rows, columns][:, :BINS] = block / N
  features = rng.normal(size=(2000, 64)).astype(np.float32)
  factor = factors.make_factor("label", label)
  counts = np.stack(
    [information.contingency(codes[:, m], label, BINS, 1000) for m in range(M)]
  )
  return analysis.Analysis(
    indices=np.arange(N),
    features=analysis.Features(
      feature_mean=np.zeros(64),
      feature_covariance=np.cov(features.T),
      sample_indices=np.sort(rng.choice(N, 2000, replace=False)),
      sample_features=features,
    ),
    code=analysis.Code(
      codes=codes,
      usage=usage,
      marginal=usage / N,
      conditional_entropy=np.full(M, 0.3),
      confidence=np.full(M, 0.9),
      top_scores=np.ones((M, BINS, TOP), np.float32),
      top_indices=rng.integers(0, N, (M, BINS, TOP)),
    ),
    pairs=analysis.Pairs(
      joint=joint,
      mutual_information=information.mutual_information(joint, BINS),
      floor=information.mutual_information_floor(joint, BINS, N),
    ),
    factors=(factor,),
    scores=analysis.FactorScores(
      class_counts={"label": counts},
      nmi=np.full((M, 1), 0.3),
      nmi_chance=np.full((M, 1), 0.1),
    ),
    edits=interventions.Interventions(
      tuple(f"edit {k}" for k in range(13)),
      np.full(13, 2048),
      rng.random((13, M)),
      (),
    ),
  )


def write_sprites(root):
  images = shapes_subject.render(np.arange(500), 64)[0]
  sheets = illustrations.SheetWriter(root / "sprites", np.arange(N), 64)
  for start in range(0, N, 500):
    sheets.add(np.arange(start, start + 500), images)
  sheets.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  chromium.require()
  root = tmp_path_factory.mktemp("large")
  rng = np.random.default_rng(1)
  write_sprites(root)
  pictures = illustrations.Illustrations(
    np.arange(N),
    64,
    grad_cam=rng.integers(0, 256, (M, BINS, TOP, 7, 7)).astype(np.uint8),
    integrated=rng.integers(0, 256, (M, BINS, 2, 32, 32)).astype(np.uint8),
  )
  start = time.monotonic()
  index = writer.build(
    root,
    Subject(encode=None, name="large", objective="IMSVD"),
    synthetic_analysis(),
    pictures,
    names=lambda i: f"train/n{i % 1000:08d}/image_{i}.JPEG",
  )
  print(f"\nwritten in {time.monotonic() - start:.0f} s")
  for part in ("data", "sprites"):
    size = sum(p.stat().st_size for p in (root / part).iterdir())
    print(f"{part}: {size / 1e6:.0f} MB")
  return index


# Between two frames the page drew nothing: the longest such gap is what a
# person feels.
WATCH = """
window.gaps = []; let last = performance.now();
const tick = (now) => { window.gaps.push(now - last); last = now;
  requestAnimationFrame(tick); };
requestAnimationFrame(tick);
"""


class Watched:
  """Measures interactions in a browser."""

  def __init__(self, browser):
    self.browser = browser
    # Processor time: what else the machine does is not the page's.
    browser.devtools("Performance.enable", timeDomain="threadTicks")
    browser.script(WATCH)

  def computed(self):
    """Seconds that the page's thread has computed."""
    metrics = self.browser.devtools("Performance.getMetrics")["metrics"]
    return {m["name"]: m["value"] for m in metrics}["TaskDuration"]

  def measure(self, name, act, argument, until="true"):
    browser = self.browser
    time.sleep(0.5)
    browser.script("window.gaps.length = 0")
    before, start = self.computed(), time.monotonic()
    act(argument)
    browser.wait(until)
    took = time.monotonic() - start
    time.sleep(0.3)
    busy = self.computed() - before
    gap = browser.value("Math.max(...window.gaps)") / 1000
    print(f"{name}: {took:.2f} s, computes {busy:.2f}, longest pause {gap:.2f}")
    assert busy < 1, name


@pytest.mark.slow
def test_large_explorer_does_not_freeze(page):
  with chromium.Browser() as browser:
    start = time.monotonic()
    browser.open(page)
    print(f"opened in {time.monotonic() - start:.2f} s")
    watched = Watched(browser)
    input_of = (
      "const i = document.getElementById('image-search'); i.value = "
      "'n00000123'; i.dispatchEvent(new Event('input'))"
    )
    found = (
      "document.querySelector('main [role=status]').textContent"
      f".startsWith('{N // 1000} of')"
    )
    wheel = (
      "const c = document.querySelector('.stage canvas');"
      "for (let i = 0; i < 12; i++) setTimeout(() => c.dispatchEvent("
      "new WheelEvent('wheel', {deltaY: i < 6 ? 300 : -300, clientX: 600,"
      " clientY: 500, cancelable: true})), 40 * i)"
    )
    for interaction in (
      ("variables", browser.go, "#/variables"),
      ("sort", browser.click, "#variables th:nth-child(3) button"),
      ("variable", browser.go, "#/variable/17"),
      ("variable, again", browser.go, "#/variable/18"),
      ("images", browser.go, "#/images"),
      ("search", browser.script, input_of, found),
      ("image", browser.go, "#/image/4321"),
      ("require a bin", browser.click, ".chip:nth-child(2) button"),
      ("matrix", browser.go, "#/matrix"),
      ("matrix, one pair", browser.go, "#/matrix/3/57"),
      ("matrix, zoom out and in", browser.script, wheel),
      ("map", browser.go, "#/map"),
      ("overview", browser.go, "#/overview"),
    ):
      watched.measure(*interaction)
    heap = browser.value("performance.memory.usedJSHeapSize") / 1e6
    print(f"JavaScript heap: {heap:.0f} MB")
    assert browser.log() == []
