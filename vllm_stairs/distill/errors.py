"""The one kind of error that a user of ``vllm-stairs distill`` sees."""


class DistillError(Exception):
    """Something the user can act on, said in one line."""


def first_line(error: Exception) -> str:
    """Of its message; its type's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
