"""Requests that plain vLLM accepts are accepted.

vLLM refuses ``min_p`` and ``logit_bias`` under any speculation, because its rejection sampler
does not apply them to drafted positions. Ours does (:mod:`vllm_stairs.engine.acceptor`).

Patched: ``SamplingParams._validate_spec_decode``. Retired by: a rejection sampler upstream that
applies every logits processor.
"""

from typing import Any

from vllm_stairs.config import request_max_height
from vllm_stairs.engine.plugin import wrap


def admit_all_requests() -> None:
    """Put the patch in place in this process. Idempotent."""
    from vllm.sampling_params import SamplingParams

    wrap(SamplingParams, "_validate_spec_decode", _validate_spec_decode)


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
