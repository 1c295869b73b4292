"""The ``vllm-stairs`` command. Each sub-command lives in its own module."""

import argparse
import sys
from collections.abc import Sequence

from vllm_stairs import doctor, prepare
from vllm_stairs.bench import cli as bench
from vllm_stairs.distill import cli as distill
from vllm_stairs.versions import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-stairs", description="Stairs speculative decoding for vLLM: tools."
    )
    parser.add_argument("--version", action="version", version=f"vllm-stairs {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (doctor, prepare, bench, distill):
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return int(args.func(args) or 0)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
