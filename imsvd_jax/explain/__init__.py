"""What did it learn? Analysis, figures and an explorer for people.

Given functions of images (a `Subject`) and a data set (`Images`), `explain`
writes exact statistics of the code, publication figures and an HTML folder.
Importing this package imports nothing heavy: names load on first use.
"""

import importlib
from typing import Any

_MODULES = {
  "Analysis": "analysis",
  "Encoding": "subject",
  "ExplainOptions": "explain_options",
  "Images": "images",
  "Report": "report",
  "Subject": "subject",
  "TwoViews": "images",
  "analyze": "measurement",
  "explain": "report",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  return getattr(module, name)
