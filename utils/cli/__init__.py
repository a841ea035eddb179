"""Command line: flags, and how a script starts and ends."""
