"""The model card beside an exported file: what it is, and how to load it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from imsvd_jax.base.errors import UserError


class Figure(NamedTuple):
  """One line of the table of evaluation figures; accuracies in [0, 1]."""

  what: str
  data: str
  value: float
  interval: tuple[float, float] | None = None


def evaluation_figures(
  workdir: str | os.PathLike[str],
  step: int,
  variables: Mapping[str, Any],
  *,
  use_target: bool = False,
) -> list[Figure]:
  """Returns the accuracies that a run's files hold for one set of weights.

  They come from `results.json` (`evaluate`), and from `final.json` and
  `metrics.jsonl` (training).

  Args:
    workdir: The run's directory; nothing is known about a file.
    step: Of the weights.
    variables: The weights, whose checksum `evaluate` has written.
    use_target: Whether they are the EMA target network's; training measures
      the trained network alone.

  Raises:
    UserError: One of the files is not what it should be.
  """
  folder = epath.Path(workdir)
  if not folder.is_dir():
    return []
  trained = [] if use_target else _from_training(folder, step)
  return [*trained, *_from_results(folder / "results.json", variables)]


def _from_training(folder: epath.Path, step: int) -> list[Figure]:
  """What training measured at this step, on the run's own data."""
  data = "held-out images of the run's data"
  lines = [line for line in _metrics(folder) if line.get("step") == step]
  measured = {key: value for line in lines for key, value in line.items()}
  if "final_knn" not in measured:
    online = {"online/knn": "online k-NN", "online/linear": "online linear"}
    return [
      Figure(f"{what} (during training)", data, measured[key])
      for key, what in online.items()
      if key in measured
    ]
  figures = []
  for encoder, row in _json(folder / "final.json").items():
    for probe, name in (("knn", "k-NN"), ("linear", "linear (L-BFGS)")):
      if probe in row:
        figures.append(Figure(f"{encoder}, {name}", data, row[probe]))
  return figures


def _from_results(
  path: epath.Path, variables: Mapping[str, Any]
) -> list[Figure]:
  """What `evaluate` measured of these very weights."""
  if not path.exists():
    return []
  # Imported late: scikit-learn comes with it, and most runs have no such file.
  from imsvd_jax.base.hashing import checksum
  from imsvd_jax.evaluation.results import read_results

  weights = checksum(variables)
  figures = []
  for entry in read_results(path):
    if entry.get("weights") != weights or entry.get("final") is None:
      continue
    interval = entry.get("interval")
    figures.append(
      Figure(
        entry["protocol"],
        str(entry["data"].get("name", "")),
        entry["final"],
        tuple(interval) if interval else None,
      )
    )
  return figures


def _metrics(folder: epath.Path) -> list[dict[str, Any]]:
  path = folder / "metrics.jsonl"
  lines = []
  for text in path.read_text().splitlines() if path.exists() else ():
    try:
      lines.append(json.loads(text))
    except ValueError:
      continue  # A line cut short by a kill; its step comes again.
  return lines


def _json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(
      f"{path} is not JSON ({error}); move it away to export without it."
    ) from error


def model_card(
  *,
  file_name: str,
  metadata: Mapping[str, Any],
  loading: str,
  language: str = "python",
  again: bool = True,
) -> str:
  """Returns the card, in Markdown.

  Args:
    file_name: Of the exported file.
    metadata: What the file says about itself.
    loading: How to load the file elsewhere.
    language: Of `loading`: "python" or "yaml".
    again: Whether `load_encoder` reads the file.
  """
  size = metadata["input_size"]
  mean, std = (_numbers(metadata[key]) for key in ("mean", "std"))
  settings = ", ".join(
    f"{key} = {value}" for key, value in metadata["hyperparameters"].items()
  )
  rows = {
    "Network": metadata["network"],
    "Weights": f"{metadata['weights']}, step {metadata['step']}",
    "Features": metadata["num_features"],
    "Trained on": metadata["data"],
    "Objective": f"{metadata['objective'] or 'not stated'}"
    + (f" ({settings})" if settings else ""),
    "Input": f"{size} x {size} pixels, {metadata['channels']} channels;"
    f" shorter side to {metadata['resize']} ({metadata['interpolation']},"
    f" antialiased), then the centre",
    "Mean, std": f"{mean}; {std} (of pixels in [0, 1])",
    "Computes in": metadata["dtype"],
    "Made by": f"imsvd_jax {metadata['imsvd_jax_version']}",
    "Licence": metadata["licence"] or "not stated",
  }
  table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
  ours = ""
  if again:
    ours = f"""
With imsvd_jax, from uint8 images of any size, preprocessing included:

```python
from imsvd_jax import load_encoder

features = load_encoder("{file_name}")(images)
```
"""
  return f"""# {file_name}

An image encoder pretrained without labels.

| | |
|---|---|
{table}
## How to load it

```{language}
{loading.rstrip()}
```
{ours}
## Evaluation

{_evaluation(metadata["evaluation"])}
The configuration of the run is in the file's metadata.
"""


def _evaluation(figures: Sequence[Mapping[str, Any]]) -> str:
  if not figures:
    return "The run has no evaluation of these weights.\n"
  lines = ["| what | data | accuracy | 95% interval |", "|---|---|---|---|"]
  for figure in figures:
    interval = ""
    if figure["interval"]:
      interval = " to ".join(f"{bound:.2%}" for bound in figure["interval"])
    what, data, value = figure["what"], figure["data"], figure["value"]
    lines.append(f"| {what} | {data} | {value:.2%} | {interval} |")
  return "\n".join(lines) + "\n"


def _numbers(values: Any) -> str:
  return ", ".join(f"{value:g}" for value in values)
