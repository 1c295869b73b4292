"""A dedicated draft on a Ray cluster that runs already, on a node that goes and comes back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import greedy, plain, stairs, statistics, token_ids
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
options = {"object_store_memory": 80 << 20}
cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, **options})
node = cluster.add_node(num_cpus=1, resources={"fast": 1}, **options)
print(cluster.address, flush=True)
for line in sys.stdin:
    if node is None:
        node = cluster.add_node(num_cpus=1, resources={"fast": 1}, **options)
    else:
        cluster.remove_node(node, allow_graceful=False)
        node = None
    print("done", flush=True)
cluster.shutdown()
"""

_ENGINE = """
import json, sys
from pathlib import Path
from tests.e2e.test_running_cluster import write
if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    write(Path(job["folder"]), job["target"], job["draft"])
"""


def write(folder: Path, target: str, draft: str) -> None:
    """Generate before, while and after the draft's node is gone; runs in a process of its own.

    Args:
        folder: where the cluster is started: another one than this process's.
        target: the target, as a path from here.
        draft: the draft, likewise.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None

        def change_nodes() -> None:
            print(file=cluster.stdin, flush=True)
            assert cluster.stdout is not None
            assert cluster.stdout.readline() == "done\n"

        os.environ["RAY_ADDRESS"] = cluster.stdout.readline().strip()
        llm = stairs(
            Path(target),
            Path(draft),
            stairs_placement="dedicated",
            stairs_draft_resources={"CPU": 1, "fast": 1, "memory": 1e6},
        )
        texts = prompts(4, seed=120)
        result: dict[str, Any] = {"ids": []}

        def answers() -> float:
            result["ids"].append([samples[0] for samples in token_ids(llm, texts, greedy(60))])
            return statistics(llm)["dedicated"]["answers"]

        def until(happened: Callable[[], Any]) -> None:
            deadline = time.monotonic() + 180
            while not happened():
                assert time.monotonic() < deadline, result
                time.sleep(0.5)

        runner = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        runner = runner.model_executor.driver_worker.worker.model_runner
        until(answers)
        change_nodes()
        until(lambda: [answers(), runner.stairs_dedicated.facts is None][1])
        change_nodes()
        until(lambda: runner.stairs_dedicated.facts)
        before = answers()
        until(lambda: answers() > before)
        result["restarts"] = statistics(llm)["dedicated"]["restarts"]
        runner.stairs_close()
        print("RESULT " + json.dumps(result), flush=True)


@pytest.mark.full
def test_a_running_cluster(tiny: TinyModels, tmp_path: Path) -> None:
    """The draft goes where the resources are. Paths are from the server's folder, not Ray's."""
    script = tmp_path / "engine.py"
    script.write_text(_ENGINE)
    expected = [
        samples[0] for samples in token_ids(plain(tiny.target), prompts(4, seed=120), greedy(60))
    ]
    job = {"folder": str(tmp_path), "target": tiny.target.name, "draft": tiny.noisy.name}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(job)],
        cwd=tiny.root,
        env={
            **environment,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "5" * 64,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["ids"] == [expected] * len(result["ids"])
    assert result["restarts"] == 1
