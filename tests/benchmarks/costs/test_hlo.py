"""Counting what a compiled program does, against programs counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from imsvd_jax.base import devices
from imsvd_jax.benchmarks.costs import hlo

# What a TPU's compiler writes: no trip count on the loop, buffers in on-chip
# memory marked S(1), precision on the products.
SHAPES = {
  "CARRY": "(COUNT, ON_CHIP, WEIGHTS)",
  "COUNT": "s32[]{:T(128)}",
  "ROWS": "bf16[512,1024]{1,0:T(8,128)(2,1)}",
  "ON_CHIP": "bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}",
  "WEIGHTS": "bf16[10,1024,1024]{2,1,0:T(8,128)(2,1)}",
  "SHARE": "f32[256,1024]{1,0}",
  "WHOLE": "f32[4096,1024]{1,0}",
  "GROUPS": "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0},"
  ' frontend_attributes={chain_id="0"}',
}


def written_out(text):
  """Replaces the names of SHAPES, which keep the programs readable."""
  for name, shape in SHAPES.items():
    text = text.replace(name, shape)
  return text


LOOP = written_out("""
HloModule jit_f, is_scheduled=true, num_partitions=4

%body (p: (s32[], bf16[512,1024], bf16[10,1024,1024])) -> (s32[]) {
  %p = CARRY parameter(0)
  %one = COUNT constant(1)
  %i = COUNT get-tuple-element(%p), index=0
  %copy.i = s32[]{:T(128)S(6)} copy(%i)
  %x = ON_CHIP get-tuple-element(%p), index=1
  %w = WEIGHTS get-tuple-element(%p), index=2
  %next = s32[]{:T(128)S(6)} add(%copy.i, %one)
  %y = ON_CHIP fusion(%x, %w, %copy.i), kind=kOutput, calls=%product, \
metadata={op_name="jit(f)/projector/dot"}
  %sum = ON_CHIP all-reduce(%y), channel_id=1, replica_groups=[1,4]<=[4], \
use_global_device_ids=true, to_apply=%plus
  ROOT %t = CARRY tuple(%next, %sum, %w)
}

%product (p0: bf16[512,1024], p1: bf16[10,1024,1024], p2: s32[]) -> bf16[] {
  %p0 = ON_CHIP parameter(0)
  %p1 = WEIGHTS parameter(1)
  %p2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = COUNT constant(0)
  %slice = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %p2, \
/*index=2*/%zero, %zero), dynamic_slice_sizes={1,1024,1024}
  %weights = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %dot = ON_CHIP convolution(%p0, %weights), dim_labels=bf_io->bf, \
operand_precision={highest,highest}, metadata={op_name="jit(f)/projector/dot"}
}

%condition (q: (s32[], bf16[512,1024], bf16[10,1024,1024])) -> pred[] {
  %ten = COUNT constant(LIMIT)
  %q = CARRY parameter(0)
  %j = COUNT get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %ten), direction=LT
}

ENTRY %main (x: bf16[512,1024], w: bf16[10,1024,1024]) -> bf16[512,1024] {
  %x.1 = ROWS parameter(0)
  %w.1 = WEIGHTS parameter(1)
  %start = COUNT constant(3)
  %copy.s = COUNT copy(%start)
  %in = (ON_CHIP, ROWS, u32[]{:S(2)}) copy-start(%x.1)
  %in.done = ON_CHIP copy-done(%in)
  %t.1 = CARRY tuple(%copy.s, %in.done, %w.1)
  %loop = CARRY while(%t.1), condition=%condition, body=%body, \
metadata={op_name="jit(f)/while"}
  %out = ON_CHIP get-tuple-element(%loop), index=1
  ROOT %copy.o = ROWS copy(%out)
}
""")

# One all-gather that runs beside two fusions, as a TPU's compiler writes it.
ASYNC = written_out("""
HloModule jit_g, is_scheduled=true, num_partitions=16

%starts (a: f32[256,1024]) -> (f32[256,1024], f32[4096,1024]) {
  %a = SHARE parameter(0)
  %gather.1 = WHOLE all-gather(%a), GROUPS
  ROOT %go = (SHARE, WHOLE) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[256,1024]) -> f32[4096,1024] {
  %b = SHARE parameter(0)
  ROOT %gather.2 = WHOLE all-gather(%b), GROUPS
}

%waits (c: f32[256,1024]) -> f32[4096,1024] {
  %c = SHARE parameter(0)
  %gather.3 = WHOLE all-gather(%c), GROUPS
  ROOT %end = WHOLE custom-call(%gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[256,1024]) -> f32[4096,1024] {
  %x = SHARE parameter(0)
  %s = (SHARE, WHOLE) fusion(%x), kind=kCustom, calls=%starts
  %m = WHOLE fusion(%x), kind=kCustom, calls=%beside
  %d = WHOLE fusion(%x), kind=kCustom, calls=%waits
  %r = SHARE reduce-scatter(%d), channel_id=2, \
replica_groups=mesh['x'=4,'y'=2,'z'=2] {'x','z'}, dimensions={0}
  %ps = (SHARE, SHARE) collective-permute-start(%r), channel_id=3, \
source_target_pairs={{0,1},{1,0}}
  %pd = SHARE collective-permute-done(%ps)
  ROOT %all = WHOLE all-gather(%pd), channel_id=4, dimensions={0}
}
""")


def total(program, field):
  return sum(getattr(work, field) for work in program.work())


@pytest.mark.parametrize("limit", ["13", "14"])
def test_a_loop_counts_as_often_as_it_runs(limit):
  program = hlo.Program(LOOP.replace("LIMIT", limit))
  trips = int(limit) - 3
  flops = 2 * 512 * 1024 * 1024 * trips
  assert program.unknown_loops == 0
  assert total(program, "flops") == flops
  assert total(program, "passes_flops") == 6 * flops
  (one,) = program.collectives()
  assert one.kind == "all-reduce"
  assert (one.runs, one.group_size) == (trips, 4)
  assert one.bytes == 512 * 1024 * 2
  assert one.sent_bytes == pytest.approx(2 * 3 / 4 * one.bytes)


def test_memory_traffic_leaves_out_what_stays_on_the_chip():
  program = hlo.Program(LOOP.replace("LIMIT", "13"))
  weights = 10 * 1024 * 1024 * 2  # Each trip reads its own slice.
  rows = 512 * 1024 * 2  # Read once, written once.
  big = total(program, "bytes")
  assert weights + 2 * rows <= big <= weights + 2 * rows + 1000
  where = {work.op_name: work.bytes for work in program.work() if work.bytes}
  assert where["jit(f)/projector/dot"] == pytest.approx(weights, rel=1e-5)


def test_a_loop_without_a_trip_count_is_reported():
  text = LOOP.replace("LIMIT", "13").replace("LT", "NE")
  program = hlo.Program(text)
  assert program.unknown_loops == 1
  assert total(program, "flops") == 2 * 512 * 1024 * 1024


def test_an_asynchronous_collective_counts_once():
  program = hlo.Program(ASYNC)
  size = 256 * 1024 * 4
  found = [(c.kind, c.group_size, c.bytes) for c in program.collectives()]
  assert found == [
    ("all-gather", 4, 4 * size),
    ("reduce-scatter", 8, 16 * size),
    ("collective-permute", 16, size),
    ("all-gather", 16, 16 * size),
  ]
  sent = [c.sent_bytes for c in program.collectives()]
  assert sent == [3 * size, 14 * size, size, 15 * size]


def test_a_tpus_reduce_scatter_is_a_fusion_of_an_all_reduce():
  program = hlo.Program("""\
HloModule jit_f, num_partitions=8

%all-reduce-scatter.3 (a: f32[64,128]) -> f32[8,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %r = f32[64,128]{1,0} all-reduce(%a), channel_id=1, dimensions={}
  %i = s32[] constant(0)
  ROOT %part = f32[8,128]{1,0} dynamic-slice(%r, %i, %i), \
dynamic_slice_sizes={8,128}
}

ENTRY %main (x: f32[64,128]) -> f32[8,128] {
  %x = f32[64,128]{1,0} parameter(0)
  ROOT %s = f32[8,128]{1,0} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.3
}
""")
  (one,) = program.collectives()
  assert (one.kind, one.bytes) == ("reduce-scatter", 64 * 128 * 4)
  assert one.sent_bytes == 7 / 8 * one.bytes


def test_an_update_in_place_moves_only_the_update():
  text = """
HloModule jit_h, num_partitions=1

%put (a: f32[1000,64], u: f32[1,64], i: s32[]) -> f32[1000,64] {
  %a = f32[1000,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[1000,64]{1,0} dynamic-update-slice(%a, %u, %i, %i)
}

ENTRY %main (a: f32[1000,64], u: f32[1,64], i: s32[]) -> f32[1000,64] {
  %a.1 = f32[1000,64]{1,0} parameter(0)
  %u.1 = f32[1,64]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %f = f32[1000,64]{1,0} fusion(%a.1, %u.1, %i.1), kind=kLoop, calls=%put
}
"""
  assert total(hlo.Program(text), "bytes") == 2 * 64 * 4 + 4


# --- Against what XLA compiles here ------------------------------------------


def compile_text(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return jax.jit(function).lower(*arguments).compile()


def test_a_scan_of_this_jax_counts_as_often_as_it_runs():
  def scan(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=7)[0]

  compiled = compile_text(scan, (64, 256), (256, 256))
  program = hlo.Program(compiled.as_text())
  flops = 2 * 64 * 256 * 256
  assert total(program, "flops") == 7 * flops
  # What this module is for: XLA's own analysis counts one trip.
  assert compiled.cost_analysis()["flops"] < 2 * flops


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_convolutions_count_what_xla_counts(stride, gradient):
  def convolve(x, w):
    y = jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      [(1, 1), (1, 1)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.sum(y * y)

  function = jax.grad(convolve, argnums=(0, 1)) if gradient else convolve
  compiled = compile_text(function, (4, 16, 16, 8), (3, 3, 8, 12))
  ours = total(hlo.Program(compiled.as_text()), "flops")
  theirs = compiled.cost_analysis()["flops"]
  # Theirs has the additions and products outside the convolutions too.
  outside = 4 * 4 * 16 * 16 * 12
  assert ours <= theirs <= ours + outside
  # By hand: 3 taps, of which the border's outputs miss one at each end.
  out = 16 // stride
  taps = 3 * out - (2 if stride == 1 else 1)
  assert ours == (3 if gradient else 1) * 2 * 4 * 8 * 12 * taps**2


def test_collectives_of_eight_devices():
  mesh = devices.make_mesh()
  assert mesh.size == 8, "conftest.py makes eight devices"

  def body(x):
    total = jax.lax.psum(x, "data")

    def add(c, _):
      return c + jax.lax.psum(jnp.tanh(c), "data"), None

    total, _ = jax.lax.scan(add, total, length=3)
    return jax.lax.all_gather(total, "data", tiled=True)

  mapped = jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=PartitionSpec("data"),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )
  x = jax.ShapeDtypeStruct(
    (80, 128), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
  )
  program = hlo.Program(mapped.lower(x).compile().as_text())
  assert program.num_devices == 8
  found = {}
  for one in program.collectives():
    assert one.group_size == 8
    found[one.kind] = found.get(one.kind, 0) + one.runs * one.bytes
  size = 10 * 128 * 4
  assert found == {"all-reduce": 4 * size, "all-gather": 8 * size}


@pytest.mark.parametrize(
  ("dtype", "size"),
  [("f32", 4), ("bf16", 2), ("pred", 1), ("s4", 0.5), ("f8e4m3fn", 1)],
)
def test_sizes_of_types(dtype, size):
  assert hlo.Shape(dtype, (3, 5)).bytes == 15 * size
  assert math.isclose(hlo.Shape("token", ()).bytes, 0)
