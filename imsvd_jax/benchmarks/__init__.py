"""Measurements behind `python -m imsvd_jax benchmark`.

Contenders always run in turn within one process, round by round, because only
ratios within one run mean anything on a machine that does other work too.
"""
