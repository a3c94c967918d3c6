"""Joins the processes of one run, on a TPU pod, SLURM, Open MPI or by flags.

Call `initialize` before anything touches a device. It does nothing where the
environment describes one process. JAX itself crashes if a port is in use, and
aborts with a stack trace if a process is missing; here each is one line, after
a bounded wait.
"""

import glob
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from imsvd_jax.base.errors import PeerError, UserError

FLAGS = "--coordinator_address, --num_processes and --process_id"
# JAX aborts the process when its own timeout passes; ours comes first.
_SPARE_SECONDS = 3600
# JAX ends this process when a peer has been silent for this long.
_HEARTBEAT_SECONDS = 10
_EXIT_SECONDS = 5
_METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_joining = threading.Event()  # Set once this process has or looks for peers.


class Cluster(NamedTuple):
  """The processes of a run, seen from one of them."""

  source: str  # Of this description: "SLURM", "Open MPI" or "the flags".
  coordinator_address: str  # "host:port" of process 0.
  num_processes: int  # How many processes the run has.
  process_id: int  # Which of them this one is, from 0.
  # The GPUs of this machine that this process uses; None for all visible ones.
  local_device_ids: list[int] | None = None


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_seconds: float = 300.0,
) -> None:
  """Joins the run's other processes; does nothing in a run of one process.

  Args:
    coordinator_address: "host:port" where process 0 listens. SLURM or Open MPI
      provide the arguments that are None; a TPU pod needs none of the three.
    num_processes: Number of processes.
    process_id: This process's number, from 0.
    timeout_seconds: How long to wait for the others.

  Raises:
    UserError: The description is incomplete or contradictory, or the port is
      in use.
    PeerError: A process did not join in time.
  """
  cluster = detect(os.environ, coordinator_address, num_processes, process_id)
  deadline = time.monotonic() + timeout_seconds
  if cluster is not None:
    if cluster.num_processes > 1:
      _join(cluster, deadline, timeout_seconds)
  elif num_tpu_hosts(os.environ) > 1:
    _connect({}, deadline, timeout_seconds, "the workers of this TPU slice")


def detect(
  environ: Mapping[str, str],
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Cluster | None:
  """Returns what the flags, SLURM or Open MPI say about the run's processes.

  Args:
    environ: Environment variables.
    coordinator_address: Overrides the environment, like the two that follow.
    num_processes: See `Cluster`.
    process_id: See `Cluster`.

  Returns:
    The description, or None if nothing describes several processes.

  Raises:
    UserError: The description is incomplete or contradictory.
  """
  found = _slurm(environ) or _open_mpi(environ) or {"source": "the flags"}
  given = {
    "coordinator_address": coordinator_address or None,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  given = {k: v for k, v in given.items() if v is not None}
  if found["source"] == "the flags" and not given:
    return None
  fields = {**found, **given}
  # One process needs no coordinator.
  if fields.get("num_processes") == 1:
    fields = {"coordinator_address": "", "process_id": 0, **fields}
  missing = [
    f"--{name}"
    for name in ("coordinator_address", "num_processes", "process_id")
    if fields.get(name) is None
  ]
  if missing:
    raise UserError(
      f"{' and '.join(missing)} missing: {fields['source']} did not set it;"
      f" a run of several processes needs {FLAGS}, or SLURM or Open MPI."
    )
  return _checked(Cluster(**fields))


def _checked(cluster: Cluster) -> Cluster:
  if cluster.num_processes < 1:
    raise UserError(
      f"--num_processes={cluster.num_processes}; expected 1 or more."
    )
  if not 0 <= cluster.process_id < cluster.num_processes:
    raise UserError(
      f"--process_id={cluster.process_id} is not one of the"
      f" {cluster.num_processes} processes; expected 0 to"
      f" {cluster.num_processes - 1}."
    )
  if cluster.num_processes > 1:
    _split(cluster.coordinator_address)
  return cluster


def _split(address: str) -> tuple[str, int]:
  """Returns host and port of "host:port" or "[v6 address]:port"."""
  match = re.fullmatch(r"(?:\[(.+)\]|([^:\[\]]+)):(\d{1,5})", address)
  if not match or not 0 < int(match[3]) < 65536:
    raise UserError(
      f"--coordinator_address={address!r} is not host:port; expected such as"
      " 10.0.0.1:8476 or localhost:8476."
    )
  return match[1] or match[2], int(match[3])


# --- The environment --------------------------------------------------------


def _slurm(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns what `srun` tells its tasks; None outside of a job step."""
  needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
  if any(name not in environ for name in needed):
    return None
  counts = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
  count = next((name for name in counts if name in environ), None)
  tasks = _int(environ, count) if count else 1
  first = _first_host(environ["SLURM_STEP_NODELIST"])
  # "4(x2),3": four tasks on each of two nodes, three on the next.
  per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
  shared = any(part.split("(")[0] != "1" for part in per_node.split(","))
  return {
    "source": "SLURM",
    "coordinator_address": f"{first}:{_port(environ['SLURM_JOB_ID'])}",
    "num_processes": tasks,
    "process_id": _int(environ, "SLURM_PROCID"),
    "local_device_ids": _own_device(
      environ, "SLURM_LOCALID" if shared else None
    ),
  }


def _first_host(node_list: str) -> str:
  """Returns "node001" of "node[001-015,020],other"."""
  match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
  if not match:
    raise UserError(f"SLURM_STEP_NODELIST={node_list!r} names no node.")
  return match[1] + (match[2] or "")


def _open_mpi(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns what `mpirun` tells its processes; None without it."""
  if "OMPI_COMM_WORLD_SIZE" not in environ:
    return None
  size = _int(environ, "OMPI_COMM_WORLD_SIZE")
  local_size = size
  if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
    local_size = _int(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
  job = environ.get("OMPI_MCA_ess_base_jobid") or environ.get(
    "PMIX_NAMESPACE", "0"
  )
  # Only Open MPI 4 says where mpirun runs; across machines others need a flag.
  uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
  launcher = re.search(r"tcp://([^,:]+)", uri)
  host = "127.0.0.1" if local_size == size else launcher and launcher[1]
  return {
    "source": "Open MPI",
    "coordinator_address": host and f"{host}:{_port(job)}",
    "num_processes": size,
    "process_id": _int(environ, "OMPI_COMM_WORLD_RANK"),
    "local_device_ids": _own_device(
      environ, "OMPI_COMM_WORLD_LOCAL_RANK" if local_size > 1 else None
    ),
  }


def _int(environ: Mapping[str, str], name: str) -> int:
  text = environ.get(name)
  if text is None or not text.strip().isdecimal():
    found = "is missing" if text is None else f"is {text!r}"
    raise UserError(
      f"The environment variable {name} {found}; expected a whole number, as"
      " the launcher of the run's processes sets it."
    )
  return int(text)


def _port(job: str) -> int:
  """Returns a port above the usual services, one for all processes of a job."""
  digits = re.sub(r"\D", "", job) or "0"
  return 61440 + int(digits) % 4096


def _own_device(
  environ: Mapping[str, str], variable: str | None
) -> list[int] | None:
  """Returns one GPU for each of the processes that share a machine.

  None if the process has the machine to itself (no variable gives it a number
  there), or if the launcher already shows it a single GPU.
  """
  visible = environ.get("CUDA_VISIBLE_DEVICES", "")
  if variable is None or variable not in environ:
    return None
  if visible and "," not in visible:
    return None
  return [_int(environ, variable)]


def num_tpu_hosts(environ: Mapping[str, str]) -> int:
  """Returns how many hosts the TPU slice of this machine has; 0 without one.

  GKE sets it in the environment. Compute Engine's metadata server knows it, and
  is asked only on machines with TPU chips.
  """
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES"
  )
  slices = 1
  if environ.get("MEGASCALE_NUM_SLICES"):
    slices = _int(environ, "MEGASCALE_NUM_SLICES")
  if hosts:
    return slices * len(hosts.split(","))
  if "TPU_SKIP_MDS_QUERY" in environ or not _has_tpu_chips():
    return 0
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/{_METADATA}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as response:
      return slices * len(response.read().decode().split(","))
  except (urllib.error.URLError, OSError):
    return 0  # A TPU outside Compute Engine, such as a notebook's.


def _has_tpu_chips() -> bool:
  return bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


# --- Joining ----------------------------------------------------------------


def _join(cluster: Cluster, deadline: float, timeout_seconds: float) -> None:
  address = cluster.coordinator_address
  arguments = {
    "coordinator_address": address,
    "num_processes": cluster.num_processes,
    "process_id": cluster.process_id,
    "local_device_ids": cluster.local_device_ids,
    # `detect` has found everything; JAX's detection would restrict one process
    # to one GPU.
    "cluster_detection_method": "deactivate",
  }
  if cluster.process_id == 0:
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if not bind:
      bind = bind_address(address)
      _check_port_is_free(address, bind)
    arguments["coordinator_bind_address"] = bind
  else:
    _wait_for_coordinator(address, deadline, timeout_seconds)
  last = cluster.num_processes - 1
  everyone = f"all {cluster.num_processes} processes (--process_id 0 to {last})"
  _connect(arguments, deadline, timeout_seconds, everyone)


def bind_address(address: str) -> str:
  """Returns where process 0 listens: the coordinator's own address.

  JAX's default is every interface of the machine, which opens the run to anyone
  who can reach one of them. A host name that this machine knows only as
  loopback (Debian's 127.0.1.1) does not tell its interface; only then this
  returns all of them.
  """
  host, port = _split(address)
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except socket.gaierror as error:
    raise UserError(
      f"The coordinator's host {host!r} cannot be resolved on its own machine:"
      f" {error.strerror}; give an address in --coordinator_address."
    ) from error
  hosts = [str(entry[4][0]) for entry in found]
  own = next((h for h in hosts if not _is_loopback(h)), hosts[0])
  if _is_loopback(own) and not (host == "localhost" or _is_loopback(host)):
    own = "0.0.0.0"
  return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


def _is_loopback(host: str) -> bool:
  return host.startswith("127.") or host == "::1"


def _check_port_is_free(address: str, bind: str) -> None:
  """Raises UserError for a port in use, on which JAX itself would crash."""
  host, port = _split(bind)
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    # A port whose last connections are still closing is free to a listener.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((host, port))
      probe.listen()
    except OSError as error:
      raise UserError(
        f"Process 0 cannot listen on {bind}: {error.strerror}; choose another"
        f" port or address in --coordinator_address ({address})."
      ) from error


def _wait_for_coordinator(
  address: str, deadline: float, timeout_seconds: float
) -> None:
  host, port = _split(address)
  while True:
    try:
      with socket.create_connection((host, port), timeout=5):
        return
    except OSError as error:
      reason = error.strerror or str(error)
    if time.monotonic() >= deadline:
      raise PeerError(
        f"No coordinator at {address} after {timeout_seconds:g} s ({reason});"
        " is process 0 running, and is this its --coordinator_address?"
      )
    time.sleep(0.2)


def _connect(
  arguments: dict[str, Any],
  deadline: float,
  timeout_seconds: float,
  everyone: str,
) -> None:
  """Calls `jax.distributed.initialize`, and gives up at the deadline.

  The call runs in a thread, because its own timeout aborts the process.
  """
  import jax

  _joining.set()
  failures: list[BaseException] = []

  def call() -> None:
    try:
      jax.distributed.initialize(
        initialization_timeout=round(timeout_seconds) + _SPARE_SECONDS,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        **arguments,
      )
    except BaseException as error:
      failures.append(error)

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(max(1.0, deadline - time.monotonic()))
  if thread.is_alive():
    raise PeerError(
      f"Waited {timeout_seconds:g} s, and not {everyone} joined. Start the"
      " missing ones, or read in their logs why they stopped."
    )
  if failures:
    reason = " ".join(str(failures[0]).split())
    raise PeerError(f"Could not join {everyone}: {reason}") from failures[0]


def has_peers() -> bool:
  """Returns whether this process has joined others, or has begun to."""
  return _joining.is_set()


def leave(code: int) -> NoReturn:
  """Ends this process at once if it has peers, else by `sys.exit`.

  The interpreter's own exit would wait for the peers (93 s measured), which
  wait for this process in a collective. It also waits for the threads of
  libraries, and one of a save that has failed can wait for ever.
  """
  if has_peers():
    end(code)
  deadline = threading.Timer(_EXIT_SECONDS, end, [code])
  deadline.daemon = True
  deadline.start()
  sys.exit(code)


def end(code: int) -> NoReturn:
  """Ends this process without the interpreter's own exit."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
