"""Other people's weights become runs, or are refused with a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet_r50
from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.safetensors_files import write_safetensors
from imsvd_jax.interop.weight_import import import_weights
from imsvd_jax.runs import resume, weight_files, weights
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.formats.test_names import fake
from tests.run_command import one_line_error, run_imsvd

WIDTH = 1 / 16  # The layouts are those of full width, and quick.


def recipe(**overrides):
  config = imagenet_r50.get_config()
  config.model.projector = (32, 16)
  config.model.dtype = "float32"
  config.objective.imsvd.num_bins = 8
  config.data.crop = config.data.resize = 64
  config.update_from_flattened_dict(overrides)
  return config


def save(content, path):
  """Writes a file as people have it: a checkpoint with torch, as it must be.

  A state dict alone goes into safetensors, which every machine reads.
  """
  if "model" not in content:
    write_safetensors(path, content, {})
    return
  torch = pytest.importorskip("torch")
  model = {
    k: torch.from_numpy(np.array(v)) for k, v in content["model"].items()
  }
  torch.save({**content, "model": model}, path)


def network(*projector, **biases):
  return formats.Architecture("resnet50", WIDTH, projector=projector, **biases)


def barlow():
  state = fake(network(32, 32, 16, hidden_bias=False), "module.")
  for name, value in (("mean", 0.0), ("var", 1.0)):
    state[f"module.bn.running_{name}"] = np.full(16, value, np.float32)
  state["module.bn.num_batches_tracked"] = np.array(5)
  return {"epoch": 1000, "model": state, "optimizer": {}}


def torchvision():
  state = fake(network())
  state["fc.weight"] = np.ones((10, 128), np.float32)
  state["fc.bias"] = np.ones(10, np.float32)
  return state


def checkpoint_of(*projector):
  state = fake(network(*projector), "module.")
  return {"epoch": 100, "model": state, "optimizer": {}}


# name: (content, objective, projector, what the notes must say)
OFFICIAL = {
  "imsvd model.pth": (checkpoint_of(32, 16), "imsvd", (32, 16), "epoch"),
  "imsvd model_final.pth": (fake(network()), "imsvd", (), "backbone alone"),
  "vicreg": (checkpoint_of(32, 32, 32), "vicreg", (32, 32, 32), "optimizer"),
  "barlow": (barlow(), "barlow_twins", (32, 32, 16), "module.bn.running_var"),
  "torchvision": (torchvision(), "vicreg", (), r"classifier (fc)"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_become_runs(name, tmp_path):
  content, objective, projector, note = OFFICIAL[name]
  save(content, tmp_path / "file")
  workdir = tmp_path / "run"
  config = recipe(**{"objective.name": objective})
  notes = import_weights(str(tmp_path / "file"), str(workdir), config)
  assert note in "\n".join(notes)
  assert "width_multiplier: 1.0 -> 0.0625" in "\n".join(notes)
  stored = weights.load_variables(workdir)
  assert formats.architecture_of(stored._asdict()) == network(
    *projector, hidden_bias="barlow" not in name
  )
  state = content.get("model", content)
  prefix = "module.backbone." if "model" in content else ""
  kernel = stored.params["backbone"]["layer3_0"]["conv2"]["kernel"]
  expected = state[f"{prefix}layer3.0.conv2.weight"]
  np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))
  model = stored.config["model"]
  assert model["backbone"] == "resnet50"
  assert model["projector"] == list(projector or (32, 16))
  assert model["projector_bias"] == ("barlow" not in name)
  if name == "imsvd model.pth":
    check_run(workdir)


def test_a_projector_with_a_last_bias_becomes_a_run(tmp_path):
  biases = {"hidden_bias": False, "last_bias": True}
  state = fake(network(32, 16, **biases), "module.")
  save({"model": state}, tmp_path / "file")
  notes = import_weights(
    str(tmp_path / "file"), str(tmp_path / "run"), recipe()
  )
  assert "projector_last_bias: False -> True" in "\n".join(notes)
  stored = weights.load_variables(tmp_path / "run")
  assert formats.architecture_of(stored._asdict()) == network(32, 16, **biases)
  assert load_encoder(tmp_path / "run").model.projector.last_bias


def check_run(workdir):
  """What later commands do with a run: features, codes, further training."""
  encoder = load_encoder(workdir)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
  features, codes = encoder.features_and_codes(images)
  assert features.shape == (3, 128)
  assert codes.shape == (3, 2)
  assert np.isfinite(features).all()
  # The state of a run with this recipe, its shapes alone: nothing compiles.
  experiment = experiment_lib.build(encoder.config, num_examples=10_000)
  like = jax.eval_shape(lambda: step_lib.init_state(experiment))
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  like = like.replace(
    params=zeros(like.params), batch_stats=zeros(like.batch_stats)
  )
  state, report = weights.init_from(workdir, like)
  assert report.not_loaded == report.unused == []
  jax.tree.map(
    np.testing.assert_array_equal, state.params, encoder.variables["params"]
  )


def test_an_exported_file_needs_no_recipe(tmp_path):
  imported = formats.from_torchvision(checkpoint_of(32, 16)["model"])
  config = recipe()
  config.model.width_multiplier = WIDTH
  formats.write_file(
    tmp_path / "exported",
    imported.variables,
    format_name="numpy",
    metadata={"step": 7, "config": config.to_dict()},
    projector=True,
  )
  notes = import_weights(str(tmp_path / "exported"), str(tmp_path / "run"))
  assert len(notes) == 1  # Nothing was left out, nothing changed.
  stored = weights.load_variables(tmp_path / "run")
  assert stored.step == 7
  jax.tree.map(
    np.testing.assert_array_equal,
    {"params": stored.params, "batch_stats": stored.batch_stats},
    imported.variables,
  )
  other = tmp_path / "other"
  other.mkdir()
  (other / "notes.txt").write_text("mine")
  for folder in (tmp_path / "run", other, other / "notes.txt"):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="has a run already, or other files"):
      import_weights(str(tmp_path / "exported"), str(folder))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("written", "step"), [("12k", 0), ("1e3", 0), (7, 7)])
def test_steps_of_foreign_files(written, step, tmp_path):
  architecture = network()
  write_safetensors(tmp_path / "file", fake(architecture), {"step": written})
  imported = formats.read_file(tmp_path / "file")
  assert weight_files.stored_step(imported) == step


@pytest.mark.parametrize("part", ["model", "data", "objective"])
def test_a_recipe_with_holes_is_refused(part, tmp_path):
  config = recipe().to_dict()
  path = str(tmp_path / "file")
  for hole in ({}, []):
    stored = {"config": {**config, part: hole}}
    write_safetensors(path, fake(network()), stored)
    for load in (load_encoder, lambda p: import_weights(p, f"{p}.run")):
      with one_line_error(rf"lacks {part}\."):
        load(path)
  assert not (tmp_path / "file.run").exists()


def test_what_functions_need_is_not_what_training_needs(tmp_path):
  config = {
    "model": {"dtype": "float32"},
    "data": weight_files.IMAGENET_DATA,
    "objective": {"name": "vicreg"},
  }
  path = str(tmp_path / "file")
  write_safetensors(path, fake(network()), {"config": config})
  with one_line_error(r"is not complete .*--config"):
    import_weights(path, str(tmp_path / "run"))


WRONG = {
  "not a ResNet's": {"blocks.0.attn.qkv.weight": np.ones(2, np.float32)},
  "unexpected queue": {**fake(network()), "queue": np.ones(2, np.float32)},
  "multiple of objective.imsvd.num_bins": checkpoint_of(32, 20),
  "1 channels, the recipe for 3": fake(
    formats.Architecture("resnet50", WIDTH, channels=1)
  ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_files_are_refused(message, tmp_path):
  save(WRONG[message], tmp_path / "file")
  with one_line_error(message):
    import_weights(str(tmp_path / "file"), str(tmp_path / "run"), recipe())
  assert not (tmp_path / "run").exists()


def test_a_file_without_a_recipe_asks_for_one(tmp_path):
  save(fake(network()), tmp_path / "file")
  with pytest.raises(UserError, match=r"give a recipe.*--config="):
    import_weights(str(tmp_path / "file"), str(tmp_path / "run"))


def test_the_command(tmp_path):
  save(fake(network()), tmp_path / "model_final.safetensors")
  result = run_imsvd(
    "import_weights",
    f"--file={tmp_path}/model_final.safetensors",
    f"--workdir={tmp_path}/run",
    "--config=configs/imagenet_r50.py",
    "--config.objective.name=vicreg",
  )
  assert result.returncode == 0, result.stderr
  assert f"Wrote {tmp_path}/run" in result.stdout
  config = resume.load_config(tmp_path / "run")
  assert config["objective"]["name"] == "vicreg"
  assert config["model"]["width_multiplier"] == WIDTH
