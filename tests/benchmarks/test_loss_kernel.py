"""`benchmark loss`: contenders agree, costs add up, mistakes are one line."""

import dataclasses
import json

import jax
import pytest

from imsvd_jax.benchmarks import loss_kernel, machine, timing, torch_formula
from imsvd_jax.benchmarks.costs import slices
from tests.run_command import one_line_error

SMALL = loss_kernel.Problem(
  16, num_variables=16, num_bins=16, kernel="streamed"
)
PRODUCT = 2 * 16 * 256**2


@pytest.fixture(scope="module")
def results():
  return {r.name: r for r in loss_kernel.measure(SMALL, rounds=2)}


@pytest.fixture(scope="module")
def about():
  return machine.describe(jax.devices()[:1])


def test_contenders_agree(results):
  assert list(results) == ["streamed", "plain", "PyTorch", "floor"]
  value = results["plain"].loss
  assert -9 < value < 0
  assert results["streamed"].loss == pytest.approx(value, rel=1e-6)
  assert results["streamed"].loss_error < 1e-6
  assert 0 < results["streamed"].gradient_error < 1e-5


@pytest.mark.skipif(not torch_formula.is_installed(), reason="needs PyTorch")
def test_pytorch_agrees(results):
  assert results["PyTorch"].loss_error < 1e-6
  assert 0 < results["PyTorch"].gradient_error < 1e-5


def test_costs_are_those_of_the_products(results):
  for name in ("streamed", "plain"):
    assert results[name].flops == 3 * PRODUCT
    assert results[name].traffic_bytes == 0
  assert results["floor"].seconds.median > 0
  share = results["streamed"].floor_share
  assert share.min <= share.median <= share.max
  assert results["streamed"].ratio == timing.Spread(1, 1, 1)


def test_text_and_json_say_the_same(results, about):
  results = list(results.values())
  figures = loss_kernel.as_dict(SMALL, results, about)
  assert json.loads(json.dumps(figures)) == figures
  assert figures["problem"]["chosen"] == "streamed"
  text = loss_kernel.as_text(SMALL, results, about)
  assert "D = 256" in text
  for found, shown in zip(
    figures["results"], text.splitlines()[5:9], strict=True
  ):
    assert shown.startswith(found["name"])
    if found["seconds"]:
      assert f"{found['seconds']['median']:.4g}" in shown
  for key in ("jax", "date", "cpu", "cores", "python"):
    assert str(about[key]) in text


def test_devices_share_the_work():
  problem = dataclasses.replace(SMALL, num_images=8, devices=8)
  streamed, floor = loss_kernel.measure(problem, rounds=1, alternatives=False)
  assert streamed.flops <= 1.15 / 8 * 3 * PRODUCT / 2
  assert 0 < streamed.traffic_bytes < 4 * 256**2
  assert 0 < streamed.largest_collective_bytes <= 4 * 8 * 256
  assert floor.name == "floor"


def test_a_compiled_slice_needs_no_machine():
  results = loss_kernel.compile_for(SMALL, slices.get_slice("cpu:8"))
  alone, shared, plain = results
  assert alone.flops == 3 * PRODUCT
  assert shared.flops <= 1.15 / 8 * alone.flops
  assert shared.seconds is None
  assert shared.largest_collective_bytes < 4 * 256**2
  assert plain.largest_collective_bytes >= 4 * 256**2
  text = loss_kernel.compiled_as_text(SMALL, slices.get_slice("cpu:8"), results)
  assert "streamed, 8 chip(s)" in text
  assert "0.1250" in text


def test_what_does_not_fit_is_not_run(monkeypatch):
  monkeypatch.setattr(machine, "available_bytes", lambda device: 1000.0)
  results = loss_kernel.measure(SMALL, rounds=1)
  for result in results[:-1]:
    assert result.seconds is None
    assert "not run: needs" in result.note
  assert results[-1].seconds is not None


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_images": 1}, "--num_images=1; expected at least 2"),
    ({"num_bins": 1}, "--num_bins=1"),
    ({"dtype": "float8"}, "Unknown dtype 'float8'.*bfloat16"),
    ({"kernel": "plane"}, "Unknown kernel 'plane'. Did you mean 'plain'"),
    ({"devices": 5}, "num_images=16 does not divide over 5 devices"),
  ],
)
def test_mistakes_are_one_line(change, message):
  with one_line_error(message):
    loss_kernel.check(dataclasses.replace(SMALL, **change))


def test_more_devices_than_there_are():
  with one_line_error("--devices=99 and this machine has 8"):
    machine.devices(99)


@pytest.mark.gpu
def test_the_objective_on_a_gpu_is_near_its_floor():
  problem = loss_kernel.Problem(2048, 102, 80)
  results = {r.name: r for r in loss_kernel.measure(problem, rounds=5)}
  streamed = results["streamed"]
  assert streamed.flops == pytest.approx(3 * 2 * 2048 * 8160**2, rel=0.05)
  assert streamed.loss_error < 1e-5
  assert streamed.gradient_error < 1e-4
  assert results["floor"].seconds.median > 0
