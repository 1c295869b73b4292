"""The one kind of error that a user of the benchmark sees."""


class BenchError(Exception):
    """Something the user can act on, said in one line (exit status 2)."""
