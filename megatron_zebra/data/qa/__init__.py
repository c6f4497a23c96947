"""Questions about facts planted in long real texts: conversations that teach retrieval, and test it, at every depth."""
