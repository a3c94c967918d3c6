"""Command lines: flags, then one call. The only users of absl.

What a command calls is imported late, so that --help and a wrong flag answer at
once.
"""
