"""``bench run --online``: real servers, driven by vLLM's own ``vllm bench serve``."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_stairs.bench import prompts
from vllm_stairs.bench.arms import Arm
from vllm_stairs.bench.environment import end_process_group
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.settings import Settings, free_port, server_flags
from vllm_stairs.bench.statistics import median, paired_ratio, spread

if TYPE_CHECKING:
    from vllm_stairs.bench.run import Run

STARTUP_SECONDS = 900
KEPT = (
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "total_input_tokens",
    "total_output_tokens",
)
"""What is kept of the JSON of ``vllm bench serve``, beside its latencies (``*_ms``) and its
``spec_decode_*`` figures."""

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class Server:
    """One ``vllm serve`` of one arm."""

    def __init__(
        self, arm: Arm, engine: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        self.arm = arm
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.startup_seconds = 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log.open("ab")
        command = [*VLLM, "serve", str(engine["model"]), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), *server_flags(engine)]
        if arm.speculative_config:
            command += ["--speculative-config", json.dumps(arm.speculative_config)]
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            # The prefix cache can be emptied over HTTP in this mode only.
            env={**environment, "VLLM_SERVER_DEV_MODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_until_healthy(self) -> None:
        """Until ``/health`` answers; one line if the server ends before that."""
        while time.perf_counter() - self._started < STARTUP_SECONDS:
            if self._process.poll() is not None:
                raise BenchError(
                    f"arm {self.arm.label!r}: vllm serve ended with status "
                    f"{self._process.returncode} before it was healthy (log: {self.log})"
                )
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                    if answer.status == 200:
                        self.startup_seconds = time.perf_counter() - self._started
                        return
            time.sleep(0.5)
        raise BenchError(f"arm {self.arm.label!r}: not healthy after {STARTUP_SECONDS} s")

    def empty_prefix_cache(self) -> None:
        """Let every pass start with an empty prefix cache."""
        request = urllib.request.Request(self.url + "/reset_prefix_cache", method="POST")
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.URLError as error:
            raise BenchError(f"arm {self.arm.label!r}: {error}") from None

    def close(self) -> None:
        """Stop the server and what it started."""
        self._process.terminate()
        end_process_group(self._process)
        self._log_file.close()


def measure(run: "Run") -> None:
    """All arms at all request rates, in turn; fills ``run.result.online``."""
    settings = run.settings
    repeats = range(settings.repeats)
    passes = [(t, rate) for t in settings.temperatures for rate in settings.request_rates]
    run.reporter.total(len(passes) * len(run.arms) * settings.repeats)
    # All servers for all repeats, or one server at a time, started anew for every repeat.
    sessions: list[tuple[Sequence[Arm], Sequence[int]]] = [(run.arms, repeats)]
    if run.sequential:
        sessions = [([arm], [repeat]) for repeat in repeats for arm in run.arms]
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "prompts.jsonl"
        write_dataset(run.chosen, dataset)
        for arms, session_repeats in sessions:
            with _alive(run, arms) as servers:
                for repeat in session_repeats:
                    for temperature, rate in passes:
                        for server in servers:
                            _one(run, server, dataset, Path(folder), repeat, temperature, rate)


@contextlib.contextmanager
def _alive(run: "Run", arms: Sequence[Arm]) -> Iterator[list[Server]]:
    engine = run.settings.engine_arguments(cpu=run.cpu)
    logs = run.output.with_name(run.output.stem + ".logs")
    servers: list[Server] = []
    try:
        for arm in arms:
            run.reporter.doing(f"{arm.label}: starting vllm serve")
            name = "".join(c if c.isalnum() else "_" for c in arm.label)
            server = Server(arm, engine, run.environment, logs / f"{name}.serve.log")
            servers.append(server)
            server.wait_until_healthy()
            run.result.arms.setdefault(arm.label, {}).update(
                method=arm.method,
                speculative_config=arm.speculative_config,
                startup_seconds=server.startup_seconds,
            )
        yield servers
    finally:
        for server in servers:
            server.close()


def write_dataset(chosen: Sequence[prompts.Prompt], path: Path) -> None:
    """The first turn of every prompt, in the form of vLLM's ``custom`` dataset."""
    lines = [json.dumps({"prompt": prompt.turns[0]}) for prompt in chosen]
    path.write_text("\n".join(lines) + "\n")


def client_command(
    settings: Settings,
    *,
    url: str,
    dataset: Path,
    chat: bool,
    count: int,
    rate: float,
    temperature: float,
    result: Path,
) -> list[str]:
    """The ``vllm bench serve`` that drives a server.

    Args:
        settings: of the run.
        url: of the server.
        dataset: of :func:`write_dataset`.
        chat: chat completions (the server applies the template), else completions.
        count: number of prompts.
        rate: requests per second, ``inf`` for all at once.
        temperature: of sampling.
        result: where its JSON goes.
    """
    endpoint = (
        ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        if chat
        else ["--backend", "openai", "--endpoint", "/v1/completions"]
    )
    return [
        *VLLM, "bench", "serve", "--base-url", url, *endpoint,
        "--model", settings.target,
        "--dataset-name", "custom", "--dataset-path", str(dataset),
        "--skip-chat-template", "--disable-shuffle",
        "--custom-output-len", str(settings.output_tokens), "--num-prompts", str(count),
        *([] if settings.stop_at_eos else ["--ignore-eos"]),
        "--request-rate", f"{rate:g}", "--seed", str(settings.seed),
        "--temperature", f"{temperature:g}",
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
        "--num-warmups", "2", "--disable-tqdm", "--save-result",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def read_client_result(path: Path) -> dict[str, Any]:
    """What is kept of the client's JSON; one line if it failed."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise BenchError(f"vllm bench serve left no result: {error}") from None
    kept = {key: data[key] for key in KEPT if key in data}
    kept |= {
        key: value
        for key, value in data.items()
        if isinstance(value, int | float | list)
        and (key.endswith("_ms") or key.startswith("spec_decode_"))
    }
    if not kept.get("completed"):
        raise BenchError("vllm bench serve completed no request")
    if kept.get("failed"):
        raise BenchError(f"{kept['failed']} requests of vllm bench serve failed")
    return kept


def summary_rows(result: Any) -> list[dict[str, Any]]:
    """One row per arm, temperature and rate: medians over the repeats, ratio to plain."""
    cells: dict[tuple[float, str], dict[str, list[dict[str, Any]]]] = {}
    for entry in result.online:
        cell = cells.setdefault((entry["temperature"], str(entry["request_rate"])), {})
        cell.setdefault(entry["arm"], []).append(entry)
    rows = []
    for (temperature, rate), by_arm in cells.items():
        plain = next((a for a in by_arm if result.arms[a]["method"] == "plain"), None)
        for arm, entries in by_arm.items():
            speeds = [entry["output_throughput"] for entry in entries]
            base = [entry["output_throughput"] for entry in by_arm[plain]] if plain else []
            rows.append(
                {
                    "arm": arm,
                    "temperature": temperature,
                    "request_rate": rate,
                    "repeats": len(entries),
                    "tokens_per_s": median(speeds),
                    "spread": spread(speeds),
                    "ratio_to_plain": (
                        paired_ratio(speeds, base) if len(base) == len(speeds) else None
                    ),
                    **{
                        key: median([entry[key] for entry in entries])
                        for key in entries[0]
                        if key.endswith("_ms")
                        and all(isinstance(entry.get(key), int | float) for entry in entries)
                    },
                    "acceptance_length": entries[-1].get("spec_decode_acceptance_length"),
                }
            )
    return rows


def _one(
    run: "Run",
    server: Server,
    dataset: Path,
    folder: Path,
    repeat: int,
    temperature: float,
    rate: float,
) -> None:
    label = server.arm.label
    key = {
        "arm": label,
        "request_rate": "inf" if rate == float("inf") else rate,
        "temperature": temperature,
        "repeat": repeat,
    }
    if not run.result.has_online(**key):
        run.reporter.doing(f"{label}: {rate:g} requests/s, repeat {repeat + 1}")
        server.empty_prefix_cache()
        result = folder / "client.json"
        result.unlink(missing_ok=True)
        command = client_command(
            run.settings,
            url=server.url,
            dataset=dataset,
            chat=run.chosen[0].chat,
            count=len(run.chosen),
            rate=rate,
            temperature=temperature,
            result=result,
        )
        log = server.log.with_suffix(".client.log")
        with log.open("ab") as output:
            environment = {k: v for k, v in run.environment.items() if k != "LD_PRELOAD"}
            status = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        if status:
            raise BenchError(f"vllm bench serve failed with status {status} (log: {log})")
        run.result.online.append({**key, **read_client_result(result)})
        run._save()
    run.reporter.done()
