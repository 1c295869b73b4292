"""Stairs-assisted generation: the loop, and the two ways to call it."""

import copy
import inspect
import time
from typing import Any, Literal, NamedTuple

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
from vllm_stairs.hf.checks import (
    check_dropped_arguments,
    check_options,
    check_pair,
    check_settings,
)
from vllm_stairs.hf.processors import NEVER, Stopper, process, takes_any_text
from vllm_stairs.hf.reader import Reader, accepts, known_ids, reads_ragged_rows, unknown_id
from vllm_stairs.hf.stats import StairsStats
from vllm_stairs.hf.text import Text


class Stairs:
    """What ``model.generate(..., custom_generate=stairs(assistant))`` takes.

    The text is the one that ``model.generate(...)`` alone would write (greedy), or has its
    distribution (``do_sample=True``). Keep the object to keep what the height policy has
    learned, and to read ``.stats``. `stairs` is another name for this class.

    Args:
        assistant: a small model that shares the target's tokenizer. (One that was given to
            `torch.compile` runs uncompiled.)
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

    Raises:
        TypeError, ValueError: an argument of another kind, or out of bounds.
    """

    def __init__(
        self,
        assistant: PreTrainedModel,
        *,
        num_speculative_tokens: int = 8,
        adaptive: bool = True,
        layout: Literal["packed", "expanded"] = "packed",
        streamer: Any = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        policy: HeightPolicy | FixedHeight | None = None,
    ) -> None:
        # Of a compiled module `generate` and the cache want the model itself.
        assistant = getattr(assistant, "_orig_mod", assistant)
        check_settings(assistant, num_speculative_tokens, layout, stop_strings, tokenizer, policy)
        self.assistant = assistant
        self.layout = layout
        self.streamer = streamer
        self.tokenizer = tokenizer
        self.assistant_tokenizer = assistant_tokenizer
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        if policy is None:
            make = HeightPolicy if adaptive else FixedHeight
            policy = make(num_speculative_tokens)
        self.policy = policy
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


stairs = Stairs
"""The name for everyday use: ``custom_generate=stairs(assistant)``."""

_STAIRS_ARGUMENTS = frozenset(inspect.signature(Stairs).parameters) - {"assistant"}


def stairs_generate(
    model: PreTrainedModel,
    assistant: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate` with stairs, as a plain function.

    Unlike `generate` with ``custom_generate``, it honours ``stop_strings`` of a
    `GenerationConfig`, of the model's own too (``tokenizer`` is needed then).

    Args:
        model: the target.
        assistant: see :class:`Stairs`.
        inputs: as `generate` takes it.
        generation_config: as `generate` takes it.
        **kwargs: the named arguments of :class:`Stairs`, and everything else that `generate`
            takes.

    Returns:
        What `generate` returns.
    """
    if "custom_generate" in kwargs:
        raise ValueError("stairs_generate is a custom_generate itself: leave custom_generate out")
    own = {name: kwargs.pop(name) for name in _STAIRS_ARGUMENTS & kwargs.keys()}
    if "stop_strings" not in own:
        configs = (generation_config, model.generation_config)
        given = [config.stop_strings for config in configs if config and config.stop_strings]
        own["stop_strings"] = given[0] if given else None
    # `generate` would ask for a tokenizer, and drop it.
    if generation_config is not None and generation_config.stop_strings:
        generation_config = copy.deepcopy(generation_config)
        generation_config.stop_strings = None
    if model.generation_config.stop_strings:
        kwargs["stop_strings"] = None
    climber = Stairs(assistant, **own)
    return model.generate(inputs, generation_config, custom_generate=climber, **kwargs)


class _Verdict(NamedTuple):
    """What stairs validation made of one staircase per row; int64 ``[A]`` each."""

    kept: Tensor
    """Drafts kept."""
    judged: Tensor
    """Drafts that were judged, if fewer than the row's height."""
    stair: Tensor
    """The stair after which a row goes on: its drafts up to there are its text."""
    new: Tensor
    """The row's length now."""
    end: Tensor
    """The length at which it ended, or `NEVER`."""


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
        self.draft_processors = LogitsProcessorList(p for p in processors if takes_any_text(p))
        self.in_step = len(self.draft_processors) < len(processors) or (
            batch > 1
            and (
                self.stopper.needs_step
                or not reads_ragged_rows(model)
                or not reads_ragged_rows(assistant)
            )
        )
        """Whether all rows grow by the same number of tokens, judged stair by stair."""
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
        self.text = Text(input_ids, mask, positions, self.pad)
        use_cache = bool(model_kwargs.get("use_cache", True))
        if use_cache and cache is None:
            raise ValueError(
                f"{type(model).__name__} keeps no DynamicCache, which stairs rolls back: generate "
                "without stairs, or with use_cache=False"
            )
        self.target = Reader(model, target_kwargs, cache if use_cache else None, "target")
        unknown = unknown_id(assistant, stairs.assistant_tokenizer)
        self.draft = Reader(
            assistant,
            _assistant_kwargs(assistant, inputs_tensor, model_kwargs, batch, unknown)
            if seq2seq
            else {},
            _fresh_cache(assistant) if use_cache else None,
            "assistant",
            unknown,
        )
        limits = [
            getattr(member.config.get_text_config(decoder=True), "max_position_embeddings", None)
            for member in (model, assistant)
        ]
        self.last_position = min((limit for limit in limits if limit), default=NEVER)
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        # What stands where a row has no draft: a padding token beyond the vocabulary is fine only
        # while no model reads it.
        self.blank = self.pad if 0 <= self.pad < self.vocabulary else 0

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

        # 1. The draft: d1..dK after each row's text.
        begin = self._now()
        chosen = min(self.policy.choose(rows.shape[0]), self._room(old))
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
        scores = None if self.in_step else self._process(self.processors, old, logits)
        scored = self._now()

        # 3. Stairs validation: keep what agrees, and the target's own next token.
        if scores is None:
            verdict = self._climb_in_step(old, drafts, q, logits)
        else:
            verdict = self._climb(old, drafts, q, logits, scores)
        if self.expanded and height:
            self.target.keep_stairs(verdict.stair, height)
        self._observe(
            heights, height, verdict, first, catching_up, begin, drafted, scored, confidences
        )

        # 4. Look for rows that have ended, let the readers forget the rest.
        new, end = verdict.new, verdict.end
        text.length[rows] = new
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

    def _process(self, processors: LogitsProcessorList, lengths: Tensor, logits: Tensor) -> Tensor:
        return process(processors, self.text, self.rows, lengths, logits, self.max_length)

    def _accept(self, drafts: Tensor, q: Tensor | None, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Stairs validation of ``drafts`` ``[A, h]`` by ``scores`` ``[A, h + 1, V]``."""
        if not self.sample:
            return accept_greedy(drafts, scores.argmax(-1))
        if q is None:
            q = scores.new_zeros((drafts.shape[0], 0, scores.shape[2]))
        return accept_sampled(drafts, q, scores.softmax(-1))

    def _climb(
        self, old: Tensor, drafts: Tensor, q: Tensor | None, logits: Tensor, scores: Tensor
    ) -> _Verdict:
        """Judge whole staircases; every row goes as far as its own draft holds."""
        tokens, kept = self._accept(drafts, q, scores)
        new = (old + kept + 1).clamp(max=self.max_length)
        self.text.write(self.rows, old, tokens)
        self._collect(self.scores, scores, old, new)
        self._collect(self.logits, logits, old, new)
        end = self.stopper.ends(self.text, self.rows, old, new, self._written_scores())
        return _Verdict(kept, torch.full_like(kept, NEVER), kept, new, end)

    def _climb_in_step(
        self, old: Tensor, drafts: Tensor, q: Tensor | None, logits: Tensor
    ) -> _Verdict:
        """Judge stair by stair, until a row's draft is refused or all rows have ended.

        Processors and criteria are called as `generate` calls them: once per length, in its
        order, on what the target wrote, rows that have ended padded.
        """
        rows, text = self.rows, self.text
        kept, judged = torch.zeros_like(old), torch.zeros_like(old)
        end, over = torch.full_like(old, NEVER), torch.zeros_like(old, dtype=torch.bool)
        for stair in range(drafts.shape[1] + 1):
            at = old + stair
            own = logits[:, stair : stair + 1]
            scores = self._process(self.processors, at, own)
            draft = drafts[:, stair : stair + 1]  # none after the last stair
            tokens, agree = self._accept(
                draft,
                None if q is None else q[:, stair : stair + 1],
                scores.expand(-1, draft.shape[1] + 1, -1),
            )
            kept += agree.where(~over, 0)
            judged += (~over).long()
            text.write(rows, at, tokens[:, :1].masked_fill(over[:, None], self.pad))
            self._collect(self.scores, scores, at, at + 1)
            self._collect(self.logits, own, at, at + 1)
            stopped = self.stopper.ends(text, rows, at, at + 1, self._written_scores())
            end = torch.minimum(end, stopped)
            done = torch.minimum(self.finish[rows], end) != NEVER
            # As in `generate`: without an end-of-text token rows go on until all have ended.
            over = done & self.stopper.has_eos
            if bool(done.all()) or not bool((over | (agree > 0)).all()):
                break
        return _Verdict(kept, judged, torch.full_like(old, stair), old + stair + 1, end)

    def _room(self, old: Tensor) -> int:
        """The tallest staircase that some row has use for, and no row is too long for."""
        room = self.max_length - int(old.min()) - 1
        return max(min(room, self.last_position - int(old.max())), 0)

    def _write_drafts(
        self, old: Tensor, chosen: int
    ) -> tuple[Tensor, Tensor | None, list[list[float]], list[int]]:
        """Write drafts into the text, after each row's end.

        A row's draft ends with an end-of-text token, at the length limit, or where the
        assistant gives no distribution (NaN, infinity): that draft is a blank one. After
        its end, the row has blanks, sampled with certainty.

        Returns:
            drafts int64 ``[A, h]``; for sampling their distributions ``[A, h, V]``; the
            draft's confidence in each, per row; each row's own height.
        """
        rows, text, policy = self.rows, self.text, self.policy
        count = rows.shape[0]
        drafts: list[Tensor] = []
        distributions: list[Tensor] = []
        confidences: list[list[float]] = [[] for _ in range(count)]
        stop = self.max_length - 1 - old  # the heights at which the rows' drafts end
        tried = 0
        limit = min(policy.limit(chosen), self._room(old)) if chosen else 0
        while len(drafts) < limit:
            position = len(drafts)
            over = stop <= position
            ended = over.tolist()
            if all(ended):
                break
            if position and policy.uses_confidence:
                open_rows = [
                    [*own, 0.0] if last else own
                    for own, last in zip(confidences, ended, strict=True)
                ]
                if not policy.go_on(position, open_rows):
                    break
            tried = position + 1
            logits = self.draft.read(text, rows, old + position, 1)
            logits = _match_vocabulary(logits, self.vocabulary)
            logits = self._process(self.draft_processors, old + position, logits)[:, 0]
            top, token = logits.max(-1, keepdim=True)
            # An assistant that overflows (T5 in float16) is merely a bad one.
            broken = ~top.isfinite()[:, 0]
            none = over | broken
            if self.sample:
                # A certain blank is kept with its probability under the target, no more.
                q = logits.softmax(-1).masked_fill(none[:, None], 0.0)
                q[:, self.blank] += none
                token = torch.multinomial(q, 1)
                distributions.append(q)
                sure = q.gather(1, token)[:, 0]
            else:
                token = token.masked_fill(none[:, None], self.blank)
                sure = (top[:, 0] - logits.logsumexp(-1)).exp()
            if policy.uses_confidence:
                sure = sure.masked_fill(none, 0.0)
                for own, value in zip(confidences, sure.tolist(), strict=True):
                    own.append(value)
            closed = broken
            if self.stopper.eos is not None:
                closed = closed | torch.isin(token[:, 0], self.stopper.eos.to(token.device))
            stop = torch.where(closed, stop.clamp(max=tried), stop)
            if bool(none.all()):
                break
            text.write(rows, old + position, token)
            drafts.append(token)
        return (
            torch.cat(drafts, 1) if drafts else rows.new_zeros((count, 0)),
            torch.stack(distributions[: len(drafts)], 1) if drafts and self.sample else None,
            confidences,
            stop.clamp(max=tried).tolist(),
        )

    def _observe(
        self,
        heights: list[int],
        height: int,
        verdict: _Verdict,
        first: bool,
        catching_up: bool,
        begin: float,
        drafted: float,
        scored: float,
        confidences: list[list[float]],
    ) -> None:
        """Tell the policy and the statistics what the step brought and cost."""
        judged = [min(h, n) for h, n in zip(heights, verdict.judged.tolist(), strict=True)]
        accepted = [min(h, n) for h, n in zip(judged, verdict.kept.tolist(), strict=True)]
        self.policy.observe(
            judged,
            accepted,
            target_ms=None if first else scored - drafted,
            draft_ms=None if catching_up else drafted - begin,
            confidences=confidences if self.policy.uses_confidence else None,
            # The cost of a pass depends on its shape: all rows have the height of the tallest.
            height=height,
        )
        stats = self.stats
        stats.steps += 1
        stats.staircases += len(heights)
        stats.draft_ms += drafted - begin
        stats.target_ms += scored - drafted
        for own, reached, count in zip(heights, judged, accepted, strict=True):
            stats.drafted += own
            stats.accepted += count
            stats.refused += count < reached
            stats.heights[own] += 1
            stats.drafted_at.update(range(min(reached, count + 1)))
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
        scores[..., self.blank] = 0.0

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
    unknown: int,
) -> dict[str, Any]:
    """Run the assistant's own encoder, once; ``unknown`` stands for ids that it lacks."""
    if inputs_tensor is None or (
        not inputs_tensor.is_floating_point() and bool((inputs_tensor < 0).any())
    ):
        raise ValueError(
            "stairs needs the encoder's input itself, which the assistant's encoder reads too: "
            "pass input_ids, not encoder_outputs"
        )
    inputs_tensor = inputs_tensor.repeat_interleave(batch // inputs_tensor.shape[0], 0)
    if not inputs_tensor.is_floating_point():
        inputs_tensor = known_ids(assistant, inputs_tensor, unknown)
    mask = model_kwargs.get("attention_mask")
    kwargs = {} if mask is None else {"attention_mask": mask.to(assistant.device)}
    prepared: dict[str, Any] = assistant._maybe_prepare_encoder_kwargs_for_generation(
        inputs_tensor.to(assistant.device),
        kwargs,
        assistant.main_input_name,
        assistant.generation_config,
    )
    return prepared
