"""Damaged inputs made from a seed, and what each reader may make of them. Run by tests/fuzz.py."""
