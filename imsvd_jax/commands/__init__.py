"""Command lines: flags, then one call. The only users of absl."""
