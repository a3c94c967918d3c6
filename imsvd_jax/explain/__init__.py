"""What did it learn? Analysis, figures and an explorer for people.

Given functions of images (a `Subject`) and batches of a data set, `explain`
writes exact statistics of the code, publication figures and an HTML folder.
"""

from imsvd_jax.explain.analysis import Analysis, analyse
from imsvd_jax.explain.probes import PROBES, flip_rates
from imsvd_jax.explain.report import Report, explain
from imsvd_jax.explain.subject import Encoding, Subject

__all__ = [
  "PROBES",
  "Analysis",
  "Encoding",
  "Report",
  "Subject",
  "analyse",
  "explain",
  "flip_rates",
]
