"""The documentation is true: its commands, keys, messages, links and pictures."""
