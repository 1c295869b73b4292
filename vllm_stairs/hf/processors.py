"""Logits processors and stopping criteria, applied to stairs as `generate` applies them.

`generate` calls them once per token with the whole batch at one length. On a staircase the
tokens of a row are judged several at a time, and rows have different lengths. Two ways
restore the view that they expect:

- Transformers' own processors are functions of (row number, the row's ids, the row's
  scores), for any ids (the two that are not are refused). They may look at a whole
  staircase at once, refused drafts included: one call per *length*, with the whole batch's
  ids cut to that length, of which the rows that have a stair of that length use the result.
  Transformers' own criteria look at one row;
- all others may know some texts only (a `prefix_allowed_tokens_fn` over a trie fails on a text
  that it does not allow), look at the whole batch, or count their calls. If there are any, all
  rows advance in step, stair by stair, and they are called as `generate` calls them: once
  per length, on text that the target itself wrote.
"""

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from vllm_stairs.hf.text import Text

STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""Transformers' processors that keep a state; they are called for drafts too, so: refused."""

NEVER = torch.iinfo(torch.long).max
"""The length at which a row that has not finished will have finished."""


def takes_any_text(processor: LogitsProcessor) -> bool:
    """Whether a processor may be shown drafts: whether it is Transformers' own and total."""
    return type(processor).__module__ == LogitsProcessor.__module__ and not isinstance(
        processor, PrefixConstrainedLogitsProcessor
    )


def process(
    processors: LogitsProcessorList,
    text: Text,
    rows: Tensor,
    lengths: Tensor,
    logits: Tensor,
    max_length: int = NEVER,
) -> Tensor:
    """Scores of every stair.

    Args:
        processors: of `generate`.
        text: the batch's text, drafts written after each row's end.
        rows: int64 ``[A]``.
        lengths: int64 ``[A]``, the length of each row's first stair.
        logits: float32 ``[A, n, V]``; stair *i* of row *a* has ``lengths[a] + i`` tokens.
        max_length: no text of this length goes on: such stairs keep their logits.

    Returns:
        float32 ``[A, n, V]``.
    """
    if not processors:
        return logits
    scores = logits.clone()
    stairs = torch.arange(logits.shape[1], device=logits.device)
    of_length = lengths[:, None] + stairs  # [A, n]
    for length in of_length[of_length < max_length].unique().tolist():
        which, stair = torch.nonzero(of_length == length, as_tuple=True)
        whole = logits.new_zeros((text.batch, logits.shape[2]))
        whole[rows[which]] = logits[which, stair]
        scores[which, stair] = processors(text.tokens[:, :length].clone(), whole)[rows[which]]
    return scores


class Stopper:
    """Finds the length at which each row ends.

    Args:
        criteria: of `generate`.
        batch: rows.
    """

    def __init__(self, criteria: StoppingCriteriaList, batch: int) -> None:
        self.max_length = NEVER
        self.eos: Tensor | None = None
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._times: list[MaxTimeCriteria] = []
        self._strings = StoppingCriteriaList()
        self._others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria and self.eos is None:
                self.eos = criterion.eos_token_id
            elif type(criterion) is MaxTimeCriteria:
                self._times.append(criterion)
            elif type(criterion) is StopStringCriteria:
                self._strings.append(criterion)
            else:
                self._others.append(criterion)
        self.needs_step = bool(self._others) and batch > 1
        """Whether all rows must advance in step."""

    def ends(
        self, text: Text, rows: Tensor, old: Tensor, new: Tensor, scores: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Where each of ``rows`` ends, having grown from ``old`` to ``new`` tokens.

        Args:
            text: the batch's text.
            rows: int64 ``[A]``.
            old: int64 ``[A]``, lengths before the step.
            new: int64 ``[A]``, lengths after it.
            scores: per written column, if they are collected and rows advance in step.

        Returns:
            int64 ``[A]``: a length in ``old + 1 .. new``, or `NEVER`.
        """
        grown = int((new - old).max())
        columns = old[:, None] + torch.arange(grown, device=old.device)
        columns = columns.clamp(max=text.tokens.shape[1] - 1)
        fresh = columns < new[:, None]
        done = columns + 1 >= self.max_length
        if self.eos is not None:
            eos = self.eos.to(text.tokens.device)
            done |= torch.isin(text.tokens[rows[:, None], columns], eos)
        end = torch.where(done & fresh, columns + 1, NEVER).amin(1)
        for criteria, whole in ((self._strings, False), (self._others, True)):
            if criteria:
                self._ask(criteria, whole, text, rows, old, new, end, scores)
        if any(bool(c(text.tokens[:1], None).any()) for c in self._times):
            end = torch.minimum(end, new)
        return end

    def _ask(
        self,
        criteria: StoppingCriteriaList,
        whole: bool,
        text: Text,
        rows: Tensor,
        old: Tensor,
        new: Tensor,
        end: Tensor,
        scores: tuple[Tensor, ...] | None,
    ) -> None:
        """Ask ``criteria`` about each new length; lower ``end`` in place."""
        for length in range(int(old.min()) + 1, int(new.max()) + 1):
            concerned = (old < length) & (length <= new) & (length <= end)
            if not bool(concerned.any()):
                continue
            if whole:
                seen = None if scores is None else scores[: length - text.prompt_length]
                ids = text.tokens[:, :length].clone()
                if self.has_eos:  # rows that have ended are padded, as in `generate`
                    over = torch.arange(length, device=ids.device) >= end[:, None]
                    ids[rows] = ids[rows].masked_fill(over, text.pad_token)
                done = criteria(ids, seen)[rows]
            else:
                done = torch.zeros_like(concerned)
                chosen = text.tokens[rows[concerned], :length]
                done[concerned] = criteria(chosen, None)
            end.masked_fill_(concerned & done, length)
