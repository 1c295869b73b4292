"""What stairs cannot do under `generate`, each in one line that says what to do instead."""

from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled

from vllm_stairs.hf.processors import STATEFUL

LAYOUTS = ("packed", "expanded")

POLICY_METHODS = ("choose", "limit", "observe")
"""What every height policy has; `go_on` is asked for by those that use the confidence."""

NO_SYNCED_GPUS = (
    "stairs does not support synced_gpus (FSDP, DeepSpeed ZeRO stage 3): the processes would make "
    "different numbers of passes; generate without stairs"
)


def check_settings(
    assistant: Any,
    num_speculative_tokens: Any,
    layout: Any,
    stop_strings: Any,
    tokenizer: Any,
    policy: Any,
) -> None:
    """Refuse arguments of `stairs` that it cannot work with."""
    if not isinstance(assistant, PreTrainedModel):
        raise TypeError(
            "stairs needs an assistant, a small Transformers model that shares the target's "
            f"tokenizer, as its first argument; got {type(assistant).__name__}"
        )
    if not assistant.can_generate():
        raise TypeError(
            f"the assistant {type(assistant).__name__} has no language model head: load it with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int):
        raise TypeError(
            "num_speculative_tokens must be a whole number, not "
            f"{type(num_speculative_tokens).__name__}"
        )
    if num_speculative_tokens < 1:
        raise ValueError(f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if stop_strings is not None:
        texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"stop_strings must be a text or a list of texts, not {stop_strings!r}")
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer: give stairs(...) tokenizer=")
    missing = [name for name in POLICY_METHODS if not callable(getattr(policy, name, None))]
    if policy is not None and missing:
        raise TypeError(
            "policy must have the methods of vllm_stairs.height.HeightPolicy; "
            f"{type(policy).__name__} lacks {', '.join(missing)}"
        )


def check_pair(
    model: PreTrainedModel, assistant: PreTrainedModel, tokenizer: Any, assistant_tokenizer: Any
) -> None:
    """Refuse a target and an assistant that cannot work together."""
    if bool(model.config.is_encoder_decoder) != bool(assistant.config.is_encoder_decoder):
        kinds = {True: "encoder-decoder", False: "decoder-only"}
        raise ValueError(
            f"target and assistant must be of one kind: {type(model).__name__} is "
            f"{kinds[bool(model.config.is_encoder_decoder)]}, {type(assistant).__name__} is "
            f"{kinds[bool(assistant.config.is_encoder_decoder)]}"
        )
    for owner, member in (("target", model), ("assistant", assistant)):
        if getattr(member, "_is_stateful", False):
            raise ValueError(
                f"stairs cannot roll back the {owner} {type(member).__name__}, which keeps a "
                "recurrent state: generate without stairs"
            )
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant)]
    if tokenizer is not None and assistant_tokenizer is not None:
        if tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
            raise ValueError(
                "target and assistant must share a tokenizer: the two tokenizers given differ"
            )
    elif sizes[0] != sizes[1]:
        raise ValueError(
            f"target and assistant must share a tokenizer, but their vocabularies have {sizes[0]} "
            f"and {sizes[1]} entries; if only their padding differs, give stairs(...) tokenizer= "
            "and assistant_tokenizer= to show it"
        )


def check_options(
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> None:
    """Refuse options of `generate` that stairs does not honour."""
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"stairs does greedy search and sampling, not {mode.value.replace('_', ' ')}: "
            "leave num_beams at 1 and the options of other generation modes unset"
        )
    for name in (
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
        "use_mtp",
        "prefill_chunk_size",
        "dola_layers",
        "penalty_alpha",
        "constraints",
        "force_words_ids",
    ):
        if getattr(config, name, None):
            raise ValueError(f"stairs does not support {name}: leave it unset")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None) or model_kwargs.get(name):
            raise ValueError(
                f"stairs does not return {name.removeprefix('output_')}: set {name}=False "
                "(scores and logits are returned)"
            )
    if synced_gpus:
        raise ValueError(NO_SYNCED_GPUS)
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise ValueError(
                f"stairs does not support {type(processor).__name__}: it keeps a state that "
                "refused drafts would spoil"
            )
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        raise ValueError(
            "stairs does not support past_key_values of the caller's: the assistant has no cache "
            "for that text; pass the whole text as input_ids"
        )
    for name in ("inputs_embeds", "decoder_inputs_embeds", "token_type_ids"):
        if isinstance(model_kwargs.get(name), Tensor):
            raise ValueError(f"stairs does not support {name}: pass token ids only")
    positions = model_kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim != 2:
        raise ValueError("stairs supports position_ids of two dimensions only (text models)")


def _is_sharded(model: Any) -> bool:
    """Whether `generate` would choose ``synced_gpus`` by itself."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return False
    managed = getattr(model, "_is_fsdp_managed_module", False)
    return bool(managed or is_deepspeed_zero3_enabled())


def check_dropped_arguments(frame: FrameType | None) -> None:
    """Refuse arguments that `generate` drops silently on the way to a callable.

    Transformers 5 does not hand ``assistant_model``, ``streamer``, ``synced_gpus``,
    ``tokenizer`` and ``assistant_tokenizer`` on; a user who gives them beside
    ``custom_generate`` would wait for a stream that never comes. Where the caller is
    `generate` itself its frame still holds them. (To be retired when Transformers hands
    them on.)

    Args:
        frame: the frame that called us.
    """
    if frame is None or frame.f_code.co_name != "generate":
        return
    synced_gpus = frame.f_locals.get("synced_gpus")
    if synced_gpus or (synced_gpus is None and _is_sharded(frame.f_locals.get("self"))):
        raise ValueError(NO_SYNCED_GPUS)
    given = {name: frame.f_locals.get(name) for name in ("assistant_model", "streamer")}
    wrapper = frame.f_back  # `torch.no_grad()` around `generate` holds its keyword arguments
    keywords = wrapper.f_locals.get("kwargs") if wrapper is not None else None
    if isinstance(keywords, dict):
        for name in ("tokenizer", "assistant_tokenizer"):
            given[name] = keywords.get(name)
    for name, value in given.items():
        if value is not None:
            where = "as its first argument" if name == "assistant_model" else f"as {name}="
            raise ValueError(
                f"generate() drops {name} when custom_generate is a callable: give it to "
                f"stairs(...) {where} instead"
            )
