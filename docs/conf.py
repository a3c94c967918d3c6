"""The documentation site: `sphinx-build -W -b html docs FOLDER`.

The pages are the Markdown files of this folder. The reference is made from
docstrings and `--help`, so it needs the package itself, installed.
"""

import pathlib
import re

import imsvd_jax

ROOT = pathlib.Path(__file__).parents[1]

project = "imsvd_jax"
author = "The authors of imsvd_jax"
version = release = imsvd_jax.__version__
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "sphinxcontrib.programoutput",
]
exclude_patterns = ["measurements"]
html_theme = "furo"
html_title = "imsvd_jax"
html_show_sourcelink = False
myst_heading_anchors = 4
default_role = "code"  # Docstrings write `name` for code.
autodoc_typehints = "none"  # The docstrings give shapes and units.
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# `$ command` and `>>>` are not copied.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True


def _links_out_of_the_site(app, name: str, source: list[str]) -> None:
  """Turns links to the repository's other files into downloads or names.

  On GitHub such a link opens the file. Here a page of this folder is a page,
  another file is offered for download, and a folder is just named.
  """
  folder = pathlib.Path(app.srcdir, name).parent

  def replace(match: re.Match[str]) -> str:
    text, target = match.groups()
    file, _, anchor = target.partition("#")
    path = (folder / file).resolve()
    if not file or path.is_relative_to(app.srcdir) or not path.exists():
      return match[0]
    page = PAGES.get(path.relative_to(ROOT).as_posix())
    if page:
      up = "../" * name.count("/")
      return f"[{text}]({up}{page}{'#' * bool(anchor)}{anchor})"
    if path.is_dir():
      return f"`{path.relative_to(ROOT)}`"
    return f"{{download}}`{text.strip('`')} <{file}>`"

  source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)", replace, source[0])


# Files outside of this folder that are pages of the site.
PAGES = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}


def setup(app) -> None:
  """Registers the hook."""
  app.connect("source-read", _links_out_of_the_site)
