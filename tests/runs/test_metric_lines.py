"""Lines of metrics.jsonl: strict JSON, and damage that is said and mended."""

import errno
import json
import math
import os

import pytest
from etils import epath

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import metric_lines, metrics
from imsvd_jax.runs.metric_lines import Mark

LINES = [metric_lines.encode(s, {"loss": s / 7, "lr": 0.5}) for s in range(9)]
MARKS = [Mark(n, metric_lines.digest(LINES[:n])) for n in (5, 7)]  # 4 and 6.


def resume(tmp_path, content, step=6, marks=MARKS):
  """Continues from a step; returns the file's lines afterwards."""
  path = tmp_path / metrics.METRICS_FILE
  path.write_bytes(content)
  writer = metrics.MetricWriter(str(tmp_path), start_step=step, marks=marks)
  writer.write(7, {"loss": 1.0, "lr": 0.5})
  mark = writer.sync()
  writer.close()
  found = path.read_text().splitlines(keepends=True)
  assert mark.matches(found)
  assert mark.lines == len(found)
  assert json.loads(found[-1]) == {"step": 7, "loss": 1.0, "lr": 0.5}
  return found[:-1]


def raw(*lines):
  return "".join(lines).encode()


FINAL = '{"step": 6, "final_knn": 0.5}\n'


@pytest.mark.parametrize(
  "content",
  [
    raw(*LINES[:7]),
    raw(*LINES),
    raw(*LINES[:7], '{"step": 7, "lo'),
    raw(*LINES[:7], FINAL),
  ],
  ids=["whole", "later", "cut_by_a_kill", "final"],
)
def test_what_a_kill_leaves_is_no_damage(content, tmp_path, capsys):
  assert resume(tmp_path, content) == LINES[:7]
  assert "WARNING" not in capsys.readouterr().err
  assert not list(tmp_path.glob("*damaged*"))


@pytest.mark.parametrize(
  ("content", "kept", "said"),
  [
    (b"", [], "of the 7 lines up to step 6, 7 are missing, after step 0"),
    (raw(*LINES[:3]), LINES[:3], "4 are missing, after step 0; 3 lines are"),
    (raw(*LINES[:6]), LINES[:6], "1 are missing, after step 4; 6 lines are"),
    (raw(*LINES[:2], *LINES[3:7]), None, "1 are missing, after step 0; 6"),
    (raw(*LINES[:7], *LINES[:7]), LINES[:7], "7 lines are doubled or unread"),
    (raw(LINES[0], *LINES[:7]), LINES[:7], "1 lines are doubled or unread"),
    (
      raw(*LINES[:5], LINES[5].replace("0.7", "0.8"), LINES[6]),
      None,
      "at least one has changed, after step 4; 7 lines are kept",
    ),
    (raw(*LINES[:7]) + b"\xff\xfe\n", LINES[:7], "1 lines are doubled or unr"),
    (raw(*LINES[:4]) + b"\xff\n" + raw(*LINES[4:7]), LINES[:7], "1 lines"),
    (raw("5\n", "{}\n", *LINES[:7], "[]\n", "x\n"), LINES[:7], "4 lines are"),
    (raw(*LINES[:7]) + bytes(40) + b"\n", LINES[:7], "1 lines are doubled"),
    (raw("[" * 99999, "\n", *LINES[:7]), LINES[:7], "1 lines are doubled"),
    (raw('{"step": 1e999}\n', *LINES[:7]), LINES[:7], "1 lines are doubled"),
    (raw('{"step": 1, "a": [2]}\n', *LINES[:7]), LINES[:7], "1 lines are"),
  ],
)
def test_damage_is_one_line_and_the_file_is_kept(
  content, kept, said, tmp_path, capsys
):
  found = resume(tmp_path, content)
  assert kept is None or found == kept
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert said in error
  assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == content
  assert len(metrics.read_metrics(tmp_path)) == len(found) + 1


def test_the_same_damage_is_copied_once(tmp_path):
  for _ in range(3):
    resume(tmp_path, b"5\n")
  resume(tmp_path, b"6\n")
  names = sorted(p.name for p in tmp_path.glob("*damaged*"))
  assert names == ["metrics.jsonl.damaged-1", "metrics.jsonl.damaged-2"]


def test_a_disk_that_does_not_answer_loses_no_lines(tmp_path, monkeypatch):
  path = tmp_path / metrics.METRICS_FILE
  path.write_bytes(raw(*LINES))
  monkeypatch.setattr(os.path, "exists", lambda _: False)

  def fails(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(epath.Path(path).__class__, "read_bytes", fails)
  with pytest.raises(UserError, match="Input/output error") as error:
    metrics.MetricWriter(str(tmp_path), start_step=6, marks=MARKS)
  assert "\n" not in str(error.value)
  assert path.read_text() == "".join(LINES)


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path):
  writer = metrics.MetricWriter(str(tmp_path), start_step=0)
  writer.write(1, {"loss": math.nan, "norm": -math.inf, "lr": 0.5})
  writer.close()
  line = (tmp_path / metrics.METRICS_FILE).read_text()
  expected = {"step": 1, "loss": None, "norm": None, "lr": 0.5}
  assert json.loads(line) == expected | {"not_finite": ["loss", "norm"]}
  (found,) = metrics.read_metrics(tmp_path)
  assert found.keys() == expected.keys()
  assert math.isnan(found["loss"])
  assert math.isnan(found["norm"])


def test_readers_leave_out_what_they_cannot_read(tmp_path, caplog):
  content = b'5\n{}\n\xff\n{"step": 3, "loss": "x"}\n' + raw(LINES[1]) + b"{"
  (tmp_path / metrics.METRICS_FILE).write_bytes(content)
  assert metrics.read_metrics(tmp_path) == [
    {"step": 1, "loss": 1 / 7, "lr": 0.5}
  ]
  assert "4 lines of" in caplog.text


@pytest.mark.parametrize("kind", ["removed", "replaced"])
def test_lines_of_a_file_that_is_gone_are_saved(kind, tmp_path):
  writer = metrics.MetricWriter(str(tmp_path), start_step=0)
  writer.write(1, {"loss": 1.0})
  writer.sync()
  path = tmp_path / metrics.METRICS_FILE
  path.unlink()
  if kind == "replaced":
    path.write_text("another run's")
  writer.write(2, {"loss": 2.0})
  with pytest.raises(UserError, match=f"{kind} while") as error:
    writer.sync()
  assert "\n" not in str(error.value)
  saved = (tmp_path / "metrics.jsonl.saved-1").read_text()
  assert [json.loads(line)["step"] for line in saved.splitlines()] == [1, 2]
  assert kind == "removed" or path.read_text() == "another run's"
  writer.close()
