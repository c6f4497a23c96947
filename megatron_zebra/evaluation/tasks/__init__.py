"""The tasks of tools/evaluate.py, a module each: ``arguments(parser)`` says what it takes, ``run(arguments)`` does it.

Modules import torch only where they run.
"""
