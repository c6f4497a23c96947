"""Stands for the training where a test asks what words reach it."""

import sys

print(sys.argv[1:], flush=True)
