"""Measurements of `imsvd benchmark` and `imsvd preflight`.

Contenders always run in turn within one process, round by round, because only
ratios within one run mean anything on a machine that does other work too.
"""
