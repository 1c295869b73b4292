"""The main job, end to end: serve a model with stairs, chat with it, read the figures.

    make demo                                     # SmolLM2-135M-Instruct and its draft
    make demo ARGS="--draft PATH --tokens 2"      # another draft
    make demo ARGS="--method draft_model"         # vLLM's own speculation, to compare
    make serve                                    # the same server, until Ctrl-C

What follows a lone `--` goes to `vllm serve` as it is.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from client import PROMPT, stream_chat
from openai import OpenAIError
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

TARGET = "models/smollm2-135m-instruct"
HOST = "127.0.0.1"
SECONDS_TO_STOP = 20
LOG_LINES_TO_SHOW = 25


class ServerDied(Exception):
    """The server ended, or never answered; the message is what to tell the user."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default=TARGET, help="model folder or id (%(default)s)")
    parser.add_argument(
        "--draft", help="draft folder or id (default: TARGET-draft, else the target)"
    )
    parser.add_argument("--tokens", type=int, default=4, help="drafted tokens (%(default)s)")
    parser.add_argument("--method", default="stairs", help="stairs, one of vLLM's own, or none")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--serve", action="store_true", help="only serve, in the foreground")
    parser.add_argument("--port", type=int, help="default: 8000 with --serve, else a free one")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server")
    parser.add_argument("server_args", nargs="*", metavar="-- ...", help="more for vllm serve")
    args = parser.parse_args()
    trained = f"{args.target}-draft"
    args.draft = args.draft or (trained if Path(trained).is_dir() else args.target)
    args.port = args.port or (8000 if args.serve else free_port())
    return args


def server_command(args: argparse.Namespace) -> list[str]:
    """The command line of the server: what a user would type."""
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", args.target]
    if args.method == "stairs":
        command += ["--speculative-method", "stairs", "--speculative-model", args.draft]
        command += ["--num-speculative-tokens", str(args.tokens)]
    elif args.method != "none":
        command += ["--spec-method", args.method, "--spec-model", args.draft]
        command += ["--spec-tokens", str(args.tokens)]
    command += ["--dtype", "float32", "--max-model-len", "2048"]
    command += ["--host", HOST, "--port", str(args.port)]
    if not can_compile():
        print("demo: no C++ compiler with Python's headers here, so without compilation (slower)")
        command += ["--enforce-eager"]
    return command + args.server_args


def server_environment(args: argparse.Namespace) -> dict[str, str]:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if Path(args.target).is_dir() and Path(args.draft).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def can_compile() -> bool:
    """Whether torch.compile has what it needs on a CPU."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(map(shutil.which, ("g++", "clang++", "c++")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[str]:
    """A healthy server; yields its address and stops it whatever happens."""
    command = server_command(args)
    print("demo:", " ".join(command))
    print("demo: the first start compiles the model, which takes minutes; later ones are faster")
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-stairs-demo-", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            env=server_environment(args),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we stop the server in good order
        )
        try:
            address = f"http://{HOST}:{args.port}"
            wait_until_healthy(process, address, args.timeout)
            yield address
        except (ServerDied, OpenAIError, URLError):
            log.seek(0)
            print("".join(log.readlines()[-LOG_LINES_TO_SHOW:]), file=sys.stderr)
            raise
        finally:
            stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, timeout: float) -> None:
    started = time.monotonic()
    last_line_at = 0.0
    while (waited := time.monotonic() - started) < timeout:
        if process.poll() is not None:
            raise ServerDied(f"the server ended with status {process.returncode} (see above)")
        try:
            with urlopen(f"{address}/health", timeout=5):
                print(f"demo: the server is healthy after {waited:.0f} s\n")
                return
        except OSError:
            pass
        if waited - last_line_at >= 10:
            last_line_at = waited
            print(f"demo: the server is starting ... {waited:.0f} s", flush=True)
        time.sleep(0.5)
    raise ServerDied(f"the server was not healthy within {timeout:.0f} s (see above)")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            print(f"demo: the server did not stop within {SECONDS_TO_STOP} s: killed")
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def print_figures(address: str) -> None:
    """What /metrics says about speculation."""
    with urlopen(f"{address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def total(name: str) -> float:
        family = families.get(f"vllm:spec_decode_num_{name}")
        return sum(s.value for s in family.samples if s.name.endswith("_total")) if family else 0

    drafts, drafted, accepted = (
        total(name) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    print("\nspeculation, from /metrics")
    print(f"  drafts                    {drafts:.0f}")
    print(f"  drafted tokens            {drafted:.0f}")
    print(f"  accepted tokens           {accepted:.0f}")
    if not drafted:
        return
    print(f"  acceptance rate           {accepted / drafted:.3f}")
    print(f"  mean acceptance length    {1 + accepted / drafts:.2f}  (with the target's own token)")
    if family := families.get("vllm:spec_decode_num_accepted_tokens_per_pos"):
        print(f"  accepted per position     {per_position(family, drafts)}")
    if family := families.get("vllm:spec_decode_stairs_height"):
        print(f"  stair heights             {heights(family)}")


def per_position(family: Metric, drafts: float) -> str:
    samples = [sample for sample in family.samples if sample.name.endswith("_total")]
    samples.sort(key=lambda sample: int(sample.labels["position"]))
    return "  ".join(
        f"{int(s.labels['position']) + 1}: {s.value:.0f} ({s.value / drafts:.2f})" for s in samples
    )


def heights(family: Metric) -> str:
    """How many staircases had each height; the buckets of a histogram are cumulative."""
    counts = []
    below = 0.0
    buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
    for bucket in sorted(buckets, key=lambda sample: float(sample.labels["le"])):
        if bucket.value > below:
            counts.append(f"{bucket.labels['le'].removesuffix('.0')}: {bucket.value - below:.0f}")
        below = bucket.value
    return "  ".join(counts)


def main() -> int:
    args = parse_arguments()
    if args.serve:
        command = server_command(args)
        os.execve(command[0], command, server_environment(args))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with running_server(args) as address:
            print(f"> {args.prompt}\n")
            stream_chat(f"{address}/v1", args.prompt, args.max_tokens)
            print_figures(address)
    except (ServerDied, OpenAIError, URLError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server is stopped", file=sys.stderr)
        return 130
    print("\ndemo: the server is stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
