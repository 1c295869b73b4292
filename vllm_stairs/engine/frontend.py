"""What stairs changes in a process that takes requests: admission and statistics.

Put in place only where the method is asked for (and in API server processes that receive its
configuration); both wrappers leave other configurations alone.

Patched: ``SamplingParams._validate_spec_decode``. vLLM refuses ``min_p`` and ``logit_bias`` under
any speculation, because its rejection sampler does not apply them to drafted positions. Ours does
(:mod:`vllm_stairs.engine.acceptor`). Retired by: a rejection sampler upstream that applies every
logits processor.

Patched: ``StatLoggerManager.__init__``. vLLM's hook for statistics, the entry point group
``vllm.stat_logger_plugins``, turns statistics on in every server of the environment, also where
stairs is not asked for and ``--disable-log-stats`` is. Retired by: that group leaving
``--disable-log-stats`` alone.
"""

from typing import Any

from vllm_stairs.config import request_max_height
from vllm_stairs.engine.plugin import wrap


def install() -> None:
    """Put the patches in place in this process. Idempotent."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.metrics.loggers import StatLoggerManager

    wrap(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    wrap(StatLoggerManager, "__init__", _init_stat_loggers)


def _validate_spec_decode(original: Any, params: Any, speculative_config: Any) -> None:
    from vllm_stairs.engine.speculative import is_stairs

    if not is_stairs(speculative_config):
        original(params, speculative_config)
        return
    try:
        request_max_height(params.extra_args)
    except ValueError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _init_stat_loggers(
    original: Any,
    manager: Any,
    vllm_config: Any,
    engine_idxs: list[int] | None = None,
    custom_stat_loggers: list[Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    from vllm_stairs.engine.metrics import StairsStatLogger
    from vllm_stairs.engine.speculative import is_stairs

    if is_stairs(vllm_config.speculative_config):
        custom_stat_loggers = [*(custom_stat_loggers or []), StairsStatLogger]
    original(manager, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)
