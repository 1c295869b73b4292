"""A dedicated draft on a Ray cluster that runs already, on a node that goes and comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import greedy, in_a_process, plain, stairs, statistics, token_ids
from tests.engine.test_dedicated import runner_of, until
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

        runner = runner_of(llm)
        until(answers, 180)
        change_nodes()
        until(lambda: [answers(), runner.stairs_dedicated.facts is None][1], 180)
        change_nodes()
        until(lambda: runner.stairs_dedicated.facts, 180)
        before = answers()
        until(lambda: answers() > before, 180)
        result["restarts"] = statistics(llm)["dedicated"]["restarts"]
        runner.stairs_close()
        print("RESULT " + json.dumps(result), flush=True)


@pytest.mark.full
def test_a_running_cluster(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft goes where the resources are. Paths are from the server's folder, not Ray's."""
    expected = [
        samples[0] for samples in token_ids(plain(tiny.target), prompts(4, seed=120), greedy(60))
    ]
    job = {"folder": str(tmp_path), "target": tiny.target.name, "draft": tiny.noisy.name}
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tiny.root)
    result = in_a_process(
        _ENGINE,
        job,
        tmp_path,
        timeout=600,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="5" * 64,
    )
    assert result["ids"] == [expected] * len(result["ids"])
    assert result["restarts"] == 1
