"""The tasks of tools/evaluate.py, a module each: ``arguments(parser)`` says what it takes, ``run(arguments)`` does it.

Those that training runs too (``evaluation.tasks``) have their parts apart: ``options(parser)`` are the arguments that do not
name a model or a file, ``check(arguments)`` finds what is wrong with them whatever the model is, ``measure(subject, arguments)``
gives the result, the same on all ranks, and ``numbers(result)`` what of it goes into metrics and tables.

Modules import torch only where they run.
"""
