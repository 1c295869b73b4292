"""Sampled output keeps the target's distribution.

The exact distribution of the first three tokens is computed from the target's own logprobs; the
chi-square statistic of many samples under stairs must not reject it, and must reject an acceptor
that is slightly wrong.
"""

import math
import re
from collections import Counter
from typing import Any

import pytest
from scipy import stats
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.engines import greedy, plain, stairs, statistics, token_ids
from tests.tiny import WORDS, TinyModels

PROMPT = "the cat sat on"
LENGTH = 3
SAMPLES = 4000
TEMPERATURE = 0.8
# What a request may ask for beyond a temperature.
ALLOWED = list(range(3, 60))
BIAS = {5: 2.0, 9: -3.0, 14: 3.0, 21: 1.0}
MIN_P = 0.25
TOP_K = 3
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "allowed_token_ids": {"allowed_token_ids": ALLOWED},
    "logit_bias": {"logit_bias": BIAS},
    "min_p": {"min_p": MIN_P},
    "top_k": {"top_k": TOP_K},
    "grammar": {"structured_outputs": StructuredOutputsParams(regex=f"[a-j0-9]{{{LENGTH}}}")},
}


def constrain(logits: dict[int, float], constraint: str) -> dict[int, float]:
    """The distribution that plain sampling would draw from."""
    if constraint == "logit_bias":
        logits = {i: x + BIAS.get(i, 0.0) for i, x in logits.items()}
    elif constraint == "grammar":
        legal = [i for i, word in enumerate(WORDS) if re.fullmatch("[a-j0-9]", word)]
        logits = {i: logits[i] for i in legal}
    elif constraint == "allowed_token_ids":
        logits = {i: logits[i] for i in ALLOWED}
    weights = {i: math.exp(x / TEMPERATURE) for i, x in logits.items()}
    if constraint == "min_p":
        least = MIN_P * max(weights.values())
        weights = {i: w for i, w in weights.items() if w >= least}
    elif constraint == "top_k":
        least = sorted(weights.values())[-TOP_K]
        weights = {i: w for i, w in weights.items() if w >= least}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def exact_distribution(llm: LLM, constraint: str = "temperature") -> dict[tuple[int, ...], float]:
    """Probability of texts of three tokens, as far as they are likely enough to be counted."""
    prompt = llm.get_tokenizer()(PROMPT)["input_ids"]
    likely: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        prefixes = list(likely)
        outputs = llm.generate(
            [{"prompt_token_ids": [*prompt, *prefix]} for prefix in prefixes],
            greedy(1, logprobs=96),
            use_tqdm=False,
        )
        longer = {}
        for prefix, output in zip(prefixes, outputs, strict=True):
            logits = {i: x.logprob for i, x in output.outputs[0].logprobs[0].items()}
            for i, probability in constrain(logits, constraint).items():
                longer[(*prefix, i)] = likely[prefix] * probability
        likely = {text: p for text, p in longer.items() if p * SAMPLES >= 5}
    return likely


def p_value(counts: Counter, expected: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test; all texts that are too rare to be counted are one cell."""
    total = sum(counts.values())
    observed = [counts[text] for text in expected]
    wanted = [probability * total for probability in expected.values()]
    if total - sum(wanted) >= 5:
        observed.append(total - sum(observed))
        wanted.append(total - sum(wanted))
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [w * scale for w in wanted]).pvalue)


def sample(llm: LLM, seed: int, constraint: str = "temperature") -> Counter:
    """Three-token texts; a greedy request runs in the batch beside the sampled ones."""
    params = SamplingParams(
        temperature=TEMPERATURE,
        max_tokens=LENGTH,
        ignore_eos=True,
        n=SAMPLES,
        seed=seed,
        **CONSTRAINTS[constraint],
    )
    outputs = token_ids(llm, [PROMPT, "red sun"], [params, greedy(30)])
    return Counter(tuple(text) for text in outputs[0])


def sampling_engine(tiny: TinyModels, draft: str, draft_sample_method: str) -> LLM:
    """The draft knows nothing of the request's constraints."""
    return stairs(
        tiny.target,
        getattr(tiny, draft),
        height=2,
        draft_sample_method=draft_sample_method,
        max_num_seqs=128,
    )


CASES = [
    ("noisy", "greedy", "temperature"),
    ("noisy", "probabilistic", "temperature"),
    ("target", "greedy", "allowed_token_ids"),
    ("target", "probabilistic", "logit_bias"),
    ("target", "greedy", "min_p"),
    ("random", "probabilistic", "top_k"),
    ("noisy", "probabilistic", "grammar"),
]


@pytest.mark.parametrize(("draft", "draft_sample_method", "constraint"), CASES)
def test_goodness_of_fit(
    tiny: TinyModels, draft: str, draft_sample_method: str, constraint: str
) -> None:
    expected = exact_distribution(plain(tiny.target, max_logprobs=96), constraint)
    assert len(expected) > 5, "a distribution worth testing"
    engine = sampling_engine(tiny, draft, draft_sample_method)
    before = statistics(engine)
    counts = sample(engine, seed=7, constraint=constraint)
    after = statistics(engine)
    if draft != "random":
        assert after["accepted_per_position"][0] > before["accepted_per_position"][0] + 100
    assert p_value(counts, expected) > 1e-4


def test_plain_sampling_passes(tiny: TinyModels) -> None:
    """The test is fair: vLLM without speculation passes it."""
    engine = plain(tiny.target, max_logprobs=96)
    expected = exact_distribution(engine, "min_p")
    assert p_value(sample(engine, seed=9, constraint="min_p"), expected) > 1e-4


def test_the_test_fails_a_wrong_acceptor(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """An acceptor that keeps drafts a little too gladly (20 % of what it should drop)."""
    from vllm_stairs.engine import acceptor

    right = acceptor.validate_sampled_batch

    def too_glad(**kwargs: Any) -> Any:
        uniform = kwargs["uniform"]
        forgiven = (uniform * 1e6) % 1 < 0.2
        return right(**{**kwargs, "uniform": uniform.masked_fill(forgiven, 0.0)})

    monkeypatch.setattr(acceptor, "validate_sampled_batch", too_glad)
    expected = exact_distribution(plain(tiny.target, max_logprobs=96))
    engine = sampling_engine(tiny, "target", "greedy")
    assert p_value(sample(engine, seed=8), expected) < 1e-4
