"""The one kind of error that a user of ``vllm-stairs distill`` sees."""


class DistillError(Exception):
    """Something the user can act on, said in one line."""
