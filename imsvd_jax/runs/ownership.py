"""Whether a run is this user's own, so that it may name data to be read.

A run from elsewhere could name any path. A run that was trained here is signed:
`owner.json` holds HMACs of its config's `data` under a random key that only
this user can read. The path of the run does not count, so that it can move.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets

import jax
from etils import epath
from ml_collections import ConfigDict

from imsvd_jax.base import console, files
from imsvd_jax.base.config import as_json
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import WITHOUT_FILES
from imsvd_jax.runs import run_directory

OWNER_FILE = "owner.json"
# Sources that read no files of the user; "": weights that name no data.
GENERATED = ("", *WITHOUT_FILES)


def sign(workdir: str | os.PathLike, config: ConfigDict) -> None:
  """Signs a run that this user trains; says so where that is not possible."""
  if jax.process_index() or _reads_nothing(config):
    return
  path = epath.Path(workdir) / OWNER_FILE
  try:
    signature = _signature(_key(create=True), config)
    known = _signatures(path)
    if signature in known:
      return
    text = json.dumps({"signatures": [*known, signature]})
    files.write_whole(path, f"{text}\n".encode())
  except (OSError, UserError) as error:
    console.say(
      f"This run is not signed as yours ({error}): evaluate and explain will"
      " ask for --data or --trust_workdir."
    )


def check_data(
  workdir: str | os.PathLike, config: ConfigDict, *, trusted: bool
) -> None:
  """Checks that a run may choose what is read.

  Args:
    workdir: The run's directory, or a file of weights.
    config: Its recipe.
    trusted: Whether the user confirmed it.

  Raises:
    UserError: It is not signed by this user, and names data.
  """
  if trusted or _reads_nothing(config):
    return
  directory, _ = run_directory.locate(workdir)
  reason = "it is a file of weights"
  if not directory.is_file():
    try:
      signature = _signature(_key(create=False), config)
      if any(map(signature.__eq__, _signatures(directory / OWNER_FILE))):
        return
      reason = "its data are not signed with your key"
    except OSError as error:
      reason = f"your key cannot be read: {error}"
  data = config.data
  raise UserError(
    f"{workdir} may be someone else's ({reason}), and its recipe would read"
    f" {data.name}{f' in {data.path}' if data.get('path') else ''}; name the"
    " data with --data=NAME=PATH, or confirm with --trust_workdir."
  )


def _reads_nothing(config: ConfigDict) -> bool:
  return config.data.get("name", "").partition(":")[0] in GENERATED


def _signature(key: bytes, config: ConfigDict) -> str:
  data = json.dumps(as_json(config.data.to_dict()), sort_keys=True)
  return hmac.new(key, data.encode(), hashlib.sha256).hexdigest()


def _signatures(path: epath.Path) -> list[str]:
  """Returns what a run's file holds; anything else counts as nothing."""
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
    if path.is_file():
      return [str(s) for s in json.loads(path.read_text())["signatures"]]
  return []


def _key(*, create: bool) -> bytes:
  """Returns this user's key, of mode 0600; raises OSError if there is none."""
  state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
  path = pathlib.Path(os.path.expanduser(state), "imsvd_jax", "key")
  if create and not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"key.{secrets.token_hex(8)}")
    temporary.touch(mode=0o600, exist_ok=False)
    temporary.write_bytes(secrets.token_bytes(32))
    with contextlib.suppress(FileExistsError):
      os.link(temporary, path)  # Whole, and the first of two wins.
    temporary.unlink()
  return path.read_bytes()
