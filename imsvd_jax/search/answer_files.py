"""Answers as CSV and as a page of thumbnails."""

import base64
import csv
import html
import io

from imsvd_jax.base.errors import counted
from imsvd_jax.base.files import write_whole
from imsvd_jax.formats.untrusted import one_line
from imsvd_jax.search.questions import Answer
from imsvd_jax.search.store import Store

NUM_SHOWN = 500  # Thumbnails of a page.
_STYLE = (
  "body{font:14px system-ui,sans-serif;margin:2rem}"
  "h1{font-size:1.4rem;overflow-wrap:anywhere}"
  "main{display:flex;flex-wrap:wrap;gap:1rem}"
  "figure{margin:0;width:9rem;overflow-wrap:anywhere}"
  "img{width:9rem;image-rendering:pixelated}"
  "@media(prefers-color-scheme:dark){body{background:#111;color:#eee}}"
)


def as_csv(store: Store, answer: Answer) -> str:
  """Returns a row for each image: its name, its row, and the columns."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["path", "row", *answer.columns])
  for place, row in enumerate(answer.rows):
    values = [column[place] for column in answer.columns.values()]
    writer.writerow([store.name(row), row, *values])
  return file.getvalue()


def write_page(path: str, store: Store, answer: Answer) -> None:
  """Writes one HTML file that holds the thumbnails of the first images.

  Raises:
    UserError: The file cannot be written.
  """
  title = html.escape(one_line(answer.title))
  count = len(answer.rows)
  shown = min(count, NUM_SHOWN)
  figures = "\n".join(_figure(store, answer, i) for i in range(shown))
  text = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    # What a stranger's index says is text and pictures, and never runs.
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
    " img-src data:; style-src 'unsafe-inline'\">"
    f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    f"<p>{counted(count, 'image')}, {shown} shown.</p>\n<main>\n{figures}\n"
    "</main></html>\n"
  )
  write_whole(path, text.encode("utf-8", "backslashreplace"))


def _figure(store: Store, answer: Answer, place: int) -> str:
  row = answer.rows[place]
  picture = base64.b64encode(store.thumbnail(row)).decode()
  name = html.escape(store.name(row))
  lines = [f"{k}: {c[place]}" for k, c in answer.columns.items()]
  about = "<br>".join(html.escape(line) for line in [f"row: {row}", *lines])
  return (
    f'<figure><img src="data:image/jpeg;base64,{picture}" alt="{name}">'
    f"<figcaption>{name}<br>{about}</figcaption></figure>"
  )
