"""The model card beside an exported file: what it is, and how to load it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from imsvd_jax.base import hashing
from imsvd_jax.evaluation import results
from imsvd_jax.evaluation.protocols import FINAL


class Measured(NamedTuple):
  """One line of the table of accuracies, which are in [0, 1]."""

  what: str
  data: str
  value: float
  interval: tuple[float, float] | None = None


def measured(
  workdir: str | os.PathLike[str], variables: Mapping[str, Any]
) -> list[Measured]:
  """Returns the accuracies in a run's results.json of one set of weights.

  The closing table of the training run, baselines included, comes with the
  weights at its end. Online numbers are a substitute where there is none.

  Args:
    workdir: The run's directory; nothing is known about a file.
    variables: The weights.

  Raises:
    UserError: The file is not a results file.
  """
  path = epath.Path(workdir) / results.FILE_NAME
  if not path.exists():
    return []
  entries = [e for e in results.read_results(path) if e["final"] is not None]
  weights = hashing.checksum(variables)
  own = [e for e in entries if e["weights"] == weights]
  if any(e["protocol"] in FINAL for e in own):
    own = [e for e in own if not e["online"]]
    own = [e for e in entries if e["encoder"] != results.TRAINED] + own
  return [
    Measured(
      _what(entry),
      str(entry["data"].get("name", "")),
      entry["final"],
      tuple(entry["interval"]) if entry["interval"] else None,
    )
    for entry in own
  ]


def _what(entry: Mapping[str, Any]) -> str:
  if entry["online"]:
    return f"{entry['protocol']} (during training)"
  if entry["protocol"] in FINAL:
    return f"{entry['encoder']}, {entry['protocol']}"
  return entry["protocol"]


def model_card(
  *,
  file_name: str,
  metadata: Mapping[str, Any],
  loading: str,
  language: str,
  again: bool,
) -> str:
  """Returns the card, in Markdown.

  Args:
    file_name: Of the exported file.
    metadata: What the file says about itself.
    loading: Code in `language` that loads the file elsewhere.
    language: "python" or "yaml".
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
    f" antialiased), then the center",
    "Pixels": metadata["program_input"],
    "Mean, std": f"{mean}; {std} (of pixels in [0, 1])",
    "Computes in": metadata["dtype"],
    "Made by": f"imsvd_jax {metadata['imsvd_jax_version']}",
    "License": metadata["license"] or "not stated",
  }
  table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
  ours = ""
  if again:
    ours = f"""
With imsvd_jax, from such pixels of any size, resizing included:

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


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
  if not rows:
    return "The run has no evaluation of these weights.\n"
  lines = ["| what | data | accuracy | 95% interval |", "|---|---|---|---|"]
  for row in rows:
    interval = ""
    if row["interval"]:
      interval = " to ".join(f"{bound:.2%}" for bound in row["interval"])
    what, data, value = row["what"], row["data"], row["value"]
    lines.append(f"| {what} | {data} | {value:.2%} | {interval} |")
  return "\n".join(lines) + "\n"


def _numbers(values: Any) -> str:
  return ", ".join(f"{value:g}" for value in values)
