"""Reads the text of a compiled XLA program and counts what it does.

XLA's own cost analysis counts the body of a loop once, the traffic of on-chip
memory as if it were the chip's main memory, and no collectives. This counts
every instruction as often as it runs: loops by their trip count, asynchronous
collectives once, memory traffic only where the compiler placed the buffer in
main memory (a TPU's on-chip memory is memory space 1 in the layouts).
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_MAIN_MEMORY = 0
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(
  r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+)"
)
# `highest` float32 products are six bfloat16 passes of a TPU's matrix unit,
# `high` ones three.
_PASSES = {"highest": 6, "high": 3}
COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# The fusion of an all-reduce with the slices of its result that a TPU runs.
_TPU_REDUCE_SCATTER = "all-reduce-scatter"
# Operations that move no data: names, views, and the ends of asynchronous
# operations, which count at their start.
_FREE = {
  "after-all",
  "bitcast",
  "conditional",
  "constant",
  "get-tuple-element",
  "optimization-barrier",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
  "while",
  "call",
  "async-done",
  "async-update",
  "copy-done",
  "send-done",
  "recv-done",
}


class Shape(NamedTuple):
  """An array of a program."""

  dtype: str  # XLA's name, such as "bf16".
  dims: tuple[int, ...]  # Sizes.
  space: int = _MAIN_MEMORY  # Memory space: 0 is main memory.

  @property
  def bytes(self) -> float:
    """Size without padding."""
    return math.prod(self.dims) * _bits(self.dtype) / 8


class Instruction(NamedTuple):
  """One line of a program: `%name = shapes opcode(operands), attributes`."""

  computation: str  # The name of the one that it is in.
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # Of a tuple: its leaves.
  operands: tuple[str, ...]
  inside: str  # The text between the parentheses.
  attributes: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """The place in the Python program that made it: "jit(f)/scope/add"."""
    return _group(r'op_name="([^"]*)"', self.attributes, "")

  @property
  def called(self) -> str:
    """The computation that a fusion runs."""
    return _found(_CALLED, self.attributes)[1]


class Collective(NamedTuple):
  """One collective of the program, and how often it runs."""

  kind: str  # One of COLLECTIVES.
  # Payload of one run: what a device brings to an all-reduce, a reduce-scatter,
  # an all-to-all or a permute, what it gets from an all-gather.
  bytes: float
  group_size: int  # How many devices take part in it together.
  runs: int  # How often it runs per execution of the program.
  op_name: str  # See `Instruction.op_name`.

  @property
  def sent_bytes(self) -> float:
    """The least that each device must send in one run."""
    others = (self.group_size - 1) / self.group_size
    if self.kind == "all-reduce":
      return 2 * others * self.bytes
    if self.kind == "collective-permute":
      return self.bytes
    return others * self.bytes


class Work(NamedTuple):
  """The work of one instruction in all its runs."""

  op_name: str  # See `Instruction.op_name`.
  flops: float  # Of matrix products and convolutions.
  passes_flops: float  # The same, times the passes that their precision takes.
  bytes: float  # Read from and written to main memory.


class Program:
  """A compiled program, and its work in one execution on one device."""

  def __init__(self, text: str) -> None:
    """Parses the text of an optimized module (`compiled.as_text()`)."""
    self._computations: dict[str, dict[str, Instruction]] = {}
    self._entry = ""
    self._parse(text)
    self.num_devices = int(_group(r"num_partitions=(\d+)", text[:100_000], "1"))
    # Loops whose trip count is not in the text; counted as one trip.
    self.unknown_loops = 0
    # (instruction, runs, whether it is inside a fusion)
    self._executed = list(self._walk(self._entry, 1, False))

  def collectives(self) -> list[Collective]:
    """Returns every collective."""
    found = []
    for instruction, runs, _ in self._executed:
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or not self._is_first(instruction):
        continue
      group_size = self._group_size(instruction)
      size = sum(s.bytes for s in self._operand_shapes(instruction))
      if kind == "all-gather":
        size *= group_size
      if instruction.computation.startswith(_TPU_REDUCE_SCATTER):
        kind = "reduce-scatter"
      found.append(
        Collective(kind, size, group_size, runs, instruction.op_name)
      )
    return found

  def work(self) -> list[Work]:
    """Returns the work of each instruction that does any."""
    result = []
    for instruction, runs, fused in self._executed:
      flops = self._flops(instruction)
      size = 0.0 if fused else self._bytes(instruction)
      if flops or size:
        result.append(
          Work(
            self._origin(instruction),
            runs * flops,
            runs * flops * _passes(instruction),
            runs * size,
          )
        )
    return result

  def _origin(self, instruction: Instruction) -> str:
    """Returns an instruction's `op_name`, or its nearest user's."""
    users = self._users(instruction.computation)
    seen: set[str] = set()
    queue = [instruction]
    while queue:
      line = queue.pop(0)
      if line.op_name:
        return line.op_name
      seen.add(line.name)
      queue += [u for u in users.get(line.name, []) if u.name not in seen]
    return ""

  # --- Parsing ---------------------------------------------------------------

  def _parse(self, text: str) -> None:
    name = ""
    for line in text.splitlines():
      if line.endswith("{") and (line.startswith(("%", "ENTRY"))):
        name = _found(_OPERAND, line)[1]
        self._computations[name] = {}
        if line.startswith("ENTRY"):
          self._entry = name
      elif line.startswith("  "):
        instruction = _parse_instruction(name, line)
        if instruction:
          self._computations[name][instruction.name] = instruction

  def _walk(
    self, name: str, runs: int, fused: bool
  ) -> Iterator[tuple[Instruction, int, bool]]:
    """Yields the instructions that run, following calls."""
    for instruction in self._computations.get(name, {}).values():
      yield instruction, runs, fused
      opcode, attributes = instruction.opcode, instruction.attributes
      if opcode == "while":
        trips = self._trip_count(instruction)
        if trips is None:
          self.unknown_loops += 1
        for called in _CALLED.findall(attributes):
          yield from self._walk(called, runs * (trips or 1), fused)
      elif opcode == "fusion":
        yield from self._walk(instruction.called, runs, True)
      elif opcode in ("call", "async-start"):
        for called in _CALLED.findall(attributes):
          yield from self._walk(called, runs, fused)
      elif opcode == "conditional":
        for branches in _BRANCHES.findall(attributes):
          for called in re.findall(r"[\w.\-]+", " ".join(branches)):
            yield from self._walk(called, runs, fused)

  @functools.cache  # noqa: B019 (a Program lives for one report)
  def _users(self, computation: str) -> dict[str, list[Instruction]]:
    """Returns the lines that use each value of a computation."""
    users: dict[str, list[Instruction]] = {}
    for line in self._computations[computation].values():
      for operand in line.operands:
        users.setdefault(operand, []).append(line)
    return users

  def _operands(self, line: Instruction) -> list[Instruction]:
    """Returns the lines that make an instruction's operands."""
    table = self._computations[line.computation]
    return [table[name] for name in line.operands if name in table]

  def _operand_shapes(self, line: Instruction) -> list[Shape]:
    return [shape for made in self._operands(line) for shape in made.shapes]

  # --- Loops -----------------------------------------------------------------

  def _trip_count(self, loop: Instruction) -> int | None:
    """Returns how often a loop's body runs, or None if the text hides it."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    called = dict(
      re.findall(r"\b(body|condition)=%([\w.\-]+)", loop.attributes)
    )
    bound = self._bound(called["condition"])
    if bound is None:
      return None
    index, direction, limit = bound
    start = self._loop_start(loop, index)
    step = self._loop_step(called["body"], index)
    if start is None or not step:
      return None
    span = limit - start + (1 if direction == "LE" else 0)
    return max(0, -(-span // step))

  def _bound(self, condition: str) -> tuple[int, str, int] | None:
    """Returns (position of the counter, "LT" or "LE", its limit)."""
    root, operands = self._unwrapped(self._root(condition))
    direction = re.search(r"direction=(LT|LE)", root.attributes)
    if root.opcode != "compare" or not direction or len(operands) != 2:
      return None
    counter, limit = operands
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
      return None
    index = int(_found(r"index=(\d+)", counter.attributes)[1])
    return index, direction[1], int(limit.inside)

  def _loop_start(self, loop: Instruction, index: int) -> int | None:
    initial = self._resolved_operand(loop, 0)
    if initial.opcode != "tuple":
      return None
    start = self._resolved_operand(initial, index)
    return int(start.inside) if start.opcode == "constant" else None

  def _loop_step(self, body: str, index: int) -> int | None:
    """Returns what a trip adds to the counter, None if that is not constant."""
    root = self._root(body)
    if root.opcode != "tuple":
      return None
    update, operands = self._unwrapped(self._resolved_operand(root, index))
    steps = [line for line in operands if line.opcode == "constant"]
    return int(steps[0].inside) if update.opcode == "add" and steps else None

  def _unwrapped(
    self, line: Instruction
  ) -> tuple[Instruction, list[Instruction]]:
    """Returns an operation, from inside a fusion too, and its operands."""
    operands = [
      self._resolved_operand(line, i) for i in range(len(line.operands))
    ]
    if line.opcode != "fusion":
      return line, operands
    line, inner = self._unwrapped(self._root(line.called))
    return line, [
      operands[int(one.inside)] if one.opcode == "parameter" else one
      for one in inner
    ]

  def _resolved_operand(self, line: Instruction, index: int) -> Instruction:
    """Follows copies to the line that makes an operand."""
    table = self._computations[line.computation]
    line = table[line.operands[index]]
    while line.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
      line = table[line.operands[0]]
    return line

  def _root(self, computation: str) -> Instruction:
    table = self._computations[computation]
    return next(line for line in table.values() if line.is_root)

  # --- Collectives -----------------------------------------------------------

  def _is_first(self, instruction: Instruction) -> bool:
    """False for the later pieces of a collective that runs beside others.

    A TPU's asynchronous collective appears in the fusion that starts it, in
    every fusion that runs meanwhile and in the one that waits for it.
    """
    if "chain_id" not in instruction.attributes:
      return True
    return any(
      '"AsyncCollectiveStart"' in line.attributes
      for line in self._computations[instruction.computation].values()
    )

  def _group_size(self, instruction: Instruction) -> int:
    """Returns the size of a replica group, in any of XLA's notations."""
    text = instruction.attributes
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if explicit:
      return len(explicit[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
      return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh:
      sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
      return math.prod(
        int(sizes[name]) for name in re.findall(r"'([^']+)'", mesh[2])
      )
    return self.num_devices

  # --- Arithmetic ------------------------------------------------------------

  def _flops(self, instruction: Instruction) -> float:
    if instruction.opcode not in ("convolution", "dot"):
      return 0.0
    left, right, *_ = self._operand_shapes(instruction)
    if instruction.opcode == "dot":
      return _dot_flops(instruction, left)
    return _convolution_flops(instruction, left, right)

  # --- Memory traffic --------------------------------------------------------

  def _bytes(self, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0.0
    operands = [line.shapes for line in self._operands(instruction)]
    if opcode == "fusion":
      return self._fusion_bytes(instruction, operands)
    if opcode == "copy-start":  # (destination, the operand again, context)
      return _main_bytes(instruction.shapes[:1]) + _main_bytes(operands[0])
    if opcode in ("dynamic-slice", "slice", "gather"):
      return 2 * _main_bytes(instruction.shapes)
    if opcode == "dynamic-update-slice":
      return 2 * _main_bytes(operands[1])
    if opcode == "scatter":
      return 3 * _main_bytes(operands[2])
    read = sum(map(_main_bytes, operands))
    if opcode.endswith("-start"):
      return read  # The -done writes the result.
    return read + _main_bytes(instruction.shapes)

  def _fusion_bytes(
    self, fusion: Instruction, operands: list[tuple[Shape, ...]]
  ) -> float:
    """Returns the bytes that a fusion reads and writes.

    A fusion may read only slices of an operand, and write only the updates of
    a result that is updated in place.
    """
    results = [(shape,) for shape in fusion.shapes]
    total = 0.0
    for parts, arrays in (
      (self._parameter_reads(fusion.called), operands),
      (self._updates(fusion.called), results),
    ):
      for position, shapes in enumerate(arrays):
        size = _main_bytes(shapes)
        total += min(size, parts.get(position, size))
    return total

  @functools.cache  # noqa: B019 (a Program lives for one report)
  def _parameter_reads(self, computation: str) -> dict[int, float]:
    """Returns the bytes read of parameters that a fusion reads in part."""
    reads = {}
    for line in self._computations[computation].values():
      if line.opcode == "parameter":
        size = self._read(line)
        if size is not None:
          reads[int(line.inside)] = size
    return reads

  def _read(self, line: Instruction) -> float | None:
    """Returns the bytes read of a value; None means all of them."""
    total, name = 0.0, line.name
    for user in self._users(line.computation).get(name, []):
      if user.opcode == "bitcast":
        inner = self._read(user)
      elif user.opcode in ("dynamic-slice", "slice", "gather"):
        inner = sum(s.bytes for s in user.shapes)
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        inner = 0.0  # Updated in place.
      elif user.opcode == "fusion":
        nested = self._parameter_reads(user.called)
        inner = nested.get(user.operands.index(name))
      else:
        inner = None
      if inner is None:
        return None
      total += inner
    return total

  def _updates(self, computation: str) -> dict[int, float]:
    """Returns the bytes written of results that a fusion updates in place."""
    root = self._root(computation)
    outputs = self._operands(root) if root.opcode == "tuple" else [root]
    written = {}
    for position, line in enumerate(outputs):
      while line.opcode == "bitcast":
        line = self._operands(line)[0]
      if line.opcode == "dynamic-update-slice":
        update = self._operands(line)[1]
        written[position] = sum(s.bytes for s in update.shapes)
    return written


# --- Lines -------------------------------------------------------------------


def _parse_instruction(computation: str, line: str) -> Instruction | None:
  match = re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line)
  if not match:
    return None
  rest = _COMMENT.sub("", match[3])
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shapes = tuple(_parse_shapes(rest[:end]))
  opcode, _, _ = rest[end:].lstrip().partition("(")
  start = rest.index("(", end)
  stop = _closing(rest, start)
  inside = rest[start + 1 : stop]
  return Instruction(
    computation=computation,
    name=match[2],
    opcode=opcode,
    shapes=shapes,
    operands=tuple(_OPERAND.findall(inside)),
    inside=inside,
    attributes=rest[stop + 1 :],
    is_root=bool(match[1]),
  )


def _closing(text: str, start: int) -> int:
  """Returns the position of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r"[()]", text[start:]):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return start + match.start()
  raise ValueError(f"No closing parenthesis in {text[start : start + 80]!r}.")


def _found(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"No {pattern} in {text[:80]!r}.")
  return match


def _group(pattern: str | re.Pattern[str], text: str, default: str) -> str:
  """Returns the first group of a pattern, where the text has it."""
  match = re.search(pattern, text)
  return match[1] if match else default


def _parse_shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in _SHAPE.findall(text):
    sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    space = _SPACE.search(layout)
    yield Shape(dtype, sizes, int(space[1]) if space else _MAIN_MEMORY)


def _bits(dtype: str) -> int:
  if dtype == "pred":
    return 8
  return int(_group(r"^(?:bf|f|s|u|c)(\d+)", dtype, "0"))  # A token has none.


def _main_bytes(shapes: Iterable[Shape]) -> float:
  return sum(s.bytes for s in shapes if s.space == _MAIN_MEMORY)


def _passes(instruction: Instruction) -> int:
  name = _group(r"operand_precision=\{(\w+)", instruction.attributes, "")
  return _PASSES.get(name, 1)


# --- Arithmetic of one product -----------------------------------------------


def _dot_flops(instruction: Instruction, left: Shape) -> float:
  match = _found(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
  contracted = [left.dims[int(d)] for d in match[1].split(",") if d]
  return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(contracted)


def _convolution_flops(
  instruction: Instruction, left: Shape, right: Shape
) -> float:
  """Returns twice the number of products of an input and a weight."""
  text = instruction.attributes
  labels = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
  lhs, rhs, out = labels.groups()
  window = _window(text)
  output = instruction.shapes[0]
  total = 2.0 * left.dims[lhs.index("b")] * right.dims[rhs.index("i")]
  total *= output.dims[out.index("f")]
  total /= int(_group(r"batch_group_count=(\d+)", text, "1"))
  for number in range(len(lhs) - 2):
    spatial = str(number)
    total *= _products(
      left.dims[lhs.index(spatial)],
      right.dims[rhs.index(spatial)],
      output.dims[out.index(spatial)],
      **{key: values[number] for key, values in window.items()},
    )
  return total


def _window(text: str) -> dict[str, list[int]]:
  """Returns the sizes along each axis, of the padding the lower one."""
  window = _group(r"window=\{([^}]*)\}", text, "")
  return {
    key: [int(part.split("_")[0]) for part in value.split("x")]
    for key, value in re.findall(r"(\w+)=(\S+)", window)
    if key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
  }


@functools.lru_cache(maxsize=4096)
def _products(
  size: int,
  kernel: int,
  out: int,
  *,
  stride: int = 1,
  pad: int = 0,
  lhs_dilate: int = 1,
  rhs_dilate: int = 1,
) -> int:
  """Returns the pairs of output and weight along one axis that use an input."""
  reach = (size - 1) * lhs_dilate
  count = 0
  for k in range(kernel):
    for o in range(out):
      at = o * stride + k * rhs_dilate - pad
      count += 0 <= at <= reach and at % lhs_dilate == 0
  return count
