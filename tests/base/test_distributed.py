"""How a run finds its processes, and what it says when one is missing."""

import contextlib
import http.server
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from imsvd_jax.base import distributed
from imsvd_jax.base.errors import UserError
from tests.run_command import run_python

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
  "SLURM_JOB_ID": "8192",
  "SLURM_STEP_NODELIST": "node[007-009,012],other",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_MCA_ess_base_jobid": "1531576321",
}


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def start_main(port: int, count: int, process_id: int, seconds: float):
  """Starts the trainer as one process of `count`; it should not get far."""
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "imsvd_jax.main",
      "--config=configs/digits.py:debug",
      f"--coordinator_address=127.0.0.1:{port}",
      f"--num_processes={count}",
      f"--process_id={process_id}",
      f"--join_seconds={seconds}",
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def assert_one_line(process: subprocess.Popen, *words: str, code: int) -> None:
  _, stderr = process.communicate(timeout=300)  # A loaded machine is slow.
  assert process.returncode == code, stderr
  assert stderr.startswith("error: "), stderr
  assert stderr.count("\n") == 1, stderr
  for word in words:
    assert word in stderr


# --- What the environment says ----------------------------------------------


def test_an_environment_that_says_nothing_is_one_process():
  assert distributed.detect({}) is None
  assert distributed.num_tpu_hosts({"TPU_SKIP_MDS_QUERY": "1"}) == 0
  distributed.initialize()
  assert not distributed.has_peers()


def test_flags_describe_a_run():
  cluster = distributed.detect({}, "localhost:1234", 2, 1)
  assert cluster == distributed.Cluster(
    "the flags", "localhost:1234", 2, 1, None
  )


def test_one_process_needs_no_coordinator():
  assert distributed.detect({}, None, 1, None).num_processes == 1
  distributed.initialize(num_processes=1)
  assert not distributed.has_peers()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((None, 2, 0), "--coordinator_address missing"),
    (("a:1", None, None), "--num_processes and --process_id missing"),
    (("a:1", 2, 2), r"--process_id=2 .*expected 0 to 1"),
    (("a:1", 0, 0), "--num_processes=0"),
    (("a", 2, 0), "not host:port"),
    (("a:70000", 2, 0), "not host:port"),
    (("::1:80", 2, 0), "not host:port"),
  ],
)
def test_a_bad_description_is_one_clear_line(flags, message):
  with pytest.raises(UserError, match=message) as error:
    distributed.detect({}, *flags)
  assert "\n" not in str(error.value)


def test_slurm_describes_a_run():
  cluster = distributed.detect(SLURM)
  assert cluster == distributed.Cluster(
    "SLURM", f"node007:{61440 + 8192 % 4096}", 8, 5, [1]
  )


@pytest.mark.parametrize(
  ("changes", "device"),
  [
    ({}, [1]),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
    ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # SLURM gave each task its own.
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # One task per node.
  ],
)
def test_processes_that_share_a_node_take_one_gpu_each(changes, device):
  assert distributed.detect({**SLURM, **changes}).local_device_ids == device


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("solo", "solo"),
    ("a1,b2", "a1"),
    ("gpu[3,5-7]", "gpu3"),
    ("n-[001-015]", "n-001"),
  ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
  cluster = distributed.detect({**SLURM, "SLURM_STEP_NODELIST": nodes})
  assert cluster.coordinator_address.split(":")[0] == first


def test_a_slurm_batch_script_outside_a_step_is_one_process():
  inside = {k: v for k, v in SLURM.items() if "STEP" not in k}
  assert distributed.detect({**inside, "SLURM_NTASKS": "8"}) is None


def test_open_mpi_describes_a_run():
  cluster = distributed.detect(OPEN_MPI)
  assert cluster.coordinator_address.startswith("10.96.0.1:")
  assert cluster[2:] == (4, 3, [1])
  alone = {k: v for k, v in OPEN_MPI.items() if "MCA" not in k}
  with pytest.raises(UserError, match="--coordinator_address missing"):
    distributed.detect(alone)  # Open MPI 5 across machines.
  alone["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"
  assert distributed.detect(alone).coordinator_address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
  ("environ", "name", "value"),
  [
    (SLURM, "SLURM_PROCID", "x"),
    (SLURM, "SLURM_STEP_NUM_TASKS", ""),
    (SLURM, "SLURM_LOCALID", "1.5"),
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "four"),
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", None),
    (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE", "?"),
    (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK", "-1"),
  ],
)
def test_an_environment_that_is_no_number_is_one_clear_line(
  environ, name, value
):
  environ = {**environ, name: value}
  if value is None:
    del environ[name]
  with pytest.raises(UserError, match=f"{name} is .*whole number") as error:
    distributed.detect(environ)
  assert "\n" not in str(error.value)


def test_flags_override_the_environment():
  cluster = distributed.detect(SLURM, coordinator_address="10.0.0.1:99")
  assert cluster.coordinator_address == "10.0.0.1:99"
  assert cluster.num_processes == 8


def test_gke_says_how_many_tpu_hosts():
  hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}
  assert distributed.num_tpu_hosts(hosts) == 4
  assert distributed.num_tpu_hosts({**hosts, "MEGASCALE_NUM_SLICES": "2"}) == 8


def test_compute_engine_is_asked_only_where_there_are_chips(monkeypatch):
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append((self.path, self.headers["Metadata-Flavor"]))
      self.send_response(200)
      self.end_headers()
      self.wfile.write(b"w0:8470:10.0.0.1,w1:8470:10.0.0.2")

    def log_message(self, *args):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    monkeypatch.setattr(distributed, "_has_tpu_chips", lambda: False)
    assert distributed.num_tpu_hosts(environ) == 0
    assert not asked
    monkeypatch.setattr(distributed, "_has_tpu_chips", lambda: True)
    assert distributed.num_tpu_hosts(environ) == 2
    assert asked[0][0].endswith("worker-network-endpoints")
    assert asked[0][1] == "Google"
    server.shutdown()
    thread.join()
  # A TPU outside Compute Engine: nobody answers, and the run is alone.
  assert distributed.num_tpu_hosts(environ) == 0


# --- Where the coordinator listens ------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_local_run_listens_on_loopback_alone(host):
  bind = distributed.bind_address(f"{host}:5")
  assert bind in {"127.0.0.1:5", "[::1]:5"}


def test_the_coordinator_listens_on_its_own_address(monkeypatch):
  assert distributed.bind_address("10.1.2.3:5") == "10.1.2.3:5"
  answers = ["127.0.1.1", "10.9.8.7"]

  def resolve(host, port, **kwargs):
    return [(2, 1, 6, "", (answer, port)) for answer in answers]

  monkeypatch.setattr(socket, "getaddrinfo", resolve)
  assert distributed.bind_address("node7:5") == "10.9.8.7:5"
  answers.pop()
  assert distributed.bind_address("node7:5") == "0.0.0.0:5"


# --- Processes that do not come ---------------------------------------------
# Code 4, not 2: the launchers try again when a peer is late.


def test_a_missing_coordinator_is_one_line():
  port = free_port()
  process = start_main(port, 2, 1, 1.0)
  assert_one_line(process, "No coordinator", f"127.0.0.1:{port}", "1 s", code=4)


def test_a_port_in_use_is_one_line():
  with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    other.listen()
    port = other.getsockname()[1]
    process = start_main(port, 2, 0, 5.0)
    assert_one_line(process, f"127.0.0.1:{port}", "in use", code=2)


@pytest.fixture
def coordinator():
  """Process 0 of 3, listening, and more patient than the test; its port."""
  port = free_port()
  process = start_main(port, 3, 0, 3600.0)
  try:
    while process.poll() is None:
      with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        break
      time.sleep(0.1)
    yield port
  finally:
    process.kill()
    process.communicate()


def test_a_process_that_never_joins_is_one_line_from_the_coordinator():
  process = start_main(free_port(), 3, 0, 1.0)
  assert_one_line(
    process, "Waited 1 s", "not all 3 processes (--process_id 0 to 2)", code=4
  )


def test_a_process_that_never_joins_is_one_line_from_the_others(coordinator):
  process = start_main(coordinator, 3, 1, 1.0)
  assert_one_line(
    process, "Waited 1 s", "not all 3 processes (--process_id 0 to 2)", code=4
  )


def test_a_thread_that_waits_for_ever_does_not_keep_the_process():
  code = """
import threading
from imsvd_jax.base import distributed
distributed._EXIT_SECONDS = 0.1
threading.Thread(target=threading.Event().wait).start()
distributed.leave(2)
"""
  assert run_python("-c", code).returncode == 2
