"""From the command line of a launcher to running processes: dry run, check of the nodes, signals, exit codes."""
