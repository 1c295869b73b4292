"""Chat with a running server (`make serve`) through the openai client, streaming.

Stairs are the server's own affair: this is the client of any OpenAI-compatible server.

    python examples/client.py "Why is the sky blue?"
"""

import argparse
import time

from openai import OpenAI, OpenAIError

PROMPT = "Explain in a few sentences why leaves change colour in autumn."


def stream_chat(base_url: str, prompt: str, max_tokens: int) -> None:
    """Send one chat message and print the answer as it comes."""
    client = OpenAI(base_url=base_url, api_key="not needed")
    model = client.models.list().data[0].id
    started = time.perf_counter()
    first_token_at = None
    tokens = 0
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices and (text := chunk.choices[0].delta.content):
            first_token_at = first_token_at or time.perf_counter()
            print(text, end="", flush=True)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    seconds = time.perf_counter() - started
    wait = (first_token_at or time.perf_counter()) - started
    print(f"\n\n{tokens} tokens in {seconds:.1f} s, the first after {wait:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    try:
        stream_chat(args.base_url, args.prompt, args.max_tokens)
    except OpenAIError as error:
        raise SystemExit(f"client: {args.base_url}: {error} (is it up? make serve)") from None


if __name__ == "__main__":
    main()
