"""Stairs-assisted generation: the loop, and the two ways to call it."""

import inspect
import time
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from vllm_stairs.acceptor.dense import accept_greedy, accept_sampled
from vllm_stairs.height import FixedHeight, HeightPolicy
from vllm_stairs.hf.checks import LAYOUTS, check_dropped_arguments, check_options, check_pair
from vllm_stairs.hf.processors import NEVER, Stopper, process
from vllm_stairs.hf.reader import Reader, accepts, reads_ragged_rows
from vllm_stairs.hf.stats import StairsStats
from vllm_stairs.hf.text import Text

DEFAULT_HEIGHT = 8
"""The largest height unless said otherwise."""


def stairs(
    assistant: PreTrainedModel,
    *,
    num_speculative_tokens: int = DEFAULT_HEIGHT,
    adaptive: bool = True,
    layout: Literal["packed", "expanded"] = "packed",
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    policy: HeightPolicy | FixedHeight | None = None,
) -> "Stairs":
    """What ``model.generate(..., custom_generate=stairs(assistant))`` takes.

    The text is the one that ``model.generate(...)`` alone would write (greedy), or has its
    distribution (``do_sample=True``). Keep the object to keep what the height policy has
    learned, and to read ``.stats``.

    Args:
        assistant: a small model that shares the target's tokenizer.
        num_speculative_tokens: the largest height of a staircase, K.
        adaptive: choose each height from measured acceptance and cost; else always K.
        layout: ``packed`` reads a staircase as one sequence, ``expanded`` as the paper's
            batch of growing sequences.
        streamer: as `generate` takes it.
        tokenizer: for ``stop_strings``; with ``assistant_tokenizer``, to show that
            vocabularies of different size differ in padding only.
        assistant_tokenizer: see ``tokenizer``.
        stop_strings: as `generate` takes them (which refuses them without a tokenizer, and
            drops the tokenizer).
        policy: a height policy of your own instead of ``adaptive``.
    """
    return Stairs(
        assistant,
        num_speculative_tokens=num_speculative_tokens,
        adaptive=adaptive,
        layout=layout,
        streamer=streamer,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        stop_strings=stop_strings,
        policy=policy,
    )


def stairs_generate(
    model: PreTrainedModel,
    assistant: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    num_speculative_tokens: int = DEFAULT_HEIGHT,
    adaptive: bool = True,
    layout: Literal["packed", "expanded"] = "packed",
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    policy: HeightPolicy | FixedHeight | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with stairs, as a plain function.

    Args:
        model: the target.
        assistant: see :func:`stairs`, as are all named arguments below.
        inputs: as `generate` takes it.
        generation_config: as `generate` takes it.
        num_speculative_tokens: see :func:`stairs`.
        adaptive: see :func:`stairs`.
        layout: see :func:`stairs`.
        streamer: see :func:`stairs`.
        tokenizer: see :func:`stairs`.
        assistant_tokenizer: see :func:`stairs`.
        stop_strings: see :func:`stairs`.
        policy: see :func:`stairs`.
        **kwargs: everything else that `generate` takes.

    Returns:
        What `generate` returns.
    """
    if stop_strings is None and generation_config is not None and generation_config.stop_strings:
        stop_strings = generation_config.stop_strings
        generation_config = GenerationConfig.from_dict(
            {**generation_config.to_dict(), "stop_strings": None}
        )
    climber = stairs(
        assistant,
        num_speculative_tokens=num_speculative_tokens,
        adaptive=adaptive,
        layout=layout,
        streamer=streamer,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        stop_strings=stop_strings,
        policy=policy,
    )
    return model.generate(inputs, generation_config, custom_generate=climber, **kwargs)


class Stairs:
    """The callable that :func:`stairs` returns. Use that function to make one."""

    def __init__(
        self,
        assistant: PreTrainedModel,
        *,
        num_speculative_tokens: int,
        adaptive: bool,
        layout: str,
        streamer: Any,
        tokenizer: Any,
        assistant_tokenizer: Any,
        stop_strings: str | list[str] | None,
        policy: HeightPolicy | FixedHeight | None,
    ) -> None:
        if not isinstance(assistant, PreTrainedModel):
            raise TypeError(
                "stairs needs an assistant, a small Transformers model that shares the target's "
                f"tokenizer, as its first argument; got {type(assistant).__name__}"
            )
        if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int):
            raise TypeError(
                "num_speculative_tokens must be a whole number, not "
                f"{type(num_speculative_tokens).__name__}"
            )
        if num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
        if stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer: give stairs(...) tokenizer=")
        self.assistant = assistant
        self.layout = layout
        self.streamer = streamer
        self.tokenizer = tokenizer
        self.assistant_tokenizer = assistant_tokenizer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        self.policy = policy or (
            HeightPolicy(num_speculative_tokens)
            if adaptive
            else FixedHeight(num_speculative_tokens)
        )
        self.stats = StairsStats()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, as `generate` calls it.

        Args:
            model: the target.
            input_ids: int64 ``[B, P]``, the (decoder's) prompt.
            logits_processor: prepared by `generate`.
            stopping_criteria: prepared by `generate`.
            generation_config: prepared by `generate`.
            synced_gpus: refused.
            streamer: of a caller other than `generate`.
            inputs_tensor: what the encoder read.
            **model_kwargs: for the target's forward pass.
        """
        frame = inspect.currentframe()
        check_dropped_arguments(frame.f_back if frame is not None else None)
        del frame
        check_pair(model, self.assistant, self.tokenizer, self.assistant_tokenizer)
        check_options(generation_config, logits_processor, model_kwargs, synced_gpus)
        if self.stop_strings:
            stopping_criteria = StoppingCriteriaList(
                [*stopping_criteria, StopStringCriteria(self.tokenizer, self.stop_strings)]
            )
        run = _Run(
            self,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer if streamer is not None else self.streamer,
            inputs_tensor,
            model_kwargs,
        )
        return run.climb()


class _Run:
    """One call: the state of the loop. ``A`` is the number of rows still being written."""

    def __init__(
        self,
        stairs: Stairs,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
        inputs_tensor: Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.config, self.processors = model, config, processors
        self.stats, self.policy = stairs.stats, stairs.policy
        self.expanded = stairs.layout == "expanded"
        self.streamer = streamer
        self.device = input_ids.device
        self.sample = bool(config.do_sample)
        batch = input_ids.shape[0]

        assistant = stairs.assistant
        seq2seq = bool(model.config.is_encoder_decoder)
        self.stopper = Stopper(criteria, batch)
        self.in_step = batch > 1 and (
            self.stopper.needs_step
            or not reads_ragged_rows(model)
            or not reads_ragged_rows(assistant)
        )
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.max_length = min(int(config.max_length), self.stopper.max_length)

        target_kwargs = dict(model_kwargs)
        mask = target_kwargs.pop("decoder_attention_mask" if seq2seq else "attention_mask", None)
        positions = target_kwargs.pop("position_ids", None)
        cache = target_kwargs.pop("past_key_values", None)
        target_kwargs.pop("logits_to_keep", None)
        if positions is None and not seq2seq and accepts(assistant, "position_ids"):
            seen = torch.ones_like(input_ids) if mask is None else mask.long()
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
        self.text = Text(
            input_ids,
            self.max_length + self.policy.max_height + 2,
            mask,
            positions,
            self.pad,
        )
        use_cache = bool(model_kwargs.get("use_cache", True))
        if use_cache and cache is None:
            raise ValueError(
                f"{type(model).__name__} keeps no DynamicCache, which stairs rolls back: generate "
                "without stairs, or with use_cache=False"
            )
        self.target = Reader(model, target_kwargs, cache if use_cache else None, "target")
        self.draft = Reader(
            assistant,
            _assistant_kwargs(assistant, inputs_tensor, model_kwargs, batch) if seq2seq else {},
            _fresh_cache(assistant) if use_cache else None,
            "assistant",
        )
        limits = [
            getattr(member.config.get_text_config(decoder=True), "max_position_embeddings", None)
            for member in (model, assistant)
        ]
        self.last_position = min((limit for limit in limits if limit), default=NEVER)
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size

        self.rows = torch.arange(batch, device=self.device)
        self.finish = torch.full((batch,), NEVER, device=self.device)
        wanted = bool(config.return_dict_in_generate)
        self.scores: list[Tensor] | None = [] if wanted and config.output_scores else None
        self.logits: list[Tensor] | None = [] if wanted and config.output_logits else None
        self.streamed = self.text.prompt_length

    # -- the loop -------------------------------------------------------------------

    def climb(self) -> Any:
        """Write until every row has ended; what `generate` returns."""
        if self.streamer is not None:
            self.streamer.put(self.text.tokens[:, : self.text.prompt_length].cpu())
        while self.rows.numel():
            self.step()
        if self.streamer is not None:
            self.streamer.end()
        return self.output()

    def step(self) -> None:
        """One staircase per row: draft, score, validate, keep."""
        rows, text = self.rows, self.text
        old = text.length[rows]
        count = rows.shape[0]

        # 1. The draft: d1..dK after each row's text.
        begin = self._now()
        chosen = min(self.policy.choose(count), self._room(old))
        catching_up = self.draft.seen is None or self.draft.unread(old) > 2
        drafts, q, confidences, heights = self._write_drafts(old, chosen)
        height = drafts.shape[1]
        drafted = self._now()

        # 2. The target predicts the next token after every stair.
        first = self.target.seen is None
        if self.expanded and height:
            logits = self.target.read_stairs(text, rows, old, height)
        else:
            logits = self.target.read(text, rows, old + height, height + 1)
        scores = process(
            self.processors, text, rows, old, logits.clone() if self.processors else logits
        )
        scored = self._now()

        # 3. Stairs validation.
        if self.sample:
            if height and q is None:
                raise AssertionError("sampling needs the draft's distribution")
            q = logits.new_zeros((count, 0, logits.shape[2])) if q is None else q
            tokens, kept = accept_sampled(drafts, q, scores.softmax(-1))
        else:
            tokens, kept = accept_greedy(drafts, scores.argmax(-1))
        if self.expanded and height:
            self.target.keep_stairs(kept, height)
        self._observe(heights, kept, first, catching_up, begin, drafted, scored, confidences)
        if self.in_step:
            kept = kept.clamp(max=int(kept.min()))

        # 4. Keep what agreed, look for ends, let the readers forget the rest.
        new = (old + kept + 1).clamp(max=self.max_length)
        text.write(rows, old, tokens)
        text.length[rows] = new
        self._collect(self.scores, scores, old, new)
        self._collect(self.logits, logits, old, new)
        end = self.stopper.ends(text, rows, old, new, self._written_scores())
        self.finish[rows] = torch.minimum(self.finish[rows], end)
        self._blank(self.scores, end, new)
        self._blank(self.logits, end, new)
        self.target.forget(new - 1)
        self.draft.forget(new - 1)
        self._drop_ended_rows()
        self._stream()
        self.stats.validation_ms += self._now() - scored

    # -- its parts ------------------------------------------------------------------

    def _now(self) -> float:
        """Milliseconds; waits for the device, whose time is being measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def _room(self, old: Tensor) -> int:
        """The tallest staircase that some row has use for, and no row is too long for."""
        room = self.max_length - int(old.min()) - 1
        return max(min(room, self.last_position - int(old.max())), 0)

    def _write_drafts(
        self, old: Tensor, chosen: int
    ) -> tuple[Tensor, Tensor | None, list[list[float]], list[int]]:
        """Write drafts into the text, after each row's end.

        Returns:
            drafts int64 ``[A, h]``; for sampling their distributions ``[A, h, V]``; the
            draft's confidence in each, per row; each row's height, which ends with an
            end-of-text token.
        """
        rows, text, policy = self.rows, self.text, self.policy
        count = rows.shape[0]
        drafts: list[Tensor] = []
        distributions: list[Tensor] = []
        confidences: list[list[float]] = [[] for _ in range(count)]
        ended: list[int | None] = [None] * count
        limit = min(policy.limit(chosen), self._room(old)) if chosen else 0
        while len(drafts) < limit:
            position = len(drafts)
            if position and policy.uses_confidence:
                open_rows = [
                    confidences[a] if ended[a] is None else [*confidences[a], 0.0]
                    for a in range(count)
                ]
                if not policy.go_on(position, open_rows):
                    break
            logits = self.draft.read(text, rows, old + position, 1)
            logits = _match_vocabulary(logits, self.vocabulary)
            logits = process(self.processors, text, rows, old + position, logits)[:, 0]
            if self.sample:
                q = logits.softmax(-1)
                token = torch.multinomial(q, 1)
                distributions.append(q)
                if policy.uses_confidence:
                    sure = q.gather(1, token)[:, 0]
            else:
                top, token = logits.max(-1, keepdim=True)
                if policy.uses_confidence:
                    sure = (top[:, 0] - logits.logsumexp(-1)).exp()
            text.write(rows, old + position, token)
            drafts.append(token)
            if policy.uses_confidence:
                # An assistant that overflows (T5 in float16) is merely a bad one.
                for row, value in zip(confidences, sure.nan_to_num(0.0).tolist(), strict=True):
                    row.append(value)
            if self.stopper.eos is not None:
                is_eos = torch.isin(token[:, 0], self.stopper.eos.to(token.device)).tolist()
                for a, last in enumerate(is_eos):
                    if last and ended[a] is None:
                        ended[a] = position + 1
                if all(item is not None for item in ended):
                    break
        height = len(drafts)
        heights = [height if item is None else item for item in ended]
        tokens = torch.cat(drafts, 1) if drafts else rows.new_zeros((count, 0))
        return (
            tokens,
            (torch.stack(distributions, 1) if drafts and self.sample else None),
            (confidences),
            heights,
        )

    def _observe(
        self,
        heights: list[int],
        kept: Tensor,
        first: bool,
        catching_up: bool,
        begin: float,
        drafted: float,
        scored: float,
        confidences: list[list[float]],
    ) -> None:
        """Tell the policy and the statistics what the step brought and cost."""
        accepted = [min(n, h) for n, h in zip(kept.tolist(), heights, strict=True)]
        # The cost of a pass depends on its shape: all rows have the height of the tallest.
        self.policy.observe(
            heights,
            accepted,
            target_ms=None if first else scored - drafted,
            draft_ms=None if catching_up else drafted - begin,
            confidences=confidences if self.policy.uses_confidence else None,
            height=max(heights, default=0),
        )
        stats = self.stats
        stats.steps += 1
        stats.staircases += len(heights)
        stats.draft_ms += drafted - begin
        stats.target_ms += scored - drafted
        for height, count in zip(heights, accepted, strict=True):
            stats.drafted += height
            stats.accepted += count
            stats.refused += count < height
            stats.heights[height] += 1
            stats.drafted_at.update(range(min(height, count + 1)))
            stats.accepted_at.update(range(count))

    def _collect(
        self, columns: list[Tensor] | None, values: Tensor, old: Tensor, new: Tensor
    ) -> None:
        """Sort ``values`` ``[A, h + 1, V]`` into one ``[B, V]`` per written column.

        A row that has ended before a column has, there, the pad token with certainty.
        """
        if columns is None:
            return
        while len(columns) < int(new.max()) - self.text.prompt_length:
            columns.append(values.new_zeros((self.text.batch, values.shape[2])))
            self._certain_pad(columns[-1])
        spans = zip(self.rows.tolist(), old.tolist(), new.tolist(), strict=True)
        for a, (row, start, stop) in enumerate(spans):
            for i in range(stop - start):
                columns[start + i - self.text.prompt_length][row] = values[a, i]

    def _certain_pad(self, scores: Tensor) -> None:
        scores.fill_(-torch.inf)
        scores[..., self.pad] = 0.0

    def _blank(self, columns: list[Tensor] | None, end: Tensor, new: Tensor) -> None:
        """Undo what `_collect` wrote for tokens after a row's end."""
        if columns is None or not self.stopper.has_eos:
            return
        for row, start, stop in zip(self.rows.tolist(), end.tolist(), new.tolist(), strict=True):
            for column in range(start, stop):
                self._certain_pad(columns[column - self.text.prompt_length][row])

    def _written_scores(self) -> tuple[Tensor, ...] | None:
        return None if self.scores is None else tuple(self.scores)

    def _drop_ended_rows(self) -> None:
        """Take rows out of the batch that write no more."""
        text, finish = self.text, self.finish
        if self.stopper.has_eos:
            # As in `generate`: a row that has ended goes on with the pad token.
            ended = finish[self.rows] != NEVER
            for row in self.rows[ended].tolist():
                text.length[row] = finish[row]
                text.tokens[row, int(finish[row]) :] = self.pad
            going = ~ended
        else:
            # As in `generate`: without an end-of-text token rows go on until all have ended.
            last = int(finish.max())
            going = text.length[self.rows] < min(last, self.max_length)
        if bool(going.all()):
            return
        keep = torch.nonzero(going)[:, 0]
        self.rows = self.rows[keep]
        if self.rows.numel():
            if self.target.seen is not None:
                self.target.keep_rows(keep)
            # A draft that was not asked yet still has its arguments for every row.
            self.draft.keep_rows(keep)

    def _width(self) -> int:
        """Columns that are settled for every row."""
        if not self.rows.numel():
            return int(self.finish.max())
        if self.stopper.has_eos:
            return int(self.text.length[self.rows].min())
        return int(self.text.length.min())

    def _stream(self) -> None:
        if self.streamer is None:
            return
        for column in range(self.streamed, self._width()):
            self.streamer.put(self.text.tokens[:, column].cpu())
        self.streamed = max(self.streamed, self._width())

    def output(self) -> Any:
        """The sequences, or what ``return_dict_in_generate`` asks for."""
        text, width = self.text, int(self.finish.max())
        sequences = text.tokens[:, :width].clone()
        if not self.config.return_dict_in_generate:
            return sequences
        new = width - text.prompt_length
        scores = None if self.scores is None else tuple(self.scores[:new])
        logits = None if self.logits is None else tuple(self.logits[:new])
        cache = self.target.cache_up_to(width - 1) if text.batch == 1 else None
        if self.model.config.is_encoder_decoder:
            return GenerateEncoderDecoderOutput(
                sequences=sequences, scores=scores, logits=logits, past_key_values=cache
            )
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=scores, logits=logits, past_key_values=cache
        )


def _match_vocabulary(logits: Tensor, size: int) -> Tensor:
    """The assistant's logits ``[..., V']`` over the target's vocabulary of ``size``."""
    own = logits.shape[-1]
    if own >= size:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, size - own), value=-torch.inf)


def _fresh_cache(model: PreTrainedModel) -> Cache:
    """An empty cache as `generate` would prepare it for ``model``."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=config))
    return cache


def _assistant_kwargs(
    assistant: PreTrainedModel,
    inputs_tensor: Tensor | None,
    model_kwargs: dict[str, Any],
    batch: int,
) -> dict[str, Any]:
    """Run the assistant's own encoder, once."""
    if inputs_tensor is None or (
        not inputs_tensor.is_floating_point() and bool((inputs_tensor < 0).any())
    ):
        raise ValueError(
            "stairs needs the encoder's input itself, which the assistant's encoder reads too: "
            "pass input_ids, not encoder_outputs"
        )
    inputs_tensor = inputs_tensor.repeat_interleave(batch // inputs_tensor.shape[0], 0)
    mask = model_kwargs.get("attention_mask")
    kwargs = {} if mask is None else {"attention_mask": mask.to(assistant.device)}
    prepared: dict[str, Any] = assistant._maybe_prepare_encoder_kwargs_for_generation(
        inputs_tensor.to(assistant.device),
        kwargs,
        assistant.main_input_name,
        assistant.generation_config,
    )
    return prepared
