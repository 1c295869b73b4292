"""Stairs without a server: vLLM's own `LLM` class, greedy, a few prompts at once.

python examples/offline.py [TARGET [DRAFT]]

Without DRAFT it is TARGET-draft (`make models` makes both).
"""

import os
import sys

TARGET = "models/smollm2-135m-instruct"
QUESTIONS = [
    "Name three uses of copper.",
    "Write a Python function that reverses a string.",
    "What is the capital of Lithuania?",
]


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    target = sys.argv[1] if len(sys.argv) > 1 else TARGET
    speculation = {"method": "stairs", "num_speculative_tokens": 4}
    if len(sys.argv) > 2:
        speculation["model"] = sys.argv[2]

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=target,
        dtype="float32",
        max_model_len=2048,
        speculative_config=speculation,
    )
    answers = llm.chat(
        [[{"role": "user", "content": question}] for question in QUESTIONS],
        SamplingParams(temperature=0, max_tokens=64),
    )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n> {question}\n{answer.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts workers that import this file again
    main()
