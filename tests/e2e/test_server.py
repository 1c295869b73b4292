"""The real server with the real client, on real weights."""

import concurrent.futures
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from vllm import LLM, SamplingParams

from tests.e2e.servers import launch, wait_until_healthy
from tests.engine.engines import spare_the_others

pytestmark = pytest.mark.server

MODEL = "smollm2"
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at", "Once upon a time"]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def starting(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple["subprocess.Popen[bytes]", str, Path]]:
    """A server with stairs as a user gets it: the shipped draft, nothing else said."""
    log_path = tmp_path_factory.mktemp("server") / "log"
    process, url = launch(
        log_path, smollm2,
        "--speculative-method", "stairs",
        "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(512 * 2**20),
    )  # fmt: skip
    try:
        yield process, url, log_path
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def plain(smollm2: Path, starting: object) -> LLM:
    """Built while the server starts."""
    llm = LLM(
        model=str(smollm2),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 * 2**20,
        disable_log_stats=True,
    )
    spare_the_others(llm)
    return llm


@pytest.fixture(scope="module")
def server(starting: tuple["subprocess.Popen[bytes]", str, Path], plain: LLM) -> Iterator[str]:
    """Its base URL."""
    process, url, log_path = starting
    wait_until_healthy(process, url, log_path)
    yield url
    line = r"estimated speed against plain decoding: \d+\.\d\d; not drafted: "
    deadline = time.monotonic() + 30  # Once a second, see `launch`.
    while not re.search(line, text := log_path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert re.search(r"draft \S+ costs [\d.]+ MiB of weights .* and [\d.]+ of [\d.]+ KiB", text)
    assert re.search(r"mean acceptance length: [1-5]\.\d\d, mean height: [0-4]\.\d\d", text)
    assert re.search(line, text)
    assert "without Intel OpenMP" not in text


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)


def metrics(server: str) -> dict[str, float]:
    """Metric with labels -> value; engine and model labels are left out."""
    text = urllib.request.urlopen(f"{server}/metrics", timeout=30).read().decode()
    values = {}
    for name, labels, value in re.findall(r"^(vllm:\w+)\{(.*)\} (\S+)$", text, re.M):
        kept = re.sub(r'(engine|model_name)="[^"]*",?', "", labels).strip(",")
        values[f"{name}{{{kept}}}" if kept else name] = float(value)
    return values


def completion(client: openai.OpenAI, prompt: str, **kwargs: object) -> str:
    options = {**GREEDY, **kwargs}
    return client.completions.create(model=MODEL, prompt=prompt, **options).choices[0].text


def expected(plain: LLM, prompts: list[str], **kwargs: object) -> list[str]:
    outputs = plain.generate(prompts, SamplingParams(**{**GREEDY, **kwargs}), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_chat(client: openai.OpenAI, plain: LLM) -> None:
    answer = plain.chat(CHAT, SamplingParams(**GREEDY), use_tqdm=False)[0].outputs[0].text
    once = client.chat.completions.create(model=MODEL, messages=CHAT, **GREEDY)
    assert once.choices[0].message.content == answer
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, **GREEDY)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == answer
    assert len(pieces) > 1


def test_completions_logprobs_and_samples(client: openai.OpenAI, plain: LLM) -> None:
    texts = expected(plain, PROMPTS)
    assert [completion(client, prompt) for prompt in PROMPTS] == texts
    with_logprobs = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], logprobs=3, **GREEDY
    ).choices[0]
    theirs = plain.generate(PROMPTS[0], SamplingParams(**GREEDY, logprobs=3), use_tqdm=False)[
        0
    ].outputs[0]
    ours = with_logprobs.logprobs.token_logprobs
    assert len(ours) == len(theirs.token_ids)
    for value, token, row in zip(ours, theirs.token_ids, theirs.logprobs, strict=True):
        assert abs(value - row[token].logprob) < 1e-4
    samples = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], n=2, temperature=0.8, max_tokens=12, seed=3
    )
    assert len(samples.choices) == 2
    assert samples.usage.completion_tokens <= 24


def test_concurrency_opt_out_and_stop(client: openai.OpenAI, plain: LLM) -> None:
    texts = expected(plain, PROMPTS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        plainly = [
            pool.submit(completion, client, p, extra_body={"vllm_xargs": {"stairs_max_height": h}})
            for p, h in zip(PROMPTS, (0, 1, 2, 4), strict=True)
        ]
        normally = [pool.submit(completion, client, p) for p in PROMPTS]
        assert [f.result() for f in plainly] == texts
        assert [f.result() for f in normally] == texts
    assert (
        completion(client, PROMPTS[1], stop=["if"]) == expected(plain, [PROMPTS[1]], stop=["if"])[0]
    )
    assert (
        completion(client, PROMPTS[0], max_tokens=1)
        == expected(plain, [PROMPTS[0]], max_tokens=1)[0]
    )


def test_requests_that_speculation_usually_refuses(client: openai.OpenAI, plain: LLM) -> None:
    bias = {"260": 5.0, "281": -100.0}
    ours = completion(client, PROMPTS[0], logit_bias=bias)
    theirs = expected(plain, [PROMPTS[0]], logit_bias={int(k): v for k, v in bias.items()})[0]
    assert ours == theirs
    assert completion(client, PROMPTS[0], temperature=0.7, extra_body={"min_p": 0.1})


def test_bad_requests_leave_the_server_up(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stairs_max_height"):
        completion(client, "a", extra_body={"vllm_xargs": {"stairs_max_height": -1}})
    with pytest.raises(openai.BadRequestError):
        completion(client, "word " * 600)
    with pytest.raises(openai.BadRequestError):
        completion(client, "")
    assert completion(client, PROMPTS[0])


def test_to_the_edge_of_max_model_len(client: openai.OpenAI, plain: LLM) -> None:
    prompt = "The cat and the dog. " * 80
    room = 512 - len(plain.get_tokenizer()(prompt)["input_ids"])
    assert 20 < room < 200
    ours = completion(client, prompt, max_tokens=room, extra_body={"ignore_eos": True})
    assert ours == expected(plain, [prompt], max_tokens=room, ignore_eos=True)[0]
    # vLLM's server shortens what does not fit.
    assert completion(client, prompt, max_tokens=room + 50, extra_body={"ignore_eos": True}) == ours


def test_client_gone_and_metrics(client: openai.OpenAI, server: str) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS[3], stream=True, temperature=0, max_tokens=400,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    completion(client, PROMPTS[0])
    deadline = time.monotonic() + 60
    while (now := metrics(server))["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert now["vllm:num_requests_running"] == 0
    assert now["vllm:kv_cache_usage_perc"] == 0
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        key = f"vllm:spec_decode_num_{name}_total"
        assert now[key] > 0
    heights = 'vllm:spec_decode_stairs_height_bucket{le="%s"}'
    assert now[heights % "4.0"] == now[heights % "+Inf"] > 0
    assert now[heights % "0.0"] > 0, "opted-out requests are staircases of height 0"
    assert now["vllm:spec_decode_stairs_acceptance_length_sum"] > 0
    for phase in ("draft", "target", "validation"):
        assert now['vllm:spec_decode_stairs_time_seconds_total{phase="%s"}' % phase] > 0  # noqa: UP031
    drafted = now["vllm:spec_decode_num_draft_tokens_total"]
    assert 0.2 * drafted < now["vllm:spec_decode_num_accepted_tokens_total"] < drafted
    assert now["vllm:spec_decode_stairs_estimated_gain"] > 0
    for reason in ("opt_out", "limit"):
        assert now['vllm:spec_decode_stairs_off_total{reason="%s"}' % reason] > 0  # noqa: UP031
