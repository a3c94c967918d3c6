"""Files of weights from strangers: each is read, or refused in one line.

No sizes, names or structure that a file claims may cost more time or memory
than the file itself is large.
"""

import collections
import contextlib
import io
import json
import os
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import untrusted
from imsvd_jax.runs import weight_files
from tests.formats.test_files import METADATA, tensors
from tests.formats.test_names import TINY, variables_of
from tests.run_command import one_line_error

VARIABLES = variables_of(TINY)
STATE = formats.to_torchvision(VARIABLES)
DEEP = "[" * 100_000


def refuse(path, message):
  """Reading is refused in one printable line, at once, without memory."""
  start = time.monotonic()
  tracemalloc.start()
  with one_line_error(message) as error:
    formats.read_file(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  text = str(error.value)
  assert text.isprintable()
  assert os.fspath(path) in text
  assert len(text) < 1500
  assert peak < 30 * os.path.getsize(path) + 2**26
  assert time.monotonic() - start < 5


# ---- safetensors -----------------------------------------------------------


def tensor(shape=(0,), offsets=(0, 0), dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_safetensors(path, metadata=(), extra=(), text=None):
  """Writes STATE by hand, with anything added to the header."""
  header, data = {"__metadata__": dict(metadata)}, b""
  for name, value in STATE.items():
    raw = np.ascontiguousarray(value).tobytes()
    kind = {"float32": "F32", "int64": "I64"}[value.dtype.name]
    offsets = [len(data), len(data) + len(raw)]
    header[name] = tensor(value.shape, offsets, kind)
    data += raw
  header = (text or json.dumps)({**header, **dict(extra)}).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + data)
  return path


def twice(header):
  entry = json.dumps(header["bn1.weight"])
  return f'{json.dumps(header)[:-1]}, "bn1.weight": {entry}}}'


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"metadata": {"config": DEEP + "]" * 100_000}}, "nested too deeply"),
    ({"metadata": {"config": "[" * 40 + "]" * 40}}, "nested too deeply"),
    ({"metadata": {"config": f"[{'1' * 6000}]"}}, "'config' is not JSON"),
    ({"metadata": {"config": f"[{2**70}]"}}, "number is too large"),
    ({"extra": {f"layer{10**15}.0.x": tensor()}}, "unexpected layer1000"),
    ({"extra": {f"layer{'9' * 5000}.0.x": tensor()}}, r"layer9+\.\.\."),
    ({"extra": {f"projector.{'9' * 5000}.x": tensor()}}, "unexpected proj"),
    ({"extra": {"a\nb\x1b[31m": tensor()}}, r"unexpected a\\nb\\x1b\[31m"),
    ({"extra": {"x" * 10**6: tensor()}}, r"unexpected x+\.\.\."),
    ({"extra": {"module.bn1.bias": tensor()}}, "two names of one tensor"),
    (
      {"extra": {"layer2.0.shortcut.0.weight": tensor()}},
      r"layer2\.0\.shortcut\.0\.weight, two names of one tensor",
    ),
    (
      {"extra": {f"a{i}": tensor() for i in range(20_000)}},
      "expected at most 20,000",
    ),
    ({"extra": {"bn1.weight": tensor((-4,), (0, 16))}}, "not a complete"),
    ({"extra": {"bn1.weight": tensor((2**62, 8), (0, 0))}}, "not a complete"),
    ({"extra": {"a": tensor((4,), (0, 16))}}, "not a complete"),  # Overlaps.
    ({"text": twice}, "two entries of one name"),
  ],
)
def test_safetensors(change, message, tmp_path):
  refuse(write_safetensors(tmp_path / "x.safetensors", **change), message)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (struct.pack("<Q", 2**47) + b"{}", "not a complete"),
    (struct.pack("<Q", 5) + b'{"\xff"', "not a complete"),
    (struct.pack("<Q", 10**5) + b'{"a":' * 20_000, "not a complete"),
  ],
)
def test_headers_of_safetensors(content, message, tmp_path):
  (tmp_path / "x").write_bytes(content)
  refuse(tmp_path / "x", message)


@pytest.mark.parametrize("step", ["1" * 6000, "1" * 30, "-1", "12k", "٣" * 12])
def test_a_step_that_is_none_is_zero(step, tmp_path):
  path = write_safetensors(tmp_path / "x", {"step": step})
  assert weight_files.stored_step(formats.read_file(path)) == 0


def test_numbers_that_json_lacks_are_null(tmp_path):
  metadata = {"a": '{"b": [NaN, 1e999, -Infinity, 1.5]}', "c": "[draft]"}
  path = write_safetensors(tmp_path / "x", metadata)
  found = formats.read_file(path).metadata
  assert found == {"a": {"b": [None, None, None, 1.5]}, "c": "[draft]"}


def test_what_float32_cannot_hold_is_not_finite(tmp_path):
  from safetensors.numpy import save_file

  wide = {
    name: value.astype(np.float64) if value.ndim else value
    for name, value in STATE.items()
  }
  save_file(wide, tmp_path / "x")
  formats.read_file(tmp_path / "x")
  wide["bn1.bias"][1] = 1e300
  save_file(wide, tmp_path / "x")
  refuse(tmp_path / "x", r"bn1\.bias holds values that are not finite")


@pytest.mark.parametrize("name", ["conv1.weight", "projector"])
def test_a_layer_of_nothing_is_refused(name, tmp_path):
  from safetensors.numpy import save_file

  state = formats.to_torchvision(VARIABLES, projector=True)
  if name == "projector":
    state["projector.0.weight"] = state["projector.0.weight"][:0]
  else:
    state["backbone.conv1.weight"] = state["backbone.conv1.weight"][:, :0]
  save_file({k: np.array(v) for k, v in state.items()}, tmp_path / "x")
  refuse(tmp_path / "x", "without inputs or outputs")


# ---- NumPy -----------------------------------------------------------------


def npy(value):
  buffer = io.BytesIO()
  np.lib.format.write_array(buffer, np.asarray(value))
  return buffer.getvalue()


def header(text, data=b""):
  return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


def claim(shape, descr="<f4"):
  return f"{{'descr':'{descr}','fortran_order':False,'shape':{shape}}}"


@pytest.fixture
def write_npz(tmp_path):
  """Returns a function that adds members to a good file."""
  path = tmp_path / "x.npz"
  formats.write_file(path, VARIABLES, format_name="numpy", metadata={})
  with zipfile.ZipFile(path) as archive:
    good = {name: archive.read(name) for name in archive.namelist()}

  def write(members, method=zipfile.ZIP_STORED):
    members = {name + ".npy": content for name, content in members.items()}
    with zipfile.ZipFile(path, "w", method) as archive:
      for name, content in {**good, **members}.items():
        archive.writestr(name, content)
    return path

  return write


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ({"metadata": npy(DEEP)}, "metadata is not JSON"),
    ({"metadata": npy(f"[{'1' * 9999}]")}, "metadata is not JSON"),
    ({"metadata": npy(np.ones(5))}, "metadata is not JSON"),
    ({"params/" + "a/" * 3000 + "b": npy([1.0])}, "3002 levels"),
    ({"params/" + "a/" * 32_000 + "b": npy([1.0])}, "32002 levels"),
    ({"params/projector/dense_²/kernel": npy([1.0])}, "unexpected.*dense_²"),
    ({f"params/projector/dense_{'9' * 5000}/b": npy([1.0])}, "unexpected"),
    ({"a": header(claim((2**45,)))}, "not a complete .npz"),
    ({"a": header(claim((2**62, 8)))}, "not a complete .npz"),
    ({"a": header(claim((-1,)), b"1234")}, "not a complete .npz"),
    ({"a": header(claim((1,), "|O"), b"\x80\x04]q.")}, "plain arrays"),
    ({"a": header(claim((2**40,), "|V0"))}, "V0 values"),
    ({"a": header("-" * 9000 + "1")}, "not a complete .npz"),
    ({"a": header("[" * 9000)}, "not a complete .npz"),
    ({"a": b""}, "not a complete .npz"),
  ],
)
def test_numpy(members, message, write_npz):
  refuse(write_npz(members), message)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression_is_refused(method, write_npz):
  refuse(write_npz({}, method), "unusual method")


def test_two_members_of_one_name_are_refused(write_npz):
  path = write_npz({})
  name = "params/backbone/bn1/bias.npy"
  with zipfile.ZipFile(path, "a") as archive, pytest.warns(match="Dup"):
    archive.writestr(name, npy(np.ones(4)))
  refuse(path, f"{name} is twice")


def test_other_precisions_and_byte_orders_become_float32(tmp_path, write_npz):
  with np.load(write_npz({})) as file:
    arrays = {name: file[name] for name in file.files if name != "metadata"}
  path = tmp_path / "other.npz"
  for kind in (">f4", "<f8"):
    np.savez_compressed(path, **{n: a.astype(kind) for n, a in arrays.items()})
    found = formats.read_file(path).variables["params"]["backbone"]["bn1"]
    assert found["bias"].dtype == np.float32
    assert found["bias"].dtype.isnative
    expected = arrays["params/backbone/bn1/bias"]
    np.testing.assert_array_equal(found["bias"], expected)


# ---- torch -----------------------------------------------------------------


def write_bomb(path, name, start=b""):
  """Writes an archive of 3 MB that unpacks to 3 GiB."""
  with (
    zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
    archive.open(name, "w", force_zip64=True) as file,
  ):
    file.write(start)
    for _ in range(48):
      file.write(bytes(2**26))
  return path


@pytest.mark.proof
@pytest.mark.parametrize("name", ["a.npy", "archive/data/0"])
def test_bombs_are_refused_before_they_are_unpacked(name, tmp_path):
  path = tmp_path / "x"
  if name != "a.npy":
    pytest.importorskip("torch").save(tensors(STATE), path)
  start = header(claim((3 * 2**28,))) if name == "a.npy" else b""
  refuse(write_bomb(path, name, start), r"would unpack to 3,22\d,")


def test_a_size_far_beyond_the_files_is_refused(tmp_path):
  path = tmp_path / "x"
  path.write_bytes(bytes(2**20))
  untrusted.check_size(path, 2**25)
  with one_line_error("has 1,048,576 bytes and would unpack to 33,554,433"):
    untrusted.check_size(path, 2**25 + 1)


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def shared(depth):
  value = (1,)
  for _ in range(depth):
    value = (value, value)
  return value


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (lambda torch: torch.zeros(1).expand(2**36), "would unpack to 274,877"),
    (lambda torch: torch.empty(2**40, device="meta"), "would unpack to"),
    (lambda torch: torch.empty(2, device="meta"), "expected a dense tensor"),
    (lambda torch: torch.zeros(4, dtype=torch.complex64).conj(), "is complex"),
    (lambda torch: torch.zeros(4, 4).to_sparse(), "expected a dense tensor"),
  ],
)
def test_torch_tensors_of_other_kinds(entry, message, torch, tmp_path):
  torch.save({**tensors(STATE), "a": entry(torch)}, tmp_path / "x")
  refuse(tmp_path / "x", message)


def test_entries_that_print_without_end(torch, tmp_path):
  torch.save({shared(18): 1, "a\nb": 2, "model": 3}, tmp_path / "x")
  refuse(tmp_path / "x", r"holds entries 'a tuple', 'a\\nb', 'model'")
  torch.save({shared(18): 1, "model": tensors(STATE)}, tmp_path / "x")
  assert formats.read_file(tmp_path / "x").ignored == ("a tuple",)


def cycle():
  value = [1]
  value.append(value)
  return value


def test_metadata_that_is_not_json_is_left_out(torch, tmp_path):
  path = tmp_path / "x"
  for value in (shared(60), cycle(), torch.zeros(2), {3: 4}, 10**30):
    state = collections.OrderedDict(tensors(STATE))
    state.metadata = {"config": value}
    torch.save(state, path)
    assert formats.read_file(path).metadata == {}
  state.metadata = {"a": (1, float("nan")), "b": {"c": True}}
  torch.save(state, path)
  found = formats.read_file(path).metadata
  assert found == {"a": [1, None], "b": {"c": True}}


def test_attributes_that_hide_methods(torch, tmp_path):
  state = collections.OrderedDict(tensors(STATE))
  path = tmp_path / "x"
  state.valuez = state.itemz = 3
  torch.save(state, path, _use_new_zipfile_serialization=False)
  patched = path.read_bytes().replace(b"valuez", b"values")
  path.write_bytes(patched.replace(b"itemz", b"items"))
  assert read_or_refuse(path)


def test_both_spellings_of_a_tensor_are_refused(torch, tmp_path):
  state = tensors(STATE)
  state = {**state, "stem.conv1.weight": state["conv1.weight"]}
  torch.save({"model": state}, tmp_path / "x")
  refuse(tmp_path / "x", "two names of one tensor")


def read_or_refuse(path):
  """Returns whether a file can be read; an error must be one line."""
  with contextlib.suppress(UserError):
    formats.read_file(path)
    return True
  with one_line_error(None) as error:
    formats.read_file(path)
  assert str(error.value).isprintable()
  return False


# ---- any damage ------------------------------------------------------------


def mutate(content, rng):
  """Returns the content with random damage, mostly where the structure is."""
  content = bytearray(content)
  for _ in range(rng.integers(1, 4)):
    edge = min(4096, len(content))
    at = int(rng.integers(edge))
    at = len(content) - 1 - at if rng.random() < 0.5 else at
    if rng.random() < 0.2:
      at = int(rng.integers(len(content)))
    number = rng.choice([0, 1, 0x7F, 0x80, 0xFF, 256])
    filled = rng.bytes(8) if number == 256 else bytes([number]) * 8
    size = int(rng.choice([1, 2, 4, 8]))
    kind = rng.integers(4)
    if kind == 0:
      content[at : at + size] = filled[:size]
    elif kind == 1:
      content[at : at + size] = b""
    elif kind == 2:
      content[at:at] = content[at : at + 64]
    else:
      content[at] ^= 1 << rng.integers(8)
  if rng.random() < 0.1:
    content = content[: rng.integers(1, len(content))]
  return bytes(content)


@pytest.mark.parametrize("kind", [*formats.FORMATS, "legacy torch"])
def test_random_damage_is_one_line(kind, tmp_path):
  """Success or a UserError: no other exception, no hang."""
  path = tmp_path / "x"
  if kind not in ("numpy", "safetensors"):
    torch = pytest.importorskip("torch")
  if kind == "legacy torch":
    state = tensors(STATE)
    torch.save(state, path, _use_new_zipfile_serialization=False)
  elif kind in ("timm", "detectron2"):
    pytest.skip("torch files too")
  else:
    formats.write_file(path, VARIABLES, format_name=kind, metadata=METADATA)
  good = path.read_bytes()
  rng = np.random.default_rng(0)
  start = time.monotonic()
  read = 0
  for _ in range(150):
    path.write_bytes(mutate(good, rng))
    read += read_or_refuse(path)
  assert read < 100
  assert time.monotonic() - start < 60


# ---- writing ---------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["numpy", "safetensors"])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(format_name, mask, tmp_path):
  path = tmp_path / "x"
  before = os.umask(mask)
  try:
    formats.write_file(
      path, VARIABLES, format_name=format_name, metadata=METADATA
    )
  finally:
    os.umask(before)
  assert path.stat().st_mode & 0o777 == 0o666 & ~mask


# ---- the recipe in the metadata --------------------------------------------

RECIPE = {
  "model": {"dtype": "float32"},
  "data": dict(weight_files.IMAGENET_DATA),
  "objective": {"name": ""},
}


@pytest.mark.parametrize(
  ("part", "key", "value"),
  [
    ("model", "dtype", "nonsense"),
    ("model", "dtype", ["float32"]),
    ("data", "channels", "x"),
    ("data", "crop", 10**9),
    ("data", "mean", "abc"),
    ("data", "std", [None, 1.0, 1.0]),
    ("data", "std", [1.0, 1.0]),
    ("data", "interpolation", {"a\n": 3}),
    ("objective", "name", ["imsvd"]),
    ("objective", "name", "none\nsuch"),
  ],
)
def test_a_recipe_of_wrong_values_is_refused(part, key, value, tmp_path):
  recipe = {name: dict(keys) for name, keys in RECIPE.items()}
  recipe[part][key] = value
  path = write_safetensors(tmp_path / "x", {"config": json.dumps(recipe)})
  with one_line_error(f"The recipe in {path} has .*{part}.{key}"):
    weight_files.read(str(path), None)


def test_a_recipe_of_wrong_names_is_refused(tmp_path):
  config = json.dumps({**RECIPE, "a.b": 3})
  path = write_safetensors(tmp_path / "x", {"config": config})
  with one_line_error("cannot be read"):
    weight_files.read(str(path), None)


def test_a_recipe_of_right_values_is_read(tmp_path):
  path = write_safetensors(tmp_path / "x", {"config": json.dumps(RECIPE)})
  assert weight_files.read(str(path), None).config.data.crop == 224
