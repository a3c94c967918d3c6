"""Decodes and resizes each image once, for training that waits for the host.

  imsvd pack --data=folder:~/images --output=images.pack
  imsvd train --config=folder_r50 --config.data.name=pack \\
    --config.data.path=images.pack

The pack holds each image as a square of --size pixels, with its sides, label,
class and name; views are cut from it on the devices, with the proportions of
the image. Unreadable images are left out, counted and named. The same command
goes on after a stop, and repairs a damaged pack. Several runs can share one.
--config (by default folder_r50) has the settings of data, such as channels,
exif, labels, holdout and the names of splits; --config.data.KEY changes one.
"""

from absl import flags
from ml_collections import ConfigDict

from imsvd_jax.commands import command_line, option_flags, shared_flags


def _sources(config: ConfigDict, data: str) -> dict:
  """Returns the train and evaluation splits of the data, by their names."""
  from imsvd_jax.data import make_source, named

  named.check(data)
  settings = config.data
  own = {key: settings[key] for key in named.OF_ITS_OWN_DATA}
  named.choose(settings, data)
  settings.update(own)  # They are meant for these data.
  sources = {settings.train_split or "train": make_source(settings, "train")}
  evaluation = make_source(settings, "eval")
  if evaluation is not None:
    sources[settings.eval_split] = evaluation
  return sources


def run() -> None:
  """Runs the command line."""
  # Late imports keep --help fast.
  from imsvd_jax.data.pack_options import PackOptions

  config = shared_flags.define_config(default="folder_r50")
  data = flags.DEFINE_string(
    "data", None, "The images: folder:DIR, arrays:FILE, tar:DIR or tfds:NAME."
  )
  output = flags.DEFINE_string("output", None, "Folder of the pack.")
  options = option_flags.define_flags(PackOptions)

  def pack() -> None:
    from imsvd_jax.data import tensorflow_needed

    with tensorflow_needed("`imsvd pack`"):
      from imsvd_jax.data import packing
    sources = _sources(config.value, data.value)
    print("\n".join(packing.pack(output.value, sources, options())))

  command_line.run(
    pack,
    required={"data": "folder:~/images", "output": "images.pack"},
    about=__doc__,
  )
