"""The process of one arm: builds the engine, then obeys one command a line.

Started by :mod:`vllm_stairs.bench.arm_client` as ``python -m vllm_stairs.bench.arm_process
FD``; FD is its end of a socket pair. A command is one line of JSON, ``{"do": name, ...}``; the
answer is one line, ``{"ok": ...}`` or ``{"error": "one line"}``.
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from vllm_stairs.bench.measure import Loop, Output, Work, summarise

SPEC_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_position",
}


class ArmEngine:
    """A vLLM engine behind the loop's two methods, and the arm's other commands."""

    def __init__(self, engine: dict[str, Any]) -> None:
        started = time.perf_counter()
        from vllm import LLM

        self.llm = LLM(**engine)
        self.startup_seconds = time.perf_counter() - started
        self.engine = self.llm.llm_engine
        self.temperature = 0.0
        self.output_tokens = 1
        self.ignore_eos = True
        self.loop: Loop
        self.before: dict[str, Any] = {}
        self.paused = False

    # The loop's two methods.

    def submit(self, request_id: str, tokens: Sequence[int], seed: int) -> None:
        """Queue a request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=self.temperature,
            seed=seed if self.temperature else None,
            max_tokens=self.output_tokens,
            ignore_eos=self.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(tokens)}, parameters)

    def step(self) -> list[Output]:
        """Run one engine step."""
        outputs = []
        for output in self.engine.step():
            tokens = output.outputs[0].token_ids if output.outputs else ()
            outputs.append(Output(output.request_id, tokens, output.finished))
        return outputs

    # Commands.

    def describe(self) -> dict[str, Any]:
        """What the engine made of the arguments: facts for the result file."""
        config = self.engine.vllm_config
        facts: dict[str, Any] = self.llm.collective_rpc("bench_facts")[0]
        return {
            "startup_seconds": self.startup_seconds,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "compilation_mode": str(config.compilation_config.mode),
            "enforce_eager": bool(config.model_config.enforce_eager),
            "kv_cache_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            **facts,
        }

    def measure(self, profile: bool = False, **arguments: Any) -> dict[str, Any]:
        """One pass, see :meth:`begin`; with timers in the worker where ``profile`` is set."""
        if profile:
            self.llm.collective_rpc("bench_profile_start")
        try:
            self.begin(**arguments)
            self.turn(None)
        finally:
            profiled = self.llm.collective_rpc("bench_profile_stop")[0] if profile else None
        return {**self.end(), "profile": profiled}

    def begin(
        self,
        work: list[dict[str, Any]],
        batch: int,
        temperature: float,
        output_tokens: int,
        seed: int,
        ignore_eos: bool,
        by_group: bool,
    ) -> None:
        """Get a pass over the prompts ready, with an empty prefix cache."""
        self.temperature, self.output_tokens = temperature, output_tokens
        self.ignore_eos = ignore_eos
        items = [
            Work(w["id"], w["group"], tuple(w["tokens"]), tuple(w["turns"]), w["chat"])
            for w in work
        ]
        self.llm.reset_prefix_cache()
        self.before = self._counters()
        self.loop = Loop(
            self, items, batch, seed=seed, follow_up=self._follow_up, by_group=by_group
        )

    def turn(self, until_tokens: int | None) -> bool:
        """Serve until the pass has written so many tokens (None: to its end).

        An engine that is to wait is held between two steps, its requests kept, by vLLM's own
        pause; it would go on else.

        Returns:
            Whether the pass is done.
        """
        self.loop.run(
            math.inf if until_tokens is None else until_tokens,
            resume=self._resume if self.paused else None,
            pause=self._pause,
        )
        return self.loop.done

    def end(self) -> dict[str, Any]:
        """The figures of the pass that is done."""
        outcome = self.loop.result()
        figures = summarise(outcome)
        figures["speculation"] = _difference(self.before, self._counters())
        figures["outputs"] = {request.id: request.tokens for request in outcome.requests}
        figures["later_prompts"] = {
            request.id: list(request.prompt) for request in outcome.requests if request.turn
        }
        return figures

    def _pause(self) -> None:
        self.llm.sleep(level=0, mode="keep")
        self.paused = True

    def _resume(self) -> None:
        self.llm.wake_up(tags=["scheduling"])
        self.paused = False

    def logprobs(self, tokens: list[int], output_tokens: int, ignore_eos: bool) -> list[Any]:
        """Greedy again, alone and with log-probabilities: ``[token, {id: logprob}]`` a position."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=ignore_eos, logprobs=2
        )
        self.llm.reset_prefix_cache()
        (answer,) = self.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        completion = answer.outputs[0]
        positions = completion.logprobs or [{} for _ in completion.token_ids]
        return [
            [token, {str(key): entry.logprob for key, entry in top.items()}]
            for token, top in zip(completion.token_ids, positions, strict=True)
        ]

    def bandwidth(self, megabytes: int, repeats: int) -> dict[str, Any]:
        """Memory bandwidth, measured by the worker."""
        answer: dict[str, Any] = self.llm.collective_rpc(
            "bench_bandwidth", args=(megabytes, repeats)
        )[0]
        return answer

    def memory(self) -> dict[str, int]:
        """Peak memory of all workers together, in bytes."""
        peaks = self.llm.collective_rpc("bench_memory")
        return {key: sum(peak.get(key, 0) for peak in peaks) for key in peaks[0]}

    def _follow_up(self, work: Work, answers: Sequence[list[int]]) -> list[int] | None:
        from vllm_stairs.bench import prompts

        tokenizer: Any = self.llm.get_tokenizer()
        turns: list[str] = []
        for index, answer in enumerate(answers):
            turns += [work.turns[index], tokenizer.decode(answer, skip_special_tokens=True)]
        turns.append(work.turns[len(answers)])
        tokens = prompts.render(turns, work.chat, tokenizer)
        room = self.engine.vllm_config.model_config.max_model_len - self.output_tokens
        return tokens if len(tokens) <= room else None

    def _counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = {}
        for metric in self.llm.get_metrics():
            name = SPEC_COUNTERS.get(metric.name)
            if name:
                counters[name] = getattr(metric, "values", None) or getattr(metric, "value", 0)
        method = getattr(self.engine.vllm_config, "speculative_config", None)
        if method is not None and "stairs" in type(method).__name__.lower():
            statistics: dict[str, Any] = dict(self.llm.collective_rpc("stairs_statistics")[0])
            for key in ("steps", "staircases", "heights", "drafted_per_position", "seconds", "off"):
                if key in statistics:
                    counters[key] = statistics[key]
        return counters


def _difference(before: Any, after: Any) -> Any:
    """What was added to (nested) counters."""
    if isinstance(after, dict):
        return {key: _difference(before.get(key), value) for key, value in after.items()}
    if isinstance(after, list):
        old = before if isinstance(before, list) else [0] * len(after)
        old = old + [0] * (len(after) - len(old))
        return [new - was for new, was in zip(after, old, strict=True)]
    return after - (before or 0)


def one_line(error: BaseException) -> str:
    """An exception as one line: the last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic ends its messages with advice on where to read more.
    lines = [line for line in lines if not line.startswith("For further information")]
    text = lines[-1] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def serve(channel: socket.socket) -> None:
    """Obey commands until the other end closes."""
    stream = channel.makefile("rw", encoding="utf-8")
    arm: ArmEngine | None = None
    for line in stream:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name == "start":
                arm = ArmEngine(command["engine"])
                answer: Any = arm.describe()
            elif name == "stop":
                break
            else:
                answer = getattr(arm, name)(**command)
            reply = {"ok": answer}
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": one_line(error)}
        stream.write(json.dumps(reply) + "\n")
        stream.flush()
    if arm is not None:
        # In good order: a killed engine leaves its shared memory behind.
        arm.engine.engine_core.shutdown()


def main() -> None:
    """Entry point of the process."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    serve(channel)
    # The engine has been shut down; threads that vLLM leaves behind must not hold this up.
    os._exit(0)


if __name__ == "__main__":
    main()
