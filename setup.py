"""Package description; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
PACKAGE = (ROOT / "imsvd_jax/__init__.py").read_text()
VERSION = re.search(r'__version__ = "(.+)"', PACKAGE).group(1)
REPOSITORY = re.search(r'REPOSITORY = "(.*)"', PACKAGE).group(1)
# Orbax imports it, undeclared, for checkpoints on gs://.
GCS = ["google-cloud-storage>=2.18"]

# A package index shows the README, where links to files lead nowhere.
README = (ROOT / "README.md").read_text()
if REPOSITORY:
  for before, view in ((r"(!\[[^]]*\]\()", "raw"), (r"(\]\()", "blob")):
    address = rf"\1{REPOSITORY}/{view}/HEAD/"
    README = re.sub(before + r"(?!https:|#)", address, README)

# The recipes travel with the wheel; see imsvd_jax/base/recipe_files.py.
RECIPES = "imsvd_jax.recipes.configs"

setuptools.setup(
  name="imsvd_jax",
  version=VERSION,
  description=(
    "Self-supervised image representation learning with discrete,"
    " information-theoretic, explainable embeddings, in JAX"
  ),
  long_description=README,
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Recognition",
    "Typing :: Typed",
  ],
  keywords="self-supervised representation-learning jax flax explainable",
  project_urls={
    "Paper": "https://arxiv.org/abs/2501.03469",
    **({"Source": REPOSITORY} if REPOSITORY else {}),
  },
  packages=[
    *setuptools.find_packages(include=["imsvd_jax", "imsvd_jax.*"]),
    RECIPES,
  ],
  package_dir={RECIPES: "configs"},
  package_data={
    "imsvd_jax": ["py.typed"],
    "imsvd_jax.explain.explorer": ["*.j2", "static/*"],
  },
  entry_points={"console_scripts": ["imsvd = imsvd_jax.__main__:main"]},
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "clu>=0.0.12",
    "etils[epath]>=1.14",
    "flax>=0.12",
    "importlib_resources>=6.0",  # tensorflow-datasets needs it, undeclared.
    "jax>=0.10,<0.12",
    "jinja2>=3.1.6",
    "matplotlib>=3.8.4",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=12.2",
    "pyyaml>=6",
    "safetensors>=0.4",
    "scikit-learn>=1.5",
    "scipy>=1.14",
    "tensorboard>=2.20",  # clu needs it, undeclared.
    "tensorflow-datasets>=4.9.10",
    "tifffile>=2024.8.30",  # TIFF of more than 8 bits or 4 channels.
    # Not tensorflow-cpu: beside an installed tensorflow, as on Colab, it
    # replaces its files.
    "tensorflow>=2.20",
  ],
  extras_require={
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "docs": [
      "furo>=2025.9",
      "myst-parser>=5",
      "sphinx>=8.2",
      "sphinx-copybutton>=0.5.2",
      "sphinxcontrib-programoutput>=0.18",
    ],
    "formats": [
      "imagecodecs>=2024.6.1",
      "pillow-heif>=0.18",
      "pillow-jxl-plugin>=1.2",
    ],
    "gcs": GCS,
    "search": ["faiss-cpu>=1.9"],
    "tpu": ["jax[tpu]", *GCS],  # A pod's runs are in a bucket.
    # Before 2.10 a weights file can run code, whatever `weights_only` says
    # (CVE-2025-32434, CVE-2026-24747).
    "torch": ["torch>=2.10"],
    "test": [
      "build>=1.2",  # The wheel.
      "faiss-cpu>=1.9",
      "ipykernel>=6.29",  # With the two that follow: the Colab notebook.
      "nbclient>=0.10",
      "mypy>=1.18",
      "nbformat>=5.10",
      "pyarrow>=17",
      "pytest>=8",
      "pytest-xdist>=3.5",
      "ruff>=0.15",
      "setuptools>=78.1.1",  # Builds the wheel without a network.
    ],
  },
)
