"""The entry point in ``vllm.general_plugins``.

Loaded by vLLM in every process, its model-registry subprocess included, and at the end of
``EngineArgs.__post_init__``: so it is light, idempotent and imports neither torch nor vLLM's
engine. It wraps three methods of ``EngineArgs``; everything else is put in place only when
the method ``stairs`` is asked for (:mod:`vllm_stairs.engine.arguments`).
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_ARGUMENTS_MODULE = "vllm.engine.arg_utils"


def register() -> None:
    """Add the method ``stairs`` to vLLM's engine arguments. Called by vLLM."""
    _when_imported(_ARGUMENTS_MODULE, _wrap_engine_args)


def _wrap_engine_args(arg_utils: ModuleType) -> None:
    from vllm_stairs.engine import arguments

    engine_args = arg_utils.EngineArgs
    wrap(engine_args, "add_cli_args", arguments.add_cli_args, static=True)
    wrap(engine_args, "from_cli_args", arguments.from_cli_args, bound_to_class=True)
    wrap(engine_args, "create_speculative_config", arguments.create_speculative_config)


def wrap(
    owner: type,
    name: str,
    wrapper: Callable[..., Any],
    *,
    static: bool = False,
    bound_to_class: bool = False,
) -> None:
    """Replace ``owner.name`` by ``wrapper(original, ...)``, once.

    Args:
        owner: the class that has the method.
        name: the method's name. A missing one is left alone: the contract reports it where
            stairs is asked for, and vLLM without stairs must not notice.
        wrapper: called with the original callable, then the call's own arguments.
        static: the method is a ``staticmethod``.
        bound_to_class: the method is a ``classmethod``.
    """
    raw = owner.__dict__.get(name)
    if raw is None or getattr(raw, "__vllm_stairs__", False):
        return
    original = raw.__func__ if static or bound_to_class else raw
    if getattr(original, "__vllm_stairs__", False):
        return

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.__name__ = getattr(original, "__name__", name)
    wrapped.__qualname__ = getattr(original, "__qualname__", name)
    wrapped.__doc__ = original.__doc__
    wrapped.__wrapped__ = original  # type: ignore[attr-defined]
    wrapped.__vllm_stairs__ = True  # type: ignore[attr-defined]
    replacement: Any = wrapped
    if static:
        replacement = staticmethod(wrapped)
    elif bound_to_class:
        replacement = classmethod(wrapped)
    setattr(owner, name, replacement)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a callback right after one module was imported, then steps aside."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.callback(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback(module)`` now if the module is loaded, else as soon as it will be.

    vLLM's engine-core and worker processes load plugins without needing the module: importing
    it there would make every start slower, with or without stairs.
    """
    module = sys.modules.get(name)
    if module is not None and hasattr(module, "EngineArgs"):
        callback(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, callback))
