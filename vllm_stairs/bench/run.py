"""``bench run``: all arms on the same prompts, in turn, with what is needed to judge them."""

import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from vllm_stairs.bench import arms as arms_module
from vllm_stairs.bench import environment, identity, prompts, provenance, results, roofline
from vllm_stairs.bench.arm_client import ArmClient
from vllm_stairs.bench.arms import Arm
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.settings import Settings
from vllm_stairs.bench.summary import summarise

WARM_UP_TOKENS = 16
EXPLAINED_AT_MOST = 5
BANDWIDTH_MEGABYTES = 512
BANDWIDTH_REPEATS = 7
SETTLE_SECONDS = 1.5
"""Before a timed pass: the workers of the arm before look for work for a second (vLLM's
``SpinCondition``) and their OpenMP threads for a fifth of one before they sleep."""


class Reporter(Protocol):
    """Told what goes on; :mod:`vllm_stairs.bench.report` shows it, tests do not."""

    def total(self, measurements: int) -> None:
        """How many passes there will be."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def doing(self, text: str) -> None:
        """What is being done now."""

    def done(self) -> None:
        """One pass is finished."""


class Run:
    """One run of the benchmark, in the order in which it happens."""

    def __init__(
        self,
        settings: Settings,
        output: Path,
        reporter: Reporter,
        *,
        resume: bool = False,
        overwrite: bool = False,
        sequential: bool = False,
        together: bool = False,
        record: Path | None = None,
        record_height: int = 8,
    ) -> None:
        """Check everything that can be checked before an engine is started.

        Args:
            settings: what to measure.
            output: the result file.
            reporter: is told what goes on.
            resume: go on with ``output`` where an earlier run stopped.
            overwrite: replace ``output``.
            sequential: one engine at a time, started anew for every repeat.
            together: start all engines at once; their start-up times then say little.
            record: write a record of a stairs run there, in passes of its own; a resumed run
                writes it anew.
            record_height: height of the recorded staircases.
        """
        self.settings = settings
        self.output = output
        self.reporter = reporter
        self.sequential = sequential
        self.record = record
        self.record_height = record_height
        self.arms = arms_module.parse_all(settings.arms, settings.draft)
        if settings.turns > 1:
            self._check_turns(sequential)
        self.models = {"target": settings.target}
        for arm in self.arms:
            if arm.draft:
                self.models[f"draft of {arm.label}"] = arm.draft
        if record is not None:
            self._check_record(record, resume=resume, overwrite=overwrite)
        for role, name in self.models.items():
            provenance.check_model(name, role)
        self.cpu = environment.runs_on_cpu()
        self.together = together
        divided = settings.kv_cache_gib or "gpu_memory_utilization" in dict(settings.engine)
        if not (self.cpu or divided or sequential) and len(self.arms) > 1:
            if settings.turns > 1:
                raise BenchError("--turns needs all arms alive: give --kv-cache-gib")
            self.sequential = True
            reporter.note(
                "each engine takes most of the accelerator's memory: one at a time "
                "(--kv-cache-gib lets them live side by side)"
            )
        self.offline = all(Path(name).is_dir() for name in self.models.values())
        self.environment = environment.arm_environment(cpu=self.cpu, offline=self.offline)
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        self.chosen = prompts.select(
            prompts.load(settings.prompts, all_turns=settings.all_turns),
            groups=settings.groups or None,
            limit=settings.limit,
            seed=settings.seed,
            by_group=settings.by_group,
        )
        if not settings.online:
            self._check_batches()
        self.work: list[dict[str, Any]] = []
        self.outputs: dict[tuple[str, int, float], dict[str, list[int]]] = {}
        self.later_prompts: dict[str, list[int]] = {}
        self.warm: set[tuple[ArmClient, int]] = set()
        self.result = results.open_for(
            output, settings.as_dict(), resume=resume, overwrite=overwrite
        )
        results.check_writable(output, "--output")
        if record is not None:
            results.check_writable(record, "--record")

    def _check_batches(self) -> None:
        count, where = len(self.chosen), ""
        if self.settings.by_group:
            group, count = min(
                Counter(prompt.group for prompt in self.chosen).items(), key=lambda item: item[1]
            )
            where = f" in {group}"
        if max(self.settings.batches) > count:
            raise BenchError(
                f"a batch of {max(self.settings.batches)} needs as many prompts, there are "
                f"{count}{where}: raise --limit or lower --batch-sizes"
            )

    def _check_turns(self, sequential: bool) -> None:
        if sequential:
            raise BenchError("--turns needs all arms alive: it does not go with --sequential")
        for arm in self.arms:
            if (arm.speculative_config or {}).get("stairs_placement") == "dedicated":
                raise BenchError(
                    f"--turns: the draft of {arm.label!r} has a device of its own and would go on "
                    "while others have their turn; leave out --turns"
                )

    def _check_record(self, record: Path, *, resume: bool, overwrite: bool) -> None:
        if not self.settings.draft:
            raise BenchError("--record needs --draft")
        if self.settings.online:
            raise BenchError("--record is not written with --online: record in a run without it")
        if self.record_height < 1:
            raise BenchError("--record-height must be at least 1")
        for flag, path in (("--output", self.output), ("--prompts", Path(self.settings.prompts))):
            if results.same_file(record, path):
                raise BenchError(f"--record and {flag} are the same file: {str(record)!r}")
        if record.exists() and not (overwrite or resume):
            raise BenchError(f"{str(record)!r} exists: name another record or pass --overwrite")
        self._record_arm()

    def _record_arm(self) -> Arm:
        """The arm that writes the record; the path is no part of its text, it may hold commas."""
        assert self.record is not None
        arm = arms_module.parse(
            f"record@stairs:k={self.record_height},height=fixed", self.settings.draft
        )
        path = str(self.record.resolve())
        return replace(
            arm, speculative_config={**(arm.speculative_config or {}), "stairs_record": path}
        )

    def execute(self) -> results.Result:
        """Measure, explain, summarise; the result file is written after every pass."""
        self._note_provenance()
        load = self.result.provenance["machine"]["load_average_at_start"]
        cores = self.result.provenance["machine"]["cores"] or 1
        if load > 0.5 * cores:
            self.reporter.note(f"this machine is busy (load {load} on {cores} cores): expect noise")
        self._describe_prompts(self.chosen)
        if self.settings.online:
            from vllm_stairs.bench import online

            online.measure(self)
        else:
            self._measure_all()
        if self.record is not None:
            self._record()
        self._save()
        return self.result

    def _note_provenance(self) -> None:
        """Of this session; a resumed run must still measure the same thing."""
        now, before = provenance.collect(self.models), self.result.provenance
        now["sequential"] = self.sequential
        if self.result.measurements or self.result.online:
            for name in ("versions", "commit", "models"):
                if before.get(name) != now[name]:
                    raise BenchError(
                        f"cannot resume {str(self.output)!r}: {name} changed since it was begun"
                    )
            self._check_same_machine(now, before)
            earlier = before.pop("earlier_sessions", [])
            now["earlier_sessions"] = [*earlier, before]
        self.result.provenance = now

    def _check_same_machine(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Raise if a figure of this session could not stand beside those of the one before."""
        old_machine, old_environment = before.get("machine") or {}, before.get("environment") or {}
        machine, environment = now["machine"], now["environment"]
        pairs = [
            *((f"the machine's {key}", old_machine.get(key), machine.get(key))
              for key in ("processor", "cores", "accelerators")),
            *((key, old_environment.get(key), environment.get(key))
              for key in sorted({*old_environment, *environment})),
            # Not in results of releases that did not note it.
            ("--sequential", before.get("sequential", now["sequential"]), now["sequential"]),
        ]  # fmt: skip
        for name, old, new in pairs:
            if old != new:
                raise BenchError(
                    f"cannot resume {str(self.output)!r}: {name} was {old!r} and is {new!r} now"
                )

    # The passes.

    def _measure_all(self) -> None:
        settings = self.settings
        cells = [(b, t) for t in settings.temperatures for b in settings.batches]
        rounds = [(r, cell) for r in range(settings.repeats) for cell in cells]
        profiles = len(self.arms) * len(settings.batches) if settings.profile else 0
        self.reporter.total(len(rounds) * len(self.arms) + profiles)
        if self.sequential:
            for repeat in range(settings.repeats):
                for arm in self.arms:
                    with self._alive([arm]) as clients:
                        for cell in cells:
                            self._measure(clients[0], repeat, *cell)
                        if repeat == settings.repeats - 1:
                            self._finish(clients)
            self._explain_with_engines()
            return
        with self._alive(self.arms) as clients:
            for repeat, cell in rounds:
                if settings.turns > 1:
                    self._measure_in_turns(clients, repeat, *cell)
                    continue
                for client in clients:
                    self._measure(client, repeat, *cell)
            self._finish(clients)
            self._compare_outputs(clients)

    def _measure(self, client: ArmClient, repeat: int, batch: int, temperature: float) -> None:
        label = client.arm.label
        key = {"arm": label, "batch": batch, "temperature": temperature, "repeat": repeat}
        if self.result.has(**key):
            self.reporter.done()
            return
        self._warm_up(client, batch, temperature)
        self._say_cell(label, repeat, batch, temperature)
        time.sleep(SETTLE_SECONDS)
        self._keep(key, self._pass(client, batch, temperature, self.work))
        self._save()
        self.reporter.done()

    def _measure_in_turns(
        self, clients: Sequence[ArmClient], repeat: int, batch: int, temperature: float
    ) -> None:
        """One pass of every arm, in turns, in an order that is drawn for each turn.

        All arms but one are stopped. The passes of a cell are kept together or not at all.
        """
        key = {"batch": batch, "temperature": temperature, "repeat": repeat}
        if all(self.result.has(arm=client.arm.label, **key) for client in clients):
            for _ in clients:
                self.reporter.done()
            return
        for client in clients:
            self._warm_up(client, batch, temperature)
            client.freeze()
        self._say_cell("all arms in turns", repeat, batch, temperature)
        for client in clients:
            client.call("begin", **self._pass_arguments(batch, temperature, self.work))
            client.freeze()
        turns = self.settings.turns
        talks = sum(len(item["turns"]) if self.settings.all_turns else 1 for item in self.work)
        order = random.Random(f"{self.settings.seed}/{key}")
        left = list(clients)
        for turn in range(1, turns + 1):
            until = None
            if turn < turns:
                until = math.ceil(talks * self.settings.output_tokens * turn / turns)
            order.shuffle(left)
            for client in list(left):
                if client.call("turn", until_tokens=until):
                    left.remove(client)
                client.freeze()
        found = []
        for client in clients:
            found.append(client.call("end"))
            client.freeze()
        for client, figures in zip(clients, found, strict=True):
            self._keep({"arm": client.arm.label, **key}, figures)
        self._save()
        for _ in clients:
            self.reporter.done()

    def _warm_up(self, client: ArmClient, batch: int, temperature: float) -> None:
        if (client, batch) not in self.warm:
            self.reporter.doing(f"{client.arm.label}: warm-up, batch {batch}")
            self._pass(client, batch, temperature, self.work[:batch], WARM_UP_TOKENS)
            self.warm.add((client, batch))

    def _say_cell(self, who: str, repeat: int, batch: int, temperature: float) -> None:
        self.reporter.doing(
            f"{who}: batch {batch}, temperature {temperature:g}, "
            f"repeat {repeat + 1} of {self.settings.repeats}"
        )

    def _keep(self, key: Mapping[str, Any], figures: dict[str, Any]) -> None:
        """Put the figures of a pass into the result."""
        label, batch, temperature = key["arm"], key["batch"], key["temperature"]
        outputs = figures.pop("outputs")
        self.later_prompts.update(figures.pop("later_prompts"))
        figures.pop("profile", None)
        if temperature == 0:
            self.outputs.setdefault((label, batch, temperature), outputs)
        self.result.measurements.append({**key, **figures})

    def _profile(self, client: ArmClient, batch: int) -> None:
        label = client.arm.label
        if any((p["arm"], p["batch"]) == (label, batch) for p in self.result.profiles):
            self.reporter.done()
            return
        self.reporter.doing(f"{label}: profiled pass, batch {batch}")
        work = self.work[: max(batch, min(6, len(self.work)))]
        figures = self._pass(client, batch, self.settings.temperatures[0], work, profile=True)
        profile = figures["profile"]
        seconds = profile["seconds"]
        seconds["rest"] = max(0.0, figures["seconds"] - sum(seconds.values()))
        self.result.profiles.append(
            {
                "arm": label,
                "method": client.arm.method,
                "batch": batch,
                "requests": figures["requests"],
                "elapsed": figures["seconds"],
                **profile,
            }
        )
        self._save()
        self.reporter.done()

    def _pass(
        self,
        client: ArmClient,
        batch: int,
        temperature: float,
        work: Sequence[dict[str, Any]],
        output_tokens: int | None = None,
        profile: bool = False,
    ) -> dict[str, Any]:
        arguments = self._pass_arguments(batch, temperature, work, output_tokens)
        figures: dict[str, Any] = client.call("measure", **arguments, profile=profile)
        return figures

    def _pass_arguments(
        self,
        batch: int,
        temperature: float,
        work: Sequence[dict[str, Any]],
        output_tokens: int | None = None,
    ) -> dict[str, Any]:
        return {
            "work": work,
            "batch": batch,
            "temperature": temperature,
            "output_tokens": min(output_tokens or 10**9, self.settings.output_tokens),
            "seed": self.settings.seed,
            "ignore_eos": not self.settings.stop_at_eos,
            "by_group": self.settings.by_group,
        }

    def _finish(self, clients: Sequence[ArmClient]) -> None:
        """After the timed passes: profiled passes, peak memory."""
        for client in clients:
            if self.settings.profile:
                for batch in self.settings.batches:
                    self._profile(client, batch)
            self.result.arms[client.arm.label]["peak_memory_bytes"] = client.call("memory")
        self._save()

    # Token identity.

    def _differences(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Per greedy cell and arm an entry, and the requests that differ from plain's."""
        plain = next((arm.label for arm in self.arms if arm.method == "plain"), None)
        found = []
        if plain is None or 0.0 not in self.settings.temperatures:
            return []
        for batch in self.settings.batches:
            digests = self._digests(plain, batch)
            for arm in self.arms:
                others = self._digests(arm.label, batch)
                if arm.label == plain or not digests or not others:
                    continue
                differing = sorted(
                    {
                        name
                        for repeat in digests.keys() & others.keys()
                        for name in identity.differing(digests[repeat], others[repeat])
                    }
                )
                count = len(next(iter(digests.values())))
                entry = {
                    "arm": arm.label,
                    "batch": batch,
                    "temperature": 0.0,
                    "requests": count,
                    "same": count - len(differing),
                    "differing": differing,
                    "explained": [],
                }
                found.append((entry, differing))
        return found

    def _digests(self, label: str, batch: int) -> dict[int, dict[str, str]]:
        return {
            m["repeat"]: m["digests"]
            for m in self.result.measurements
            if (m["arm"], m["batch"], m["temperature"]) == (label, batch, 0.0)
        }

    def _compare_outputs(self, clients: Sequence[ArmClient]) -> None:
        differences = self._differences()
        self.result.identity = [entry for entry, _ in differences]
        by_label = {client.arm.label: client for client in clients}
        plain = next((c for c in clients if c.arm.method == "plain"), None)
        for entry, differing in differences:
            for request in differing[:EXPLAINED_AT_MOST]:
                if plain is not None:
                    entry["explained"].append(
                        self._explain(request, plain, by_label[entry["arm"]], entry["batch"])
                    )
        self._save()

    def _explain_with_engines(self) -> None:
        differences = self._differences()
        self.result.identity = [entry for entry, _ in differences]
        wrong = {entry["arm"] for entry, differing in differences if differing}
        if wrong:
            with self._alive([a for a in self.arms if a.method == "plain" or a.label in wrong]) as (
                clients
            ):
                self._compare_outputs(clients)

    def _explain(
        self, request: str, plain: ArmClient, other: ArmClient, batch: int
    ) -> dict[str, Any]:
        self.reporter.doing(f"{other.arm.label}: re-running {request} with log-probabilities")
        name, _, turn = request.rpartition("/")
        tokens = (
            self.later_prompts.get(request)
            if int(turn)
            else next(item["tokens"] for item in self.work if item["id"] == name)
        )
        if tokens is None:
            return {"request": request, "verdict": "a later turn of an earlier session"}
        arguments = {
            "tokens": tokens,
            "output_tokens": self.settings.output_tokens,
            "ignore_eos": not self.settings.stop_at_eos,
        }
        ours, theirs = (
            [
                (token, {int(k): v for k, v in top.items()})
                for token, top in client.call("logprobs", **arguments)
            ]
            for client in (plain, other)
        )
        dtype = str(plain.facts.get("dtype", "float32"))
        timed = [
            self.outputs.get((client.arm.label, batch, 0.0), {}).get(request)
            for client in (plain, other)
        ]
        position = None
        if timed[0] is not None and timed[1] is not None:
            position = identity.first_difference(timed[0], timed[1])
        explained = identity.explain(request, ours, theirs, dtype, batch, position)
        if position is not None:
            explained["position_in_timed_pass"] = position
        return explained

    # Engines.

    @contextmanager
    def _alive(self, arms: Sequence[Arm]) -> Iterator[list[ArmClient]]:
        """Start arms; one after the other, so that their start-up times are comparable."""
        clients: list[ArmClient] = []
        try:
            if self.together:
                clients += [self._start(arm) for arm in arms]
            for number, arm in enumerate(arms):
                self.reporter.doing(f"{arm.label}: starting")
                if not self.together:
                    clients.append(self._start(arm))
                facts = clients[number].wait_until_ready()
                info = self.result.arms.setdefault(arm.label, {})
                info.update(
                    {
                        "method": arm.method,
                        "speculative_config": arm.speculative_config,
                        "engine": facts,
                        "startup_seconds": facts["startup_seconds_with_process"],
                    }
                )
            self._prepare(clients)
            yield clients
        finally:
            for client in clients:
                client.close()

    def _start(self, arm: Arm) -> ArmClient:
        name = "".join(c if c.isalnum() else "_" for c in arm.label)
        return ArmClient(
            arm,
            self.settings.engine_arguments(cpu=self.cpu),
            self.environment,
            self.output.with_name(self.output.stem + ".logs") / f"{name}.log",
        )

    def _prepare(self, clients: Sequence[ArmClient]) -> None:
        """What needs a running engine once: prompt lengths, bandwidth, bytes of the models."""
        if not self.work:
            length = min(client.facts["max_model_len"] for client in clients)
            self._tokenise(length - self.settings.output_tokens)
        if self.result.bandwidth is None:
            self.reporter.doing("measuring memory bandwidth")
            self.result.bandwidth = clients[0].call(
                "bandwidth", megabytes=BANDWIDTH_MEGABYTES, repeats=BANDWIDTH_REPEATS
            )
        for name in {*self.models.values()} - self.result.models.keys():
            folder = provenance.model_folder(name)
            found = roofline.model_bytes(folder, clients[0].facts["dtype"]) if folder else None
            if found:
                self.result.models[name] = vars(found)

    def _tokenise(self, room: int) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.settings.target)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BenchError(f"no tokenizer for {self.settings.target!r}: {reason}") from None
        tokens = {p.id: prompts.render(p.turns[:1], p.chat, tokenizer) for p in self.chosen}
        kept = prompts.check_lengths(
            self.chosen, lambda p: len(tokens[p.id]), room=room, skip=self.settings.skip_long
        )
        if len(kept) < max(self.settings.batches):
            raise BenchError(f"only {len(kept)} prompts fit: lower --batch-sizes")
        self._describe_prompts(kept)
        self.work = [
            {
                "id": p.id,
                "group": p.group,
                "tokens": tokens[p.id],
                "turns": list(p.turns),
                "chat": p.chat,
            }
            for p in kept
        ]

    def _describe_prompts(self, chosen: Sequence[prompts.Prompt]) -> None:
        found = {
            "source": self.settings.prompts,
            "count": len(chosen),
            "groups": {g: sum(p.group == g for p in chosen) for g in {p.group for p in chosen}},
            "hash": prompts.fingerprint(chosen),
        }
        before = self.result.prompts
        if self.result.measurements and before and before.get("hash") != found["hash"]:
            if len(chosen) == len(self.chosen) and self.settings.skip_long:
                return  # Not yet known which ones fit.
            raise BenchError(f"cannot resume {str(self.output)!r}: the prompts have changed")
        self.result.prompts = found

    # The record.

    def _record(self) -> None:
        assert self.record is not None
        self.record.unlink(missing_ok=True)
        self.reporter.doing("recording: starting")
        client = self._start(self._record_arm())
        try:
            client.wait_until_ready()
            self._prepare([client])
            for batch in self.settings.batches:
                self.reporter.doing(f"recording: warm-up, batch {batch}")
                self._pass(client, batch, 0.0, self.work[:batch], WARM_UP_TOKENS)
            self.record.write_text("")  # The warm-up is no part of the record.
            for batch in self.settings.batches:
                self.reporter.doing(f"recording: batch {batch}")
                self._pass(client, batch, self.settings.temperatures[0], self.work)
        finally:
            client.close()
        lines = sum(1 for _ in self.record.open())
        self.reporter.note(f"record: {lines} staircases in {self.record}")

    def _save(self) -> None:
        self.result.summary = summarise(self.result)
        results.save(self.result, self.output)
