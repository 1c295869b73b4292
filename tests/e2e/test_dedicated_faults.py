"""A dedicated draft that dies, hangs, or is left behind: no request ever notices."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from vllm import LLM

from tests.e2e.servers import launch, wait_until_healthy
from tests.engine.engines import greedy, plain, statistics, token_ids
from tests.engine.test_dedicated import Since, auto, runner_of, until
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels
from vllm_stairs.engine import runner as runner_module
from vllm_stairs.placement import patience


@pytest.fixture
def engine(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The target as its own draft, K = 4, always drafting.

    Its patience is long enough for a draft on a busy machine, short enough to do without a dead
    one.
    """
    monkeypatch.setattr(runner_module, "fixed_patience_ms", lambda *_: 1000.0)
    llm = auto(tiny)
    monkeypatch.setattr(runner_of(llm), "stairs_decider", None)
    return llm


def pid_of(llm: LLM) -> int | None:
    facts = runner_of(llm).stairs_dedicated.facts
    return facts and facts["pid"]


def write_and(llm: LLM, texts: list[str], step: int, harm: Callable[[], None]) -> list[list[int]]:
    """Write 60 tokens for each text, and do harm after some steps."""
    core = llm.llm_engine
    for number, text in enumerate(texts):
        core.add_request(f"request-{number}", text, greedy(60))
    written: dict[int, list[int]] = {}
    for count in range(1000):
        if count == step:
            harm()
        for output in core.step():
            if output.finished:
                written[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    return [written[number] for number in range(len(texts))]


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.full)])
def test_the_draft_is_killed(engine: LLM, tiny: TinyModels, times: int) -> None:
    """In mid-stream, under load, again and again; each time it comes back."""
    texts = prompts(8, seed=100)
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(60))]
    for attempt in range(times):
        until(lambda: pid_of(engine))
        pid = pid_of(engine)
        assert pid is not None
        # Speculation is back, also for the back-off.
        since = Since(engine)
        for _ in range(3):
            assert write_and(engine, texts, -1, lambda: None) == expected
        assert since["accepted_per_position"][0] > 0
        assert since["accepted_per_position"] == since["drafted_per_position"]
        start = time.monotonic()
        harm = lambda pid=pid: os.kill(pid, signal.SIGKILL)  # noqa: E731
        assert write_and(engine, texts, 3 + attempt % 4, harm) == expected
        assert time.monotonic() - start < 60
        until(lambda pid=pid: pid_of(engine) not in (None, pid))
    assert write_and(engine, texts, -1, lambda: None) == expected
    assert statistics(engine)["dedicated"]["restarts"] >= times


def test_the_draft_hangs(engine: LLM, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once, then done without, then replaced."""
    monkeypatch.setattr(patience, "HUNG_SECONDS", 2.0)
    texts = prompts(8, seed=101)
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(60))]
    until(lambda: pid_of(engine))
    pid = pid_of(engine)
    assert pid is not None
    start = time.monotonic()
    assert write_and(engine, texts, 3, lambda: os.kill(pid, signal.SIGSTOP)) == expected
    assert time.monotonic() - start < 30
    since = Since(engine)
    assert statistics(engine)["off"]["draft_away"] > 0

    def replaced() -> bool:
        assert write_and(engine, texts, -1, lambda: None) == expected
        return pid_of(engine) not in (None, pid)

    until(replaced)
    assert write_and(engine, texts, -1, lambda: None) == expected
    assert since["accepted_per_position"][0] > 0
    until(lambda: not psutil.pid_exists(pid), 30)


# ------------------------------------------------------------------------------- server

Server = tuple["subprocess.Popen[bytes]", str]


@pytest.fixture
def start(tiny: TinyModels, tmp_path: Path) -> Iterator[Callable[[int], Iterator[Server]]]:
    """Starts servers with dedicated drafts at the same time: processes and URLs."""
    processes = []

    def start(count: int) -> Iterator[Server]:
        logs = [tmp_path / f"{number}.log" for number in range(count)]
        for log in logs:
            process, url = launch(
                log, tiny.target,
                "--speculative-method", "stairs", "--speculative-model", tiny.noisy,
                "--stairs-placement", "dedicated", "--stairs-height", "fixed",
                "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
                "--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "32",
                "--kv-cache-memory-bytes", str(64 * 2**20),
            )  # fmt: skip
            processes.append((process, url))
        for (process, url), log in zip(processes, logs, strict=True):
            wait_until_healthy(process, url, log)
            yield process, url

    yield start
    for process, _ in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def ask(url: str, text: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    answer = client.completions.create(
        model="tiny", prompt=text, extra_body={"ignore_eos": True}, **options
    )
    return answer.choices[0].text


@pytest.mark.server
@pytest.mark.parametrize(
    "ends",
    [
        [("vllm", signal.SIGTERM)],
        pytest.param(
            [("vllm", signal.SIGTERM), ("VLLM::Worker", signal.SIGKILL)], marks=pytest.mark.full
        ),
        pytest.param([("vllm", signal.SIGKILL)], marks=pytest.mark.full),
    ],
    ids=["ended", "one_of_two", "killed"],
)
def test_a_server_leaves_nothing(
    tiny: TinyModels,
    start: Callable[[int], Iterator[Server]],
    ends: list[tuple[str, signal.Signals]],
) -> None:
    """Ended as usual or killed: the draft, and the Ray instance started for it, end too.

    Those of a server beside it live on.
    """
    (text,) = prompts(1, seed=102)
    expected = plain(tiny.target).generate([text], greedy(40), use_tqdm=False)[0].outputs[0].text
    for (process, url), (victim, how) in zip(start(len(ends)), ends, strict=True):
        assert ask(url, text) == expected
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
        assert 'what="answers"' in metrics
        end(process, victim, how)


def end(process: "subprocess.Popen[bytes]", victim: str, how: signal.Signals) -> None:
    """End a server, or one of its processes by its name; assert that nothing is left."""
    family = {
        child: " ".join(child.cmdline())
        for child in psutil.Process(process.pid).children(recursive=True)
    }
    assert any("DraftActor" in name for name in family.values())
    assert any("raylet" in name for name in family.values())
    victims = [child.pid for child, name in family.items() if name.startswith(victim)]
    assert victims or victim == "vllm"
    os.kill(victims[0] if victims else process.pid, how)
    try:
        if victim != "vllm" or how != signal.SIGKILL:
            process.wait(120)
            ours = list(family)
        else:
            # What vLLM itself leaves behind where nobody is left to end it.
            ours = [child for child, name in family.items() if "ray" in name or "keeper" in name]
        _, left = psutil.wait_procs(ours, timeout=60)
        assert not left, [family[child] for child in left]
    finally:
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
