"""Near duplicates and outliers that were planted: who finds them?

  python -m docs.search_study --workdir=runs/digits

Prints the tables of docs/image_search.md for the run's own images: precision
and recall of near duplicates by threshold, and the area under the curve of
foreign images (drawings of `shapes` in the run's size) by both measures of
rarity.
"""

import argparse
import io

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from imsvd_jax import data
from imsvd_jax.data.sources import shapes
from imsvd_jax.explain.rarity import RARITY
from imsvd_jax.runs.encoder import data_settings, load_encoder
from imsvd_jax.search.build import normalized

NUM_PLANTED = 200
THRESHOLDS = (0.95, 0.97, 0.98, 0.99, 0.995, 0.999)


def compressed(image: np.ndarray) -> np.ndarray:
  """Returns the image after JPEG of quality 50."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=50)
  return np.asarray(Image.open(file))


def brighter(image: np.ndarray) -> np.ndarray:
  """Returns the image 10% brighter."""
  return np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8)


def resized(image: np.ndarray) -> np.ndarray:
  """Returns the image after a smaller size."""
  half = (image.shape[1] * 3 // 4, image.shape[0] * 3 // 4)
  small = Image.fromarray(image).resize(half)
  return np.asarray(small.resize(image.shape[1::-1]))


def shifted(image: np.ndarray) -> np.ndarray:
  """Returns the image, one pixel to the right."""
  return np.roll(image, 1, axis=1)


EDITS = (compressed, brighter, resized, shifted)


def duplicates_table(
  encoder, images: np.ndarray, rng: np.random.Generator
) -> list[str]:
  """Returns precision and recall of changed copies, by threshold."""
  chosen = rng.choice(len(images), NUM_PLANTED, replace=False)
  copies = np.stack([EDITS[n % 4](images[i]) for n, i in enumerate(chosen)])
  bank = normalized(encoder.features(images))
  cosines = normalized(encoder.features(copies)) @ bank.T
  is_own = np.zeros(cosines.shape, bool)
  is_own[np.arange(NUM_PLANTED), chosen] = True
  lines = ["| threshold | precision | recall |", "|---|---|---|"]
  for threshold in THRESHOLDS:
    found = cosines >= threshold
    hits = (found & is_own).sum()
    lines.append(
      f"| {threshold} | {hits / max(found.sum(), 1):.3f}"
      f" | {hits / NUM_PLANTED:.3f} |"
    )
  for n, edit in enumerate(EDITS):
    own = cosines[is_own][n::4]
    lines.append(f"{edit.__name__}: median cosine {np.median(own):.4f}")
  return lines


def outliers_table(
  encoder, images: np.ndarray, rng: np.random.Generator
) -> list[str]:
  """Returns how well rarity tells foreign images."""
  size, channels = images.shape[2:]
  foreign = shapes.render(shapes.draw_factors(NUM_PLANTED, 0), size, channels)
  half = rng.permutation(len(images))
  codes = encoder.codes(np.concatenate([images[half], foreign[:40]]))
  is_foreign = np.arange(len(codes)) >= len(images)
  num_bins = int(codes.max()) + 1
  lines = ["| outliers by | area under the curve |", "|---|---|"]
  for name, measure in RARITY.items():
    area = roc_auc_score(is_foreign, measure(codes, num_bins))
    lines.append(f"| {name} | {area:.3f} |")
  return lines


def main() -> None:
  """Prints both tables."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True)
  encoder = load_encoder(parser.parse_args().workdir)
  source = data.make_source(data_settings(encoder.config), "train")
  images = encoder.preprocess(source.images)
  rng = np.random.default_rng(0)
  print("\n".join(duplicates_table(encoder, images, rng)))
  print("\n".join(outliers_table(encoder, images, rng)))


if __name__ == "__main__":
  main()
