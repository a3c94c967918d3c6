"""MUSIC: self-supervised learning by multi-segmental informational coding.

arXiv:2206.06461, the predecessor of IMSVD. An embedding is M segments of b
units, each a softmax; the loss is the entropy of the empirical joint
distribution Pc of the segments over two views (soft_variables.py):

    diagonal     = 1/M        sum_m sum_d Pc(m,m;d,d) log Pc(m,m;d,d)
    off_diagonal = 1/(M(M-1)) sum_{m1 != m2} sum_{d1,d2} Pc log Pc
    loss         = w_d diagonal + w_o off_diagonal

Only the diagonal of the diagonal blocks counts, and sum_d Pc(m,m;d,d) <= 1
with equality only where both views give the same one-hot code, so maximizing
these entropies already asks for codes that are transform-invariant,
non-trivial (every bin is used), diverse (segments are independent in pairs)
and discriminative (one-hot). The minimum is -3 log b, IMSVD's.

Known deviations: the text we hold describes the loss in words and not its
exact weights; normalizing by the number of blocks and w_d = w_o = 1 follow
IMSVD, which extends it. `invariance_weight` adds IMSVD's third term and is 0
by default; the term is reported either way.
"""

import jax

from imsvd_jax.objectives.collectives import AxisName
from imsvd_jax.objectives.imsvd import imsvd_loss


def music_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  num_bins: int,
  temperature: float = 1.0,
  diagonal_weight: float = 1.0,
  off_diagonal_weight: float = 1.0,
  invariance_weight: float = 0.0,
  kernel: str = "auto",
  precision: str = "auto",
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the entropy loss of MUSIC on two views.

  loss = w_d diagonal + w_o off_diagonal, see the module.

  Args:
    z1: Embeddings of the first view [n, M*b].
    z2: Embeddings of the second view of the same images [n, M*b].
    num_bins: b, units per segment.
    temperature: tau of the softmax over a segment.
    diagonal_weight: w_d.
    off_diagonal_weight: w_o.
    invariance_weight: Weight of IMSVD's invariance term, not part of MUSIC.
    kernel: How the entropy terms are computed, see joint_entropy.py.
    precision: Of their matrix products, see there.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar in nats, and its unweighted terms "diagonal" in
    [-log b, 0], "off_diagonal" in [-2 log b, 0] and "invariance" >= 0.
  """
  return imsvd_loss(
    z1,
    z2,
    num_bins=num_bins,
    temperature=temperature,
    diagonal_weight=diagonal_weight,
    off_diagonal_weight=off_diagonal_weight,
    invariance_weight=invariance_weight,
    kernel=kernel,
    precision=precision,
    axis_name=axis_name,
  )
