"""The built wheel in an environment of its own, outside of the checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import nbformat
import pytest

import imsvd_jax
from imsvd_jax.base import recipe_files

ROOT = pathlib.Path(__file__).parents[1]


def run(*command: str, cwd: pathlib.Path) -> str:
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  environment.pop("PYTHONPATH", None)
  done = subprocess.run(
    command,
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  copy = folder / "checkout"  # A build leaves files beside setup.py.
  run(
    "git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), str(copy), cwd=folder
  )
  build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist")
  run(*build, cwd=copy)
  (found,) = (copy / "dist").glob("*.whl")
  return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """Programs of a new environment that borrows the libraries of this one."""
  folder = tmp_path_factory.mktemp("environment")
  venv.create(folder / "env", with_pip=False)
  python = folder / "env/bin/python"
  run(
    *(sys.executable, "-m", "pip", "--python", str(python), "install"),
    *("--quiet", "--no-deps", "--no-index", str(wheel)),
    cwd=folder,
  )
  site = next((folder / "env/lib").glob("python*/site-packages"))
  # A line of a path: its own .pth files, such as this checkout's, do not count.
  (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
  return folder / "env/bin"


@pytest.mark.proof
def test_a_wheel_trains_embeds_and_exports_by_name(installed, tmp_path):
  imsvd = str(installed / "imsvd")
  assert (
    run(imsvd, "--version", cwd=tmp_path)
    .strip()
    .endswith(imsvd_jax.__version__)
  )
  where = run(
    *(str(installed / "python"), "-c"),
    "import imsvd_jax; print(imsvd_jax.__file__)",
    cwd=tmp_path,
  )
  assert where.startswith(str(installed.parent))
  listed = run(imsvd, "recipes", cwd=tmp_path)
  assert set(recipe_files.names()) == set(re.findall(r"^\w+", listed, re.M))

  run(imsvd, "train", "--config=digits:debug", "--workdir=run", cwd=tmp_path)
  run(
    *(imsvd, "embed", "--workdir=run", "--split=train"),
    *("--trust_workdir", "--output=features.npz"),
    cwd=tmp_path,
  )
  run(
    *(imsvd, "export", "--workdir=run", "--format=safetensors"),
    "--output=encoder.safetensors",
    cwd=tmp_path,
  )
  assert (tmp_path / "encoder.safetensors.md").exists()

  # A copy of a recipe works where it is.
  run(imsvd, "recipes", "copy", "digits", "mine.py", cwd=tmp_path)
  run(imsvd, "train", "--config=mine.py:debug", "--workdir=mine", cwd=tmp_path)


@pytest.mark.proof
def test_links_of_the_description_lead_to_the_repository(tmp_path):
  for name in ("setup.py", "README.md", "LICENSE", "configs/__init__.py"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / "imsvd_jax").mkdir()
  (tmp_path / "imsvd_jax/__init__.py").write_text(
    '__version__ = "1.0"\nREPOSITORY = "https://example.org/us/it"\n'
  )
  build = "from setuptools import build_meta as b"
  build += "; b.prepare_metadata_for_build_wheel('.')"
  run(sys.executable, "-c", build, cwd=tmp_path)
  text = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
  targets = re.findall(r"\]\(([^)]+)\)", text)
  assert all(target.startswith("https://") for target in targets), targets
  assert "https://example.org/us/it/raw/HEAD/docs/images/" in text
  assert "(https://example.org/us/it/blob/HEAD/docs/data.md)" in text


@pytest.mark.proof
def test_a_wheel_holds_what_it_needs_and_no_more(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert "imsvd_jax/py.typed" in names
  assert "imsvd_jax/recipes/configs/digits.py" in names
  pages = ROOT.glob("imsvd_jax/explain/explorer/static/*")
  for path in [*pages, ROOT / "imsvd_jax/explain/explorer"]:
    assert any(n.startswith(str(path.relative_to(ROOT))) for n in names), path
  tops = {name.partition("/")[0] for name in names}
  assert tops == {"imsvd_jax", f"imsvd_jax-{imsvd_jax.__version__}.dist-info"}


def test_the_address_of_the_project_is_one():
  notebook = nbformat.read(ROOT / "launch/colab.ipynb", as_version=4)
  (settings,) = (c for c in notebook.cells if "INSTALL = True" in c.source)
  address = re.search(r'^REPOSITORY = "([^"]*)"', settings.source, re.M)[1]
  assert address == imsvd_jax.REPOSITORY
  badge = "colab.research.google.com" in (ROOT / "README.md").read_text()
  assert badge == bool(address)
