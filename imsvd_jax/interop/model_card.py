"""The model card beside an exported file: what it is, and how to load it.

Its head is YAML that the Hugging Face Hub reads.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
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
  metric: str = "top1"  # A name in `scores.METRICS`.


# The Hub's name of a metric, and ours.
_METRICS = {
  "top1": ("accuracy", "top-1 accuracy"),
  "mean_per_class": ("accuracy", "mean per-class accuracy"),
  "map_11_point": ("mAP", "11-point mean average precision"),
}
# Licenses by the Hub's names; all others are "other" there.
_LICENSE = re.compile(
  r"mit|apache-2\.0|bsd-[23]-clause|isc|unlicense|zlib|(a|l)?gpl-3\.0"
  r"|mpl-2\.0|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-4\.0|unknown|other"
)


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
      entry["hyperparameters"].get("metric", "top1"),
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
  language: str = "python",
  again: bool = True,
  library: str = "imsvd_jax",
  title: str = "",
) -> str:
  """Returns the card, in Markdown.

  Args:
    file_name: Of the exported file.
    metadata: What the file says about itself.
    loading: Code in `language` that loads the file elsewhere.
    language: "python" or "yaml".
    again: Whether `load_encoder` reads the file.
    library: Which loads the file, as the Hub names it.
    title: Of the card; by default the file's name.
  """
  title = title or file_name
  return f"""{_front_matter(title, metadata, library)}
# {title}

An image encoder pretrained without labels.

| | |
|---|---|
{_facts(metadata)}
## How to load it

```{language}
{loading.rstrip()}
```
{_loading_again(file_name) if again else ""}
## Evaluation

{_evaluation(metadata["evaluation"])}
The configuration of the run is in the file's metadata.
"""


def _facts(metadata: Mapping[str, Any]) -> str:
  """Returns the rows of the table at the top."""
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
  return "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _loading_again(file_name: str) -> str:
  """Returns how this package loads the file."""
  return f"""
With imsvd_jax, from such pixels of any size, resizing included:

```python
from imsvd_jax import load_encoder

features = load_encoder("{file_name}")(images)
```
"""


def _front_matter(title: str, metadata: Mapping[str, Any], library: str) -> str:
  """Returns the YAML at the head of the card."""
  known = ("imsvd_jax", library, metadata["objective"], metadata["network"])
  tags = [
    "self-supervised-learning",
    *(tag.split(" (")[0] for tag in known),
  ]
  content = {
    **_license(metadata["license"]),
    "library_name": library,
    "pipeline_tag": "image-feature-extraction",
    "tags": list(dict.fromkeys(filter(None, tags))),
  }
  measured = [_indexed(row) for row in metadata["evaluation"] if _own(row)]
  if measured:
    content["metrics"] = sorted({m["metrics"][0]["type"] for m in measured})
    content["model-index"] = [{"name": title, "results": measured}]
  text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
  return f"---\n{text}---\n"


def _license(name: str) -> dict[str, str]:
  if not name:
    return {}
  if _LICENSE.fullmatch(name.lower()):
    return {"license": name.lower()}
  return {"license": "other", "license_name": name}


def _own(row: Mapping[str, Any]) -> bool:
  """Whether a number is the trained encoder's, and not a baseline's."""
  return not row["what"].startswith((results.RANDOM_INIT, results.RAW_PIXELS))


def _metric(row: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the Hub's name of a number's metric, and ours."""
  name = str(row.get("metric", "top1"))
  return _METRICS.get(name, (name, name))


def _indexed(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a number as the Hub's `model-index` has it."""
  kind, name = _metric(row)
  data = row["data"] or "not stated"
  return {
    "task": {"type": "image-classification", "name": row["what"]},
    "dataset": {"type": data, "name": data},
    "metrics": [{"type": kind, "name": name, "value": row["value"]}],
  }


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
  if not rows:
    return "The run has no evaluation of these weights.\n"
  lines = ["| what | data | accuracy | 95% interval |", "|---|---|---|---|"]
  for row in rows:
    interval = ""
    if row["interval"]:
      interval = " to ".join(f"{bound:.2%}" for bound in row["interval"])
    what, data, value = row["what"], row["data"], row["value"]
    if (metric := _metric(row)) != _METRICS["top1"]:
      what += f" ({metric[1]})"
    lines.append(f"| {what} | {data} | {value:.2%} | {interval} |")
  return "\n".join(lines) + "\n"


def _numbers(values: Any) -> str:
  return ", ".join(f"{value:g}" for value in values)
