"""Retrieval over long contexts: what was planted in a text, asked for at its end, at every length and depth."""
