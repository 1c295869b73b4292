"""Who writes: vLLM in batches, or Transformers where vLLM is not installed."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_stairs.distill.errors import DistillError, first_line
from vllm_stairs.distill.watch import watched

LESS_MEMORY = "lower --max-length, or give --target-dtype bfloat16"
"""What helps when memory is too small for the target to write."""

BATCH = 96
"""Requests written at once; more saves little on a CPU and takes memory for their KV caches."""


@dataclass(frozen=True)
class Request:
    """A text to go on with."""

    tokens: tuple[int, ...]
    write_at_most: int
    temperature: float = 0.0
    """0: greedy."""
    past_the_end: bool = False
    """Go on after the end-of-text token."""
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What was written to it."""

    tokens: tuple[int, ...]
    """Without the end-of-text token."""
    end: int | None
    """The end-of-text token that was written after them; None: the limit came first."""


class Generator(Protocol):
    """Writes continuations of token ids."""

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """One continuation a request, in order."""

    def close(self) -> None:
        """Free what it holds."""


def start(kind: str, model: str, *, dtype: str, max_length: int, device: str) -> Generator:
    """A generator.

    Args:
        kind: ``vllm``, ``transformers``, or ``auto``: vLLM where it is installed.
        model: path or id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        max_length: tokens of the longest text, prompt included.
        device: ``cpu`` or ``cuda``.

    Raises:
        DistillError: vLLM is not installed, or does not start.
    """
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise DistillError("vLLM is not installed: --generator transformers")
        return VllmGenerator(model, dtype=dtype, max_length=max_length, device=device)
    return TransformersGenerator(model, dtype=dtype, device=device)


class VllmGenerator:
    """Plain vLLM, with its defaults."""

    def __init__(self, model: str, *, dtype: str, max_length: int, device: str) -> None:
        memory: dict[str, Any] = {}
        if device == "cpu":
            _prepare_cpu()
            memory["kv_cache_memory_bytes"] = _kv_bytes(model, dtype) * max_length * BATCH
        from vllm import LLM

        self._watch = watched()
        with _said_in_one_line("start"):
            self._llm = LLM(
                model=model,
                dtype=dtype,
                max_model_len=max_length,
                max_num_seqs=BATCH,
                disable_log_stats=True,
                **memory,
            )

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """See :class:`Generator`."""
        if not requests:
            return []
        from vllm import SamplingParams

        with _said_in_one_line("go on"):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(r.tokens)} for r in requests],
                [
                    SamplingParams(
                        temperature=r.temperature,
                        max_tokens=r.write_at_most,
                        ignore_eos=r.past_the_end,
                        detokenize=False,
                    )
                    for r in requests
                ],
                use_tqdm=False,
            )
        written = []
        for output in outputs:
            completion = output.outputs[0]
            ended = completion.finish_reason == "stop"
            tokens = tuple(completion.token_ids)
            written.append(Written(tokens[:-1], tokens[-1]) if ended else Written(tokens, None))
        return written

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()
        self._watch.terminate()
        self._watch.wait()


@contextmanager
def _said_in_one_line(what: str) -> Iterator[None]:
    """vLLM's processes say what happened to them; to this one they are only gone.

    Raises:
        DistillError: they are.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, RuntimeError, ValueError) as error:
        raise DistillError(
            f"vLLM could not {what}: its own lines above say why ({first_line(error)}). "
            f"Where memory is short, {LESS_MEMORY}"
        ) from error


def _prepare_cpu() -> None:
    """All cores and a fast OpenMP for vLLM's worker, unless the user has said otherwise.

    vLLM's default leaves a core to its front end, which has next to nothing to do here.
    """
    from vllm_stairs.engine.cpu import preload_openmp

    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    preload_openmp()


def _kv_bytes(model: str, dtype: str) -> int:
    """Of one token in the KV cache."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = 4 if dtype == "float32" else 2
    return int(2 * config.num_hidden_layers * kv_heads * width * size)


class TransformersGenerator:
    """``generate`` of Transformers, requests with equal options together."""

    def __init__(self, model: str, *, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._device = device
        self._model: Any = (
            AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
            .to(device)
            .eval()
        )
        eos = self._model.generation_config.eos_token_id
        self._eos = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
        # What a model's makers recommend (penalties, top-k) would have a part in greedy text too.
        self._model.generation_config = GenerationConfig(eos_token_id=eos)

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """See :class:`Generator`."""
        kinds: dict[tuple[float, bool], list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault((request.temperature, request.past_the_end), []).append(number)
        written: dict[int, Written] = {}
        for numbers in kinds.values():
            # Texts of like length together: little padding.
            numbers.sort(key=lambda n: (requests[n].write_at_most, len(requests[n].tokens)))
            for start_ in range(0, len(numbers), BATCH):
                batch = numbers[start_ : start_ + BATCH]
                written.update(zip(batch, self._write([requests[n] for n in batch]), strict=True))
        return [written[number] for number in range(len(requests))]

    def _write(self, batch: Sequence[Request]) -> list[Written]:
        import torch

        longest = max(len(r.tokens) for r in batch)
        pad = self._eos[0] if self._eos else 0
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.tokens) :] = torch.tensor(request.tokens)
            mask[row, longest - len(request.tokens) :] = 1
        first = batch[0]
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if first.temperature:
            torch.manual_seed(first.seed)
            sampling = {"do_sample": True, "temperature": first.temperature, "top_p": 1.0}
        if first.past_the_end:
            sampling["eos_token_id"] = -1  # No token has it.
        out = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=max(r.write_at_most for r in batch),
            pad_token_id=pad,
            top_k=0 if first.temperature else None,
            **sampling,
        )[:, longest:].tolist()
        written = []
        for request, row in zip(batch, out, strict=True):
            row = row[: request.write_at_most]
            ends = [i for i, t in enumerate(row) if t in self._eos and not request.past_the_end]
            cut = ends[0] if ends else len(row)
            written.append(Written(tuple(row[:cut]), row[cut] if ends else None))
        return written

    def close(self) -> None:
        """Free the model."""
        del self._model
