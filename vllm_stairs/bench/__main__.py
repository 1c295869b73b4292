"""``python -m vllm_stairs.bench``: the same as ``vllm-stairs bench``."""

from vllm_stairs.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
