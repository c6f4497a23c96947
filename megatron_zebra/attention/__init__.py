"""Which keys a query may see, the kernel contract, and one file a backend. Importing this imports no torch."""
