"""Memory of engines that tests have let go."""

import gc


def free_engines() -> None:
    """Give back the memory of engines that nothing refers to any more.

    When an engine has started, vLLM freezes all objects that there are: the collector does not
    look at them again.
    """
    gc.unfreeze()
    gc.collect()
