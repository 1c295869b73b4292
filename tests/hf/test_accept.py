"""The acceptors: against the reference, and against the target's distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.hf.tiny_pairs import pair
from vllm_stairs.acceptor.dense import accept_greedy, accept_sampled
from vllm_stairs.hf import stairs
from vllm_stairs.staircase import validate


@given(st.data())
def test_greedy_says_what_the_reference_says(data: st.DataObject) -> None:
    batch, height = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 8))
    ids = st.integers(0, 2)
    drafts = [[data.draw(ids) for _ in range(height)] for _ in range(batch)]
    predictions = [[data.draw(ids) for _ in range(height + 1)] for _ in range(batch)]
    tokens, kept = accept_greedy(
        torch.tensor(drafts, dtype=torch.long).view(batch, height), torch.tensor(predictions)
    )
    for row in range(batch):
        assert tokens[row, : kept[row] + 1].tolist() == validate(drafts[row], predictions[row])


def counts_of(accept, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Observed and expected counts of the first two tokens (jointly), vocabulary of 4."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = 4
    q1 = torch.tensor([0.55, 0.25, 0.15, 0.05])
    p1 = torch.tensor([0.15, 0.30, 0.15, 0.40])
    q2 = torch.rand(vocabulary, vocabulary, generator=generator).softmax(-1)
    p2 = (3 * torch.rand(vocabulary, vocabulary, generator=generator)).softmax(-1)
    p3 = torch.full((vocabulary,), 0.25)
    torch.manual_seed(0)
    first = torch.multinomial(q1, draws, replacement=True)
    second = torch.multinomial(q2[first], 1)[:, 0]
    drafts = torch.stack([first, second], 1)
    q = torch.stack([q1.expand(draws, -1), q2[first]], 1)
    p = torch.stack([p1.expand(draws, -1), p2[first], p3.expand(draws, -1)], 1)
    tokens, kept = accept(drafts, q, p)
    # What one staircase does not decide, the target decides in the next step.
    later = torch.multinomial(p2[tokens[:, 0]], 1)[:, 0]
    pairs = tokens[:, 0] * vocabulary + torch.where(kept > 0, tokens[:, 1], later)
    observed = torch.bincount(pairs, minlength=vocabulary**2)
    return observed, (p1[:, None] * p2).flatten() * draws


def p_value(accept, draws: int = 40_000) -> float:
    observed, expected = counts_of(accept, draws)
    expected = expected.double()
    return float(
        stats.chisquare(observed.double(), expected / expected.sum() * observed.sum()).pvalue
    )


def test_sampling_has_the_targets_distribution() -> None:
    assert p_value(accept_sampled) > 1e-3


def test_the_test_fails_wrong_acceptors() -> None:
    def keeps_likely_drafts(drafts, q, p):
        """Accepts if p >= q instead of with probability p / q."""
        tokens, _ = accept_sampled(drafts, q, p)
        sure = (p[:, :2].gather(2, drafts[..., None]) >= q.gather(2, drafts[..., None]))[..., 0]
        kept = sure.long().cumprod(1).sum(1)
        rows = torch.arange(len(drafts))
        residual = (p[rows, kept] - q[rows, kept.clamp(max=1)] * (kept < 2)[:, None]).clamp(min=0)
        tokens[:, :2] = drafts
        tokens[rows, kept] = torch.multinomial(residual, 1)[:, 0]
        return tokens, kept

    def resamples_the_target(drafts, q, p):
        """Replaces a refused draft by a sample of p, not of the residual."""
        tokens, kept = accept_sampled(drafts, q, p)
        rows = torch.arange(len(drafts))
        tokens[rows, kept] = torch.multinomial(p[rows, kept], 1)[:, 0]
        return tokens, kept

    def keeps_all(drafts, q, p):
        tokens, kept = accept_sampled(drafts, q, p)
        return torch.cat([drafts, tokens[:, -1:]], 1), torch.full_like(kept, 2)

    for wrong in (keeps_likely_drafts, resamples_the_target, keeps_all):
        assert p_value(wrong) < 1e-6, wrong.__name__


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_generate_samples_from_the_target(kind: str, adaptive: bool) -> None:
    """End to end: the third new token's distribution, many rows at once, top-k 4."""
    model, assistant = pair(kind, noise=0.05)
    rows = 3000
    ids = torch.tensor([[5, 9, 11, 7]])
    options = {
        "do_sample": True,
        "top_k": 4,
        "temperature": 1.3,
        "max_new_tokens": 3,
        "eos_token_id": None,
    }
    climber = stairs(assistant, num_speculative_tokens=2, adaptive=adaptive)
    torch.manual_seed(1)
    ours = model.generate(ids, num_return_sequences=rows, custom_generate=climber, **options)
    torch.manual_seed(2)
    plain = model.generate(ids, num_return_sequences=rows, **options)
    for column in (-3, -2, -1):
        seen = torch.stack(
            [torch.bincount(text[:, column], minlength=64) for text in (ours, plain)]
        )
        seen = seen[:, seen.sum(0) >= 10]
        assert stats.chi2_contingency(seen.numpy()).pvalue > 1e-3
    assert climber.stats.accepted > 0 or adaptive
