"""Files of other projects: the backbone is taken, their heads are named."""

import argparse
import itertools

import jax
import numpy as np
import pytest

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.layouts import LAYOUTS
from imsvd_jax.formats.safetensors_files import write_safetensors
from imsvd_jax.interop.weight_import import import_weights
from tests.interop.test_weight_import import recipe
from tests.run_command import one_line_error

nets = pytest.importorskip("tests.torch_resnet")
torch = nets.torch
nn = torch.nn

NET = nets.randomize(nets.torch_resnet("resnet18", filters=4))
SMALL = nets.randomize(nets.torch_resnet("resnet18", filters=4, stem="cifar"))
NAMED = NET.state_dict()
CHILDREN = (NET.conv1, NET.bn1, nn.ReLU(), nn.MaxPool2d(3))
STAGES = (NET.layer1, NET.layer2, NET.layer3, NET.layer4)
NUMBERED = nn.Sequential(*CHILDREN, *STAGES, nn.Flatten()).state_dict()
# lightly's network for small images calls ReLU as a function.
FEWER = nn.Sequential(
  SMALL.conv1, SMALL.bn1, SMALL.layer1, SMALL.layer2, SMALL.layer3, SMALL.layer4
).state_dict()


def under(**parts):
  """State dicts below prefixes; a width stands for a small head."""
  state = {}
  for prefix, part in parts.items():
    part = {"weight": torch.ones(part, part)} if isinstance(part, int) else part
    name = prefix.replace("__", ".")
    state.update({f"{name}.{key}" if name else key: part[key] for key in part})
  return state


def wrapped(state, wrapper="module."):
  return {wrapper + key: value for key, value in state.items()}


MOCO = {
  **under(encoder_q=NAMED, encoder_q__fc__0=4, encoder_k=NAMED),
  "queue": torch.ones(4, 8),
  "queue_ptr": torch.zeros(1, dtype=torch.long),
}
MVEB = under(
  encoder=NUMBERED,
  momentum_encoder=NUMBERED,
  projector__0__0=4,
  momentum_projector__0__0=4,
)
SWAV = under(projection_head__0=4, prototypes=4)
SIMSIAM = under(encoder=NAMED, encoder__fc__0=4, predictor__0=4)
SOLO = under(classifier=4, projector__0=4, momentum_projector__0=4)
# name: (project, content of the file, what is left out)
FILES = {
  "MVEB": (
    "MVEB",
    {"model": wrapped(MVEB), "optimizer": {}, "epoch": 3, "F": None},
    "momentum_encoder.* projector.* momentum_projector.* optimizer epoch F",
  ),
  "SwAV": (
    "SwAV",
    {"state_dict": wrapped({**NAMED, **SWAV})},
    "projection_head.* prototypes.*",
  ),
  "DeepCluster v2": (
    "SwAV",
    wrapped({**NAMED, **under(prototypes__prototypes0=4)}),
    "prototypes.*",
  ),
  "DINO": (
    "DINO",
    {
      "student": wrapped(under(backbone=SMALL.state_dict(), head__mlp__0=4)),
      "teacher": under(backbone=NAMED, head__mlp__0=4),
      "args": argparse.Namespace(arch="resnet50", epochs=800),
      "epoch": 800,
    },
    "head.* student args epoch",
  ),
  "MoCo v2": (
    "MoCo v2",
    {"epoch": 200, "arch": "resnet50", "state_dict": wrapped(MOCO)},
    "encoder_q.fc.* encoder_k.* queue queue_ptr epoch arch",
  ),
  "MoCo v3": (
    "MoCo v3",
    {
      "state_dict": wrapped(
        under(
          base_encoder=NAMED,
          base_encoder__fc__0=4,
          momentum_encoder=NAMED,
          predictor__0=4,
        )
      )
    },
    "base_encoder.fc.* momentum_encoder.* predictor.*",
  ),
  "SimSiam": (
    "SimSiam",
    {"state_dict": wrapped(SIMSIAM)},
    "encoder.fc.* predictor.*",
  ),
  "solo-learn": (
    "solo-learn",
    {"state_dict": {**under(backbone=NAMED, momentum_backbone=NAMED), **SOLO}},
    "momentum_backbone.* classifier.* projector.* momentum_projector.*",
  ),
  "solo-learn of 2021": (
    "solo-learn",
    {"state_dict": {**under(encoder=NAMED), **SOLO}},
    "classifier.* projector.* momentum_projector.*",
  ),
  "lightly": (
    "lightly",
    {
      "state_dict": under(
        backbone=NUMBERED,
        projection_head__layers__0=4,
        prediction_head__layers__0=4,
        backbone_momentum=NUMBERED,
        projection_head_momentum__layers__0=4,
      )
    },
    "projection_head.* prediction_head.* backbone_momentum.*"
    " projection_head_momentum.*",
  ),
  "lightly's benchmarks": (
    "lightly",
    under(
      backbone=NAMED,
      projection_head__layers__0=4,
      student_backbone=NAMED,
      student_projection_head__layers__0=4,
      online_classifier__linear=4,
    ),
    "projection_head.* student_backbone.* student_projection_head.*"
    " online_classifier.*",
  ),
  "lightly's DINO": (
    "lightly",
    under(
      student_backbone=NUMBERED,
      student_head__layers__0=4,
      teacher_backbone=NUMBERED,
      teacher_head__layers__0=4,
    ),
    "student_backbone.* student_head.* teacher_head.*",
  ),
  "torch.compile": ("", wrapped(NAMED, "_orig_mod."), ""),
  "torch.compile and DDP": ("", wrapped(NAMED, "module._orig_mod."), ""),
  "DDP and torch.compile": (
    "MoCo v2",
    {"state_dict": wrapped(MOCO, "_orig_mod.module.")},
    "encoder_q.fc.* encoder_k.* queue queue_ptr",
  ),
  "a compiled part": ("", under(backbone___orig_mod=NAMED), ""),
  "a Sequential alone": ("", NUMBERED, ""),
  "a Sequential as a backbone": ("", under(backbone=NUMBERED), ""),
}


def assert_is(imported, net):
  expected = formats.from_torchvision(nets.state_of(net))
  jax.tree.map(
    np.testing.assert_array_equal, imported.variables, expected.variables
  )
  assert imported.architecture == expected.architecture


@pytest.mark.parametrize("name", FILES)
def test_the_backbone_is_taken_and_heads_are_named(name, tmp_path):
  project, content, left_out = FILES[name]
  torch.save(content, tmp_path / "file")
  imported = formats.read_file(tmp_path / "file")
  assert_is(imported, NET)
  assert imported.project == project
  assert " ".join(imported.ignored) == left_out


def test_every_layout_has_a_file():
  assert {file[0] for file in FILES.values()} >= {x.project for x in LAYOUTS}


def test_a_sequential_without_modules_for_relu_and_pooling():
  state = under(backbone=FEWER, projection_head__layers__0=4)
  assert_is(formats.from_torchvision(state), SMALL)


@pytest.mark.parametrize("prefix", ["net.image", "module.net.image."])
@pytest.mark.parametrize("state", [NAMED, NUMBERED], ids=["named", "numbered"])
def test_a_prefix_takes_the_rest(state, prefix):
  state = wrapped(under(net__image=state, net__image__fc__0=4, net__text=NAMED))
  imported = formats.from_torchvision(state, prefix=prefix)
  assert_is(imported, NET)
  assert imported.ignored == ("net.image.fc.*", "net.text.*")


def test_unknown_layouts_say_which_prefix_to_give():
  state = under(visual=NAMED, text__0=4)
  with one_line_error(r"begin with visual\., .*--prefix=visual\. takes it"):
    formats.from_torchvision(state)
  with one_line_error(r"No name begins with 'vision'; .* begin with visual\."):
    formats.from_torchvision(state, prefix="vision")


def test_a_head_that_no_project_has_is_unexpected():
  for state in (
    under(backbone=NAMED, projector__0=4, decoder=4),
    {**NAMED, **under(decoder=4)},
  ):
    with one_line_error(r"unexpected .*decoder\.weight"):
      formats.from_torchvision(state)


def test_what_a_backbone_lacks_has_the_name_in_the_file():
  for name in ("layer3.1.bn2.weight", "layer1.0.conv1.weight"):
    key = f"module.encoder_q.{name}"
    state = {k: v for k, v in wrapped(MOCO).items() if k != key}
    with one_line_error(f"missing {key}"):
      formats.from_torchvision(state)


def test_two_networks_in_one_file_are_refused():
  for a, b in itertools.combinations(("", "module.", "_orig_mod."), 2):
    with pytest.raises(UserError, match="mixes two networks"):
      formats.from_torchvision({**wrapped(NAMED, a), **wrapped(NAMED, b)})


def test_the_run_says_whose_layout_it_was(tmp_path):
  torch.save(FILES["MVEB"][1], tmp_path / "file")
  workdir = str(tmp_path / "run")
  notes = import_weights(str(tmp_path / "file"), workdir, recipe())
  assert "in MVEB's layout" in notes[0]
  assert "Left out, as not part of the encoder: momentum_encoder" in notes[2]


def test_our_own_names_need_no_prefix(tmp_path):
  imported = formats.from_torchvision(NAMED)
  path = tmp_path / "file"
  formats.write_file(
    path, imported.variables, format_name="numpy", metadata={"step": 1}
  )
  with one_line_error("leave out the prefix 'encoder.'"):
    formats.read_file(path, prefix="encoder.")
  write_safetensors(path, nets.state_of(NET), {})
  with one_line_error("No name begins with 'encoder.'"):
    formats.read_file(path, prefix="encoder.")
