"""`examples/reproduce_paper.py`, run as a user runs it: same text, table, JSON."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from vllm_stairs.bench.provenance import commit

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reproduce_paper.py"
METHODS = {"large model alone", "ours", "stairs as published"}
ONLY_ALONE = {"Hugging Face assisted", "stairs as published, no caches"}


def check(folder: Path, printed: str, sizes: list[int], heights: list[int]) -> dict[str, Any]:
    """Look at what a run has written to ``folder``; return its timings."""
    table = (folder / "results.md").read_text()
    assert table.strip() in printed
    results = json.loads((folder / "results.json").read_text())
    assert len(results["plots"]) == 2
    for name in results["plots"]:
        assert (folder / name).stat().st_size > 1000
    ((_, timings),) = results["timings"].items()
    assert list(timings) == [str(size) for size in sizes]
    for size, methods in timings.items():
        assert set(methods) == (METHODS | ONLY_ALONE if size == "1" else METHODS)
        for name, run in methods.items():
            assert run["rows_identical"] == run["rows"] == run["runs"] * int(size), name
            assert run["bleu_against_alone"] == pytest.approx(100.0), name
            assert 1 <= run["distinct_inputs"] <= run["rows"]
            assert run["median_seconds"] > 0
            assert f"| {size} | {name} | {run['median_seconds']:.2f} |" in table
        assert methods["large model alone"]["median_time_ratio"] == 1.0
        assert methods["stairs as published"]["stairs"]["drafted"] > 0
    assert list(results["sweep"]) == [str(n) for n in heights]
    for n, runs in results["sweep"].items():
        assert runs["packed"]["rows_identical"] == runs["packed"]["rows"] > 0
        assert f"\n| {n} | {runs['published']['throughput']:.2f} |" in table
    provenance = results["provenance"]
    assert provenance["commit"] == commit()
    assert provenance["threads"] >= 1
    return dict(timings)


@pytest.fixture
def example() -> Iterator[Any]:
    """The example as a module of this process, where torch is already loaded."""
    spec = importlib.util.spec_from_file_location("reproduce_paper", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    verbosity = transformers.logging.get_verbosity()
    yield module
    transformers.logging.set_verbosity(verbosity)


def test_a_little_of_it(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(
        [
            *("--shape", "none", "--train-steps", "90", "--tokens", "10", "--out", str(tmp_path)),
            *("--batches", "1,2", "--repeats", "2", "--sweep", "2", "--minutes", "0.001"),
        ]
    )
    timings = check(tmp_path, capsys.readouterr().out, [1, 2], [2])
    # The limit of time does not cut the runs at batch 1.
    assert {run["runs"] for run in timings["1"].values()} == {2}
    assert {run["runs"] for run in timings["2"].values()} == {1}


@pytest.mark.full
def test_smoke(tmp_path: Path) -> None:
    """Trained until acceptance on inputs that it has not seen lies where the task wants it."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLE), "--smoke"], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    timings = check(tmp_path / "results" / "paper-smoke", finished.stdout, [1, 4], [2, 4])
    assert 0.5 < timings["4"]["stairs as published"]["stairs"]["acceptance"] < 0.85
