"""`python -m tests.run_code PROGRAM`: runs a program given as text."""

import sys

if __name__ == "__main__":
  exec(sys.argv[1])  # The tests' own text.
