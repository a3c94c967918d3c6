"""The explorer: its files, and the page in a real browser."""

import base64
import dataclasses
import json
import re
import zlib

import jax
import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import (
  attribution,
  captions,
  embedding_map,
  interventions,
  measurement,
  rarity,
)
from imsvd_jax.explain import illustrations as illustrations_lib
from imsvd_jax.explain.explain_options import ExplainOptions
from imsvd_jax.explain.explorer import writer
from tests.explain import chromium, shapes_subject

N, M, BINS, SIZE = 150, 6, 5, 32
IMG = '<img src=x onerror="window.hacked=1">.png'
SCRIPT = "</script><script>window.hacked=2</script>\u2028&amp;.png"
LABELS = ("<b>circle</b>", "square", "triangle", "cross", "ring", "bar")
OPTIONS = ExplainOptions(
  num_top=8,
  max_flip_images=0,
  thumbnail_size=32,
  grad_cam_per_bin=3,
  integrated_per_bin=1,
)


FLIPS = np.array([[0.1, 0.92, 0, 0.2, 0.3, 0.4], [0.5, 0, 0, 0, 0, 0]])


def caption(text):
  return captions.Caption(1, 2, text, 30, 0.8, 0.6, 4.0, 1e-6)


def one_factor_at_a_time():
  best = [
    interventions.Selectivity(name, m, 0.9, 0.1, 9.0, 7.5, 11.0)
    for name, m in (("shape<i>", 1), ("hue", 0))
  ]
  names = ("shape<i>", "hue")
  return interventions.Interventions(names, np.full(2, 500), FLIPS, tuple(best))


def link(index):
  return f"../a%20b/{index}.png" if index == 7 else ""


def file_names(index):
  return {7: IMG, 9: SCRIPT}.get(index, f"train/shape_{index:03d}.png")


class Built:
  """One small explorer and what it was built from."""

  def __init__(self, root):
    self.root = root
    self.subject = shapes_subject.make_subject(M, BINS)
    factors = shapes_subject.factors_of(np.arange(N))
    images = shapes_subject.images_of(
      N,
      80,
      size=SIZE,
      label_names=LABELS,
      factors={"hue": factors["hue"]},
      names=file_names,
    )
    found = measurement.analyze(self.subject, images, OPTIONS)
    self.analysis = dataclasses.replace(
      found,
      edits=interventions.Interventions(
        ("mirror",), np.array([N]), np.linspace(0, 1, M)[None], ()
      ),
      interventions=one_factor_at_a_time(),
      captions=captions.Captions((caption("shape <u>ring"),), 20),
      scores=dataclasses.replace(
        found.scores, nmi_untrained=found.scores.nmi / 4
      ),
    )
    self.illustrations = illustrations_lib.illustrate(
      self.subject,
      shapes_subject.batches(N, 70, size=SIZE),
      self.analysis,
      root / "sprites",
      OPTIONS,
      mesh=devices.make_mesh(jax.devices()),
      keep=[3, 140],
    )
    self.index = writer.build(
      root,
      self.subject,
      self.analysis,
      self.illustrations,
      title="Shapes & <colors>",
      names=images.names,
      links=link,
    )

  def data(self, name):
    """Returns the value that a data script passes to the page."""
    text = (self.root / "data" / f"{name}.js").read_text()
    return json.loads(text[text.index(", ") + 2 : text.rindex(");")])

  def array(self, text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return Built(tmp_path_factory.mktemp("explorer"))


# --- Files --------------------------------------------------------------------


def test_strings_cannot_leave_their_script():
  text = writer.script_json({"name": SCRIPT + "\u2029é"})
  assert "<" not in text
  assert ">" not in text
  assert text.isascii()
  assert json.loads(text) == {"name": SCRIPT + "\u2029é"}


def test_data_scripts_are_ascii_without_markup(built):
  for path in (built.root / "data").iterdir():
    text = path.read_text()
    assert text.isascii()
    assert "<" not in text
    assert text.startswith("receive(")


def test_page_needs_no_network(built):
  page = built.index.read_text()
  assert "Shapes &amp; &lt;colors&gt;" in page
  static = (built.root / "static").iterdir()
  for path in (built.index, *static):
    text = path.read_text()
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
    for call in ("fetch(", "XMLHttpRequest", "innerHTML", "document.write"):
      assert call not in text


def test_page_loads_every_static_file_once(built):
  loaded = re.findall(r'(?:src|href)="static/([^"]+)"', built.index.read_text())
  assert sorted(loaded) == sorted(
    path.name for path in (built.root / "static").iterdir()
  )


def test_sprites_hold_the_thumbnails(built):
  sheet = matplotlib_image.imread(built.root / "sprites" / "1.png")
  image = shapes_subject.render(np.array([64 + 10]), SIZE)[0][0]
  found = np.rint(sheet[32:64, 64:96, :3] * 255)  # Row 1, column 2.
  np.testing.assert_array_equal(found, image)
  kept = built.illustrations.kept
  np.testing.assert_array_equal(
    kept[140], shapes_subject.render(np.array([140]), SIZE)[0][0]
  )


def test_codes_and_labels_round_trip(built):
  data = built.data("images")
  codes = built.array(data["codes"], np.uint8).reshape(M, N)
  np.testing.assert_array_equal(codes.T, built.analysis.code.codes)
  labels = built.array(data["factors"][0]["values"], np.int16)
  np.testing.assert_array_equal(labels, built.analysis.factors[0].values)
  assert data["names"][7] == IMG


def test_joint_rows_round_trip(built):
  blocks = built.array(built.data("joint_1")["blocks"], np.uint8)
  levels = blocks.reshape(M - 1, BINS, BINS).astype(float)
  p = built.analysis.code.marginal
  block = built.analysis.pairs.joint[BINS : 2 * BINS, 3 * BINS : 4 * BINS]
  ratio = block / np.outer(p[1], p[3])
  stored = 2 ** ((levels[2] - 128) * 8 / 127)
  inside = (ratio > 2**-7.9) & (ratio < 2**7.9)
  np.testing.assert_allclose(stored[inside], ratio[inside], rtol=0.024)
  assert inside.mean() > 0.5


def test_levels_of_zero_and_of_independence():
  p = np.array([0.25, 0.75])
  joint = np.outer(p, p)
  joint[0, 1] = 0
  levels = writer.ratio_levels(joint, p, p)
  np.testing.assert_array_equal(levels, [[128, 0], [128, 128]])


@pytest.mark.parametrize(
  ("wanted", "side", "number"),
  [(None, 28, 2), (None, 700, 0), (5, 700, 5), (0, 28, 0)],
)
def test_integrated_gradients_are_few_where_a_cpu_would_take_long(
  built, wanted, side, number
):
  """By default 512 maps of 64 x 64 pixels, or as many pixels as these have."""
  lines = []
  found = illustrations_lib._num_integrated(
    ExplainOptions(integrated_per_bin=wanted),
    built.analysis,
    side**2,
    devices.make_mesh(jax.devices()),
    lines.append,
  )
  assert found == number
  assert len(lines) == (wanted is None and number < 2)


def test_maps_belong_to_the_best_images(built):
  maps = built.data("variable_2")["cam"]
  found = built.array(maps["maps"], np.uint8).reshape(
    BINS, maps["perBin"], maps["height"], maps["width"]
  )
  np.testing.assert_array_equal(found, built.illustrations.grad_cam[2])
  best = built.analysis.code.top_indices[2, 1, :3]
  images = shapes_subject.render(best, SIZE)[0]
  again = attribution.attribute(
    attribution.make_grad_cam(built.subject),
    built.subject,
    images,
    np.array([[0, 2, 1], [1, 2, 1], [2, 2, 1]]),
    room=(8, 8),
    mesh=devices.make_mesh(jax.devices()),
  )
  expected = np.rint(attribution.unit_maps(again) * 255)
  assert np.abs(found[1] - expected).max() <= 1
  fine = built.illustrations.integrated
  assert fine.shape == (M, BINS, 1, 32, 32)
  assert fine.max() == 255
  codes = built.subject.patch_codes(built.subject.variables, images)
  patches = built.data("variable_2")["patches"]
  found = built.array(patches["maps"], np.uint8).reshape(BINS, 3, 8, 8)
  np.testing.assert_array_equal(found[1], (codes[..., 2] == 1) * 255)
  assert 0 < found.mean() < 255
  attention = built.illustrations.attention[2, 1]
  expected = built.subject.attention(built.subject.variables, images)
  expected = attribution.unit_maps(np.asarray(expected)) * 255
  np.testing.assert_allclose(attention, expected, atol=1)


def test_few_images_are_shown_of_many(built):
  shown = illustrations_lib.shown_images(built.analysis, 100)
  best = np.unique(built.analysis.code.top_indices)
  assert np.isin(best[best >= 0], shown).all()
  assert len(shown) == max(100, len(best[best >= 0]))
  assert len(illustrations_lib.shown_images(built.analysis, N)) == N


def test_second_pass_over_other_data(built, tmp_path):
  with pytest.raises(UserError, match="50 of 150 images"):
    illustrations_lib.illustrate(
      built.subject,
      shapes_subject.batches(100, 50, size=SIZE),
      built.analysis,
      tmp_path,
      ExplainOptions(grad_cam_per_bin=0, integrated_per_bin=0),
      mesh=devices.make_mesh(jax.devices()),
    )


def test_sheets_do_not_depend_on_the_order(tmp_path):
  rng = np.random.default_rng(0)
  thumbnails = rng.integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
  for name, order in (("a", np.arange(70)), ("b", rng.permutation(70))):
    indices = np.arange(70) * 3
    sheets = illustrations_lib.SheetWriter(tmp_path / name, indices, 8)
    assert sheets.slots([0, 1, 207, 999]).tolist() == [0, -1, 69, -1]
    for start in range(0, 70, 30):
      part = order[start : start + 30]
      sheets.add(part, thumbnails[part])
    sheets.close()
  for sheet in ("0.png", "1.png"):
    first, second = (tmp_path / n / sheet for n in "ab")
    assert first.read_bytes() == second.read_bytes()


# --- In a browser -------------------------------------------------------------

PAGES = (
  *("overview", "variables", "variable/1", "images", "image/7"),
  *("matrix", "map", "duplicates", "outliers"),
)


@pytest.fixture(scope="module")
def session(built):
  with chromium.Browser() as browser:
    browser.open(built.index)
    yield browser


@pytest.fixture
def browser(session):
  """No page of any test may leave a message on the console."""
  session.resize()
  yield session
  assert session.log() == []


def test_opens_from_disk_without_network(browser, built):
  assert browser.text("h1") == "What the encoder learned"
  assert browser.text(".brand") == "Shapes & <colors>"
  assert browser.script("return document.title").endswith("<colors>")
  folder = built.root.as_uri()
  foreign = [
    url
    for url in browser.requests()
    # The browser's own first tab is chrome and chrome-untrusted.
    if not url.startswith((folder, "chrome", "data:", "blob:"))
  ]
  assert foreign == []
  assert len(browser.texts(".card .value")) == 8


def test_every_page_has_one_heading_and_its_tab(browser):
  for page, heading, tab in (
    ("#/variables", "Variables", "Variables"),
    ("#/variable/2", "Variable 2", "Variables"),
    ("#/images", "Images", "Images"),
    ("#/image/3", "Image", "Images"),
    ("#/matrix", "Joint matrix", "Matrix"),
    ("#/map", "Map of the embedding", "Map"),
    ("#/duplicates", "Duplicates", "Duplicates"),
    ("#/outliers", "Outliers", "Outliers"),
    ("#/nonsense", "Not found", ""),
    ("#/variable/99", "Not found", "Variables"),
    ("#/image/99999", "Not found", "Images"),
  ):
    browser.go(page)
    assert "".join(browser.texts("#tabs [aria-current=page]")) == tab
    assert browser.texts("h1") == [heading]
    assert browser.value("document.activeElement.tagName") == "H1"


def test_sorting_by_mouse_and_keyboard(browser, built):
  browser.go("#/variables")
  head = "#variables th:nth-child(3)"
  first = "#variables tbody tr > :nth-child(1)"
  browser.click(f"{head} button")
  entropies = built.analysis.code.entropies()
  expected = [f"v{m}" for m in np.argsort(-entropies, kind="stable")]
  assert browser.texts(first) == expected
  sort = "document.querySelector(arguments[0]).ariaSort"
  assert browser.value(sort, head) == "descending"
  browser.press("Enter")  # The heading still has the focus.
  assert browser.texts(first) == expected[::-1]
  assert browser.value(sort, head) == "ascending"
  assert "ascending" in browser.text("#live")
  texts = browser.texts("#variables tbody tr > :nth-child(3)")
  shown = [float(text) for text in texts]
  np.testing.assert_allclose(shown, np.sort(entropies), atol=6e-4)


def test_variable_page_shows_best_images_lazily(browser, built):
  browser.resize(1280, 400)
  browser.go("#/variable/2")
  thumbs = "[data-bin='4'] .thumb"
  assert browser.images(thumbs) == []  # Below the screen: not there yet.
  browser.show("[data-bin='4']")
  best = built.analysis.code.top_indices[2, 4]
  np.testing.assert_array_equal(browser.images(thumbs), best)


def test_pictures_outside_of_a_small_bin_are_marked(browser, built):
  usage = built.analysis.code.usage
  m, d = np.argwhere((usage > 0) & (usage < 8))[0]
  browser.go(f"#/variable/{m}")
  browser.show(f"[data-bin='{d}']")
  shown = browser.all(
    f"[data-bin='{d}'] .thumb",
    # Under the pointer, which an earlier test left somewhere, none is dimmed.
    "[n.ariaLabel.includes('not in this bin'), n.matches(':hover,"
    " :focus-visible') ? null : +getComputedStyle(n).opacity]",
  )
  best = built.analysis.code.top_indices[m, d]
  outside = built.analysis.code.codes[best, m] != d
  assert outside.sum() == 8 - usage[m, d]
  for (label, opacity), out in zip(shown, outside.tolist(), strict=True):
    assert label == out
    assert opacity is None or (opacity < 1) == out
  assert sum(opacity is None for _, opacity in shown) <= 1
  assert "Dimmed: not in this bin" in browser.text(f"[data-bin='{d}'] .what")


def test_hover_and_focus_show_attribution(browser):
  browser.go("#/variable/2")
  browser.show("[data-bin='0']")
  hidden = "document.getElementById('tip').hidden"
  assert browser.value(hidden)
  browser.move("[data-bin='0'] .thumb")
  browser.wait_for_tip()
  tip = browser.text("#tip")
  assert "q = " in tip
  assert "Grad-CAM" in tip
  assert browser.value("document.querySelectorAll('#tip canvas').length")
  browser.move("h1")
  browser.wait(hidden)
  browser.script("document.getElementById('overlay').focus()")
  browser.press("Tab")  # To the first image.
  browser.wait_for_tip()
  browser.press("Escape")
  assert browser.value(hidden)
  browser.script("document.activeElement.blur()")
  browser.press("o")
  assert browser.wait("document.querySelectorAll('.bin canvas').length") >= 3
  assert len(browser.texts("[data-bin='0'] .thumb canvas")) == 3
  # The heat is drawn: some pixels are opaque enough to see.
  opacity = browser.script(
    "const c = document.querySelector('[data-bin=\"0\"] .thumb canvas');"
    "const d = c.getContext('2d').getImageData(0, 0, 96, 96).data;"
    "return Math.max(...d.filter((_, i) => i % 4 === 3))"
  )
  assert opacity > 100


def test_patches_and_attention_are_overlays(browser):
  browser.go("#/variable/2")
  browser.show("[data-bin='0']")
  choose = (
    "const s = document.getElementById('overlay'); s.value = '%s';"
    "s.dispatchEvent(new Event('change'))"
  )
  drawn = (
    "return [...document.querySelectorAll('.bin canvas')].map((c) => new Set("
    "c.getContext('2d').getImageData(0, 0, 96, 96).data"
    ".filter((_, i) => i % 4 === 3)).size)"
  )
  browser.script(choose % "attention")
  browser.wait("document.querySelector('.bin canvas')")
  assert max(browser.script(drawn)) > 2
  browser.script(choose % "patches")
  browser.wait("document.querySelector('.bin canvas')")
  sizes = browser.script(drawn)
  assert set(sizes) <= {1, 2}  # In the bin or not, without blur.
  assert 2 in sizes
  browser.move("[data-bin='0'] .thumb")
  browser.wait_for_tip()
  assert "patches whose own code is this bin" in browser.text("#tip")
  browser.script(choose % "none")


def test_hostile_names_stay_text(browser):
  browser.go("#/image/7")
  assert browser.text("#image-name") == IMG
  browser.go("#/image/9")
  name = "document.getElementById('image-name').textContent"
  assert browser.value(name) == SCRIPT
  browser.go("#/images?q=onerror")
  browser.wait("document.querySelectorAll('#grid .thumb').length === 1")
  browser.move("#grid .thumb")
  browser.wait_for_tip()
  assert IMG in browser.text("#tip")
  browser.go("#/variable/0")
  browser.wait("document.querySelector('.bin .thumb')")
  browser.go("#/map")
  assert "<b>circle</b>" in browser.text(".legend")
  assert browser.value("window.hacked === undefined")
  assert not browser.value("document.querySelector('img[onerror]')")


def test_search_by_name_label_and_index(browser, built):
  browser.go("#/overview")
  browser.press("/")
  assert browser.value("document.activeElement.id") == "find"
  browser.press(*"v3", "Enter")
  browser.wait_for_heading("Variable 3")
  browser.go("#/images")
  labels = built.analysis.factors[0].values
  for text, count in (
    ("shape_01", 10),
    ("ring", int((labels == 4).sum())),
    ("42", 2),  # By its index, and 142 by its name.
    ("nothing at all", 0),
  ):
    browser.script(
      "const i = document.getElementById('image-search'); i.value = "
      "arguments[0]; i.dispatchEvent(new Event('input'))",
      text,
    )
    browser.wait(
      "document.querySelector('main [role=status]').textContent === "
      f"'{count} of {N} images'"
    )
    if text == "42":
      assert browser.images("#grid .thumb")[0] == 42


def test_images_that_share_codes(browser, built):
  browser.go("#/image/5")
  codes = built.analysis.code.codes
  shared = (codes == codes[5]).sum(1)
  order = [i for i in np.lexsort((np.arange(N), -shared)) if i != 5][:24]
  assert browser.images("#sharing .thumb") == [int(i) for i in order]
  assert f"{shared[order[0]]} of {M}" in browser.text("#sharing")
  browser.click(".chip:nth-child(2) button")  # Require variable 1.
  same = np.flatnonzero(codes[:, 1] == codes[5, 1])
  found = browser.images("#sharing .thumb")
  assert set(found) <= set(same.tolist()) - {5}
  assert len(found) == min(24, len(same) - 1)
  status = browser.text("section [role=status]")
  assert status.startswith(f"{len(same) - 1} other images")


def test_neighbors_of_an_image(browser, built):
  browser.go("#/image/5")
  rows, _ = embedding_map.nearest_neighbors(
    built.analysis.features.sample_features, 12
  )
  found = browser.images("section:nth-of-type(2) .thumb")
  np.testing.assert_array_equal(found, rows[5])


def test_virtual_grid_holds_few_cells(browser):
  browser.resize(390, 500)
  browser.go("#/images")
  cells = "document.querySelectorAll('#grid .thumb').length"
  count = browser.wait(cells)
  assert count < N
  browser.script("scrollTo(0, document.body.scrollHeight)")
  browser.wait(
    "[...document.querySelectorAll('#grid .thumb')].some("
    f"(n) => n.hash === '#/image/{N - 1}')"
  )
  assert browser.value(cells) < N


def test_matrix_tooltip_zoom_and_keyboard(browser, built):
  browser.go("#/matrix/1/4")
  found = built.analysis.pairs
  browser.wait("document.querySelector('.stage canvas').width > 100")
  browser.script("document.querySelector('.stage canvas').focus()")
  browser.press("ArrowDown")  # Zoomed in: one bin down.
  said = browser.text("#live")
  assert said.startswith("Variables 1 and 4")
  assert f"{found.mutual_information[1, 4]:.2f}" in said
  browser.wait(
    "(document.querySelector('.stage canvas').dispatchEvent("
    "new KeyboardEvent('keydown', {key: 'ArrowRight'})),"
    " document.getElementById('live').textContent.includes('bins 1, '))"
  )
  # The tooltip agrees with the matrix.
  said = browser.text("#live")
  bins = re.search(r"bins (\d), (\d): P (?:=|≈) ([\d.e-]+)", said)
  d, e = int(bins[1]), int(bins[2])
  stored = found.joint[BINS + d, 4 * BINS + e]
  marginal = built.analysis.code.marginal
  ratio = stored / (marginal[1, d] * marginal[4, e])
  if 2**-7.9 < ratio < 2**7.9:
    assert float(bins[3]) == pytest.approx(stored, rel=0.08)
  browser.press("0")  # Fit: now whole variables.
  browser.move(".stage canvas")
  browser.wait_for_tip()
  assert "mutual information" in browser.text("#tip")
  browser.script("document.querySelector('.stage canvas').focus()")
  browser.press("Enter")
  browser.wait_for_heading("Variable 1")


def test_matrix_pixels_follow_the_matrix(browser, built):
  """In the light theme, a darker pair has more information above the floor."""
  browser.go("#/matrix")
  centers = (
    "const c = document.querySelector('.stage canvas');"
    "const box = Math.min(c.clientWidth, c.clientHeight) - 24;"
    "const r = c.width / c.clientWidth;"
    "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    f"const s = box / {M}; const result = [];"
    f"for (let a = 0; a < {M}; a++) for (let b = 0; b < {M}; b++) {{"
    "const x = Math.round(((c.clientWidth - box) / 2 + (b + .5) * s) * r);"
    "const y = Math.round(((c.clientHeight - box) / 2 + (a + .5) * s) * r);"
    "const i = 4 * (y * c.width + x); result.push(d[i] + d[i+1] + d[i+2]); }"
    "return result"
  )
  light = np.array(browser.script(centers)).reshape(M, M)
  excess = np.maximum(built.analysis.pairs.excess(), 0)
  rows, columns = np.where(~np.eye(M, dtype=bool))
  order = np.argsort(excess[rows, columns])
  ranked = light[rows, columns][order]
  assert (np.diff(ranked) <= 0).all()
  assert ranked[0] > ranked[-1] + 300


def test_map_opens_the_image_under_the_mouse(browser):
  browser.go("#/map")
  browser.script("document.querySelector('.stage canvas').focus()")
  browser.press("+", "ArrowLeft", "-", "0")
  browser.move(".stage canvas", 0.5, 0.55)
  for y in np.linspace(0.2, 0.8, 13):
    browser.move(".stage canvas", 0.5, float(y))
    if not browser.value("document.getElementById('tip').hidden"):
      break
  index = re.search(r"index (\d+)", browser.text("#tip"))[1]
  browser.move(".stage canvas", 0.5, float(y), click=True)
  browser.wait(f"location.hash === '#/image/{index}'")


def test_empty_bins_are_last_in_every_list(browser):
  browser.go("#/overview")
  browser.script("core.usage[2][1] = 0")
  browser.go("#/variable/2")
  for order in ("usage", "purity", "number"):
    browser.script(
      "const s = [...document.querySelectorAll('select')].find((s) =>"
      " s.options[0].value === 'number'); s.value = arguments[0];"
      "s.dispatchEvent(new Event('change'))",
      order,
    )
    usage = browser.value("core.usage[2]")
    bins = browser.all(".bin", "+n.dataset.bin")
    assert [usage[d] > 0 for d in bins] == sorted(
      (n > 0 for n in usage), reverse=True
    )
  used = [d for d in range(BINS) if usage[d]]
  assert bins == used + [d for d in range(BINS) if not usage[d]]
  empty = BINS - len(used)
  assert browser.text(".axis span:last-child") == f"{empty} empty"
  browser._call("POST", "/refresh", {})  # The data as they were.
  browser.wait("document.querySelector('main')?.dataset.ready")


def test_charts_have_axes_and_units(browser, built):
  browser.go("#/overview")
  entropy, spectrum = browser.texts(".scale")
  assert entropy.split("\n")[0] == f"{np.log(BINS):.2f} nats"
  assert spectrum.split("\n")[0].endswith("%")
  assert f"across: variables 0 to {M - 1}" in browser.text(".legend")
  browser.go("#/variable/1")
  most = built.analysis.code.usage[1].max()
  assert browser.text(".scale").split() == [str(most), "images", "0"]


def test_names_of_bins_are_shown_as_text(browser, built):
  name = "shape <u>ring"
  browser.go("#/variable/1")
  browser.show("[data-bin='2']")
  assert name in browser.text("[data-bin='2'] .what")
  inside = int(np.flatnonzero(built.analysis.code.codes[:, 1] == 2)[0])
  browser.go(f"#/image/{inside}")
  assert browser.texts(".chip .name") == [name]


def test_interventions_are_a_table(browser):
  browser.go("#/overview")
  cells = browser.texts("#interventions td.share")
  assert cells[:M] == [f"{x:.0%}" for x in FLIPS[0]]
  text = browser.text("#interventions")
  assert "shape<i>" in text
  assert "9.0 [7.5, 11.0]" in text
  low, high = interventions.wilson(0.92, 500)
  assert browser.all("#interventions td.share", "n.title")[1] == (
    f"95% interval {low:.1%} to {high:.1%}"
  )
  browser.go("#/variable/1")
  assert "a change of shape<i> flips it most often: 92%" in browser.text("main")


def test_duplicates_and_outliers_are_pages(browser, built):
  browser.go("#/duplicates")
  groups = built.data("duplicates")["groups"]
  assert len(groups) > 0
  assert "at least 0.995" in browser.text("main")
  assert f"{N} were compared" in browser.text("#found")
  browser.wait("document.querySelector('[data-group=\"0\"] .thumb')")
  shown = browser.images("[data-group='0'] .thumb")
  assert shown == groups[0][0][:24]
  browser.go("#/outliers")
  codes = built.analysis.code.codes
  expected = np.argsort(-rarity.pair_surprise(codes, BINS), kind="stable")
  found = browser.images("#outliers .thumb")
  np.testing.assert_array_equal(found, expected[: len(found)])


def test_only_an_image_with_a_file_links_to_it(browser, built):
  browser.go("#/image/7")
  parent = built.root.parent.as_uri()
  assert browser.value("document.getElementById('file').href") == (
    f"{parent}/a%20b/7.png"
  )
  browser.go("#/image/8")
  assert not browser.value("document.getElementById('file')")


def lasso(browser, corners):
  """Drags around fractions of the map."""
  box = browser.script(
    "const b = document.querySelector('.stage canvas').getBoundingClientRect();"
    "return [b.left, b.top, b.width, b.height]"
  )
  moves = [
    {
      "type": "pointerMove",
      "duration": 20,
      "x": round(box[0] + x * box[2]),
      "y": round(box[1] + y * box[3]),
    }
    for x, y in corners
  ]
  down, up = ({"type": f"pointer{n}", "button": 0} for n in ("Down", "Up"))
  actions = [moves[0], down, *moves[1:], up]
  mouse = {"type": "pointer", "id": "mouse", "actions": actions}
  browser._call("POST", "/actions", {"actions": [mouse]})


@pytest.mark.parametrize("layout", ["pca", "tsne"])
def test_a_lasso_filters_images_and_variables(browser, built, layout):
  browser.go("#/map")
  browser.script(
    "const s = document.getElementById('layout'); s.value = arguments[0];"
    "s.dispatchEvent(new Event('change'))",
    layout,
  )
  browser.wait(
    "document.querySelector('main p').textContent.includes"
    f"('{'t-SNE' if layout == 'tsne' else 'principal components'}')"
  )
  browser.script(
    "document.querySelector('.stage').scrollIntoView({block: 'center'})"
  )
  browser.click("#lasso")
  # The left half of the square, which fills the canvas from top to bottom.
  width, height = browser.script(
    "const c = document.querySelector('.stage canvas');"
    "return [c.clientWidth, c.clientHeight]"
  )
  left = 0.5 - height / width / 2
  lasso(browser, [(left, 0.01), (0.5, 0.01), (0.5, 0.99), (left, 0.99)])
  chart = built.data("map")[layout]
  slots = built.array(chart["slots"], np.int32)
  points = built.array(chart["points"], np.uint16).reshape(-1, 2)
  half = (height - 24) / height / 2  # Of the square, around the middle.
  inside = points[:, 0] / 65_535 * 2 * half < half
  expected = set(slots[inside].tolist())
  browser.click("#chosen a")  # Show these images.
  browser.wait_for_heading("Images")
  found = int(browser.text("main [role=status]").split()[0])
  assert abs(found - len(expected)) <= 3  # Pixels of the border.
  assert 0 < found < N
  browser.wait("document.querySelector('#grid .thumb')")
  outside = set(browser.images("#grid .thumb")) - expected
  assert len(outside) <= 3
  browser.go("#/variables")
  assert "Divergence of the selection" in browser.text("#variables thead")
  rows = len(browser.texts("#variables tbody tr"))
  assert browser.text("#told").startswith(f"{rows} variables")
  values = [float(t) for t in browser.texts("#variables td:nth-child(2)")]
  assert values == sorted(values, reverse=True)
  browser.go("#/variable/0")
  codes = built.analysis.code.codes[:, 0]
  bins = browser.all(".bin", "+n.dataset.bin")
  assert set(bins) <= set(codes[list(expected | outside)].tolist())
  browser.wait("document.querySelector('.bin .thumb')")
  shown = browser.images(f"[data-bin='{bins[0]}'] .thumb")
  assert (codes[shown] == bins[0]).all()
  browser.click("#selection button")
  browser.wait("!document.getElementById('selection')")
  assert len(browser.texts(".bin")) == BINS


def test_what_is_in_view_is_selected_by_keys(browser):
  browser.go("#/map")
  browser.script("document.querySelector('.stage canvas').focus()")
  browser.press("+", "+", "ArrowLeft")
  browser.script(
    "document.querySelector('#map-tools button:nth-child(2)').focus()"
  )
  browser.press("Enter")
  count = int(browser.text("#chosen").split()[0])
  assert 0 < count < N
  assert "images selected" in browser.text("#live")
  browser.click("#map-tools button:nth-child(3)")
  assert browser.text("#chosen") == ""


def test_theme_follows_the_system_and_the_button(browser):
  browser.go("#/overview")
  theme = "document.documentElement.dataset.theme"
  browser.prefer(dark=True)
  browser.wait(f"{theme} === 'dark'")
  browser.click("#theme")
  assert browser.text("#theme") == "Light"
  assert browser.value(theme) == "light"
  browser.click("#theme")
  assert browser.value(theme) == "dark"
  browser.click("#theme")
  browser.prefer(dark=False)
  browser.wait(f"{theme} === 'light'")


def test_help_and_number_keys(browser):
  browser.go("#/overview")
  browser.press("?")
  browser.wait("document.getElementById('help').open")
  browser.press("Escape")
  browser.wait("!document.getElementById('help').open")
  browser.press("2")
  browser.wait_for_heading("Variables")
  browser.go("#/variable/1")
  browser.press("]")
  browser.wait_for_heading("Variable 2")


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen(browser, width):
  browser.resize(width, 800)
  for page in PAGES:
    browser.go(f"#/{page}")
    assert browser.value("document.documentElement.scrollWidth") <= width, page


@pytest.mark.parametrize("width", [880, 1000, 1300, 1920])
def test_no_table_of_the_overview_is_cut_off(browser, width):
  browser.resize(width, 800)
  browser.go("#/overview")
  assert browser.all(".split .scroll", "n.scrollWidth - n.clientWidth") == [
    0,
    0,
  ]
  heads = browser.text(".split thead")
  assert "Random" in heads
  assert "Chance" in heads


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d',
  {willReadFrequently: true});
const rgb = (color) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data;
};
const light = (c) => [0, 1, 2].map((i) => c[i] / 255).map((v) => v <= .04045
  ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((a, v, i) => a + v * [.2126, .7152, .0722][i], 0);
const style = getComputedStyle(document.documentElement);
const of = (name) => light(rgb(style.getPropertyValue(name)));
const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
const result = {};
for (const ground of ['--paper', '--panel', '--wash'])
  for (const ink of ['--ink', '--soft', '--accent', '--good', '--fair',
    '--poor']) result[ink + ground] = ratio(of(ink), of(ground));
return result;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(browser, dark):
  browser.prefer(dark)
  theme = "dark" if dark else "light"
  browser.wait(f"document.documentElement.dataset.theme === '{theme}'")
  ratios = browser.script(CONTRAST)
  browser.prefer(False)
  assert min(ratios.values()) > 4.5, ratios


def test_everything_that_acts_has_a_name(browser):
  nameless = (
    "return [...document.querySelectorAll('a, button, input, select, canvas')]"
    ".filter((n) => n.ariaHidden !== 'true' && !n.closest('[aria-hidden]')"
    " && !n.ariaLabel && !n.textContent.trim() && !n.labels?.length)"
    ".map((n) => n.outerHTML)"
  )
  for page in PAGES:
    browser.go(f"#/{page}")
    assert browser.script(nameless) == []
