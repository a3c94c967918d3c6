"""The Colab notebook, from top to bottom, on the CPU, with a tiny network."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
FLAGS = [
  "--config.epochs=1.0",
  "--config.batch_size=128",
  "--config.optimizer.warmup_epochs=0.0",
  "--config.model.width_multiplier=0.125",
  "--config.model.projector=(32,16)",
  "--config.objective.imsvd.num_bins=4",
  "--config.eval.every_epochs=1.0",
  "--config.eval.final=False",
]


def read_notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def output_of(cell) -> str:
  return "".join(o.get("text", "") for o in cell.outputs)


def images_in(cell) -> int:
  return sum("image/png" in o.get("data", {}) for o in cell.outputs)


def test_the_notebook_is_kept_without_outputs():
  notebook = read_notebook()
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.proof
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
  # A shell's kernel, not the eight devices of the tests.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  notebook = read_notebook()
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  (parameters,) = (
    c for c in code if "parameters" in c.metadata.get("tags", "")
  )
  parameters.source += (
    f"\nINSTALL = False\nWORKDIR = {str(tmp_path)!r}\nFLAGS = {FLAGS!r}"
  )
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    startup_timeout=600,
    kernel_name="python3",
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  ).execute()

  said = "\n".join(map(output_of, code))
  assert "Runtime: cpu" in said
  assert re.search("online.*: k-NN", said)
  assert "k-NN accuracy on 360 held-out images" in said
  curves, neighbors = (c for c in code if "plt.subplots" in c.source)
  assert images_in(curves) == images_in(neighbors) == 1
  (figures,) = (c for c in code if "figures" in c.source and images_in(c))
  assert images_in(figures) == len(list(tmp_path.glob("explain/figures/*.png")))
  assert images_in(figures) > 3
  (explorer,) = (c for c in code if "IFrame" in c.source)
  shown = explorer.outputs[0]["data"]["text/html"]
  assert "http://127.0.0.1:" in shown  # Tests bind to this machine alone.
  assert (tmp_path / "explain/explorer/index.html").exists()
  assert (tmp_path / "encoder.pth").exists()
