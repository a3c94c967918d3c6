"""The numbers of a run in groups: tags of TensorBoard, panels of plots."""

# Groups of the numbers of a step; the other ones are the objective's terms.
_GROUPS = {
  "loss": ("loss", "gradient_norm", "skipped"),
  "code": (
    "embedding_std",
    "information",
    "marginal_entropy_mean",
    "marginal_entropy_min",
    "max_probability",
    "argmax_agreement",
    "dead_bins",
    "off_diagonal_floor",
  ),
  "speed": (
    "learning_rate",
    "epoch",
    "images_per_second",
    "seconds_left",
    "bad_images",
  ),
  "verdict": ("verdict", "why", "advice"),
  "config": ("config",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
TERMS = "terms"


def group(name: str) -> str:
  """Returns "loss", "terms", "code", "online", "speed" or another group."""
  first, slash, _ = name.partition("/")
  if slash:
    return first
  return "final" if name.startswith("final_") else _GROUP_OF.get(name, TERMS)


def tag(name: str) -> str:
  """Returns the name with its group in front, as TensorBoard groups tags."""
  return name if "/" in name else f"{group(name)}/{name}"
