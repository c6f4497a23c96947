"""Context parallelism: ranks share the tokens of a row, and fetch the keys that their queries' mask allows."""
