"""Every documented error: one sentence that says what is wrong and what to do."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.tiny import TinyModels, copy_model
from vllm_stairs.engine.speculative import StairsSpeculativeConfig

KV_TRANSFER = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def build(target: Path, config: dict[str, Any], **kwargs: Any) -> Any:
    """The speculative configuration that the engine would get."""
    options = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, **kwargs}
    args = EngineArgs(model=str(target), speculative_config=config, **options)
    return args.create_engine_config().speculative_config


def parse(*argv: str) -> Any:
    """The speculative configuration of a command line."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--dtype", "float32", "--max-model-len", "256", *argv])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config().speculative_config


def error(target: Path, config: dict[str, Any], **kwargs: Any) -> str:
    with pytest.raises(ValueError) as raised:
        build(target, {"method": "stairs", **config}, **kwargs)
    message = str(raised.value)
    assert "\n" not in message.strip()
    return message


def test_defaults(tiny: TinyModels) -> None:
    config = build(tiny.target, {"method": "stairs", "model": str(tiny.noisy)})
    assert isinstance(config, StairsSpeculativeConfig)
    assert config.num_speculative_tokens == 4
    assert config.stairs.layout == "packed"
    assert "stairs" in repr(config)


def test_draft_beside_the_target(tiny: TinyModels, tmp_path: Path) -> None:
    target = copy_model(tiny.target, tmp_path / "model")
    message = error(target, {})
    assert f"{target}-draft" in message
    assert "--speculative-model" in message
    copy_model(tiny.noisy, tmp_path / "model-draft")
    assert build(target, {"method": "stairs"}).model == f"{target}-draft"


@pytest.mark.parametrize("flags", ["--speculative-", "--spec-"])
def test_command_line(tiny: TinyModels, flags: str) -> None:
    tokens = "--num-speculative-tokens" if flags == "--speculative-" else "--spec-tokens"
    config = parse(
        "--model", str(tiny.target), f"{flags}method", "stairs", f"{flags}model",
        str(tiny.noisy), tokens, "3", "--stairs-layout", "expanded",
    )  # fmt: skip
    assert isinstance(config, StairsSpeculativeConfig)
    assert (config.num_speculative_tokens, config.stairs.layout) == (3, "expanded")


def test_other_methods_on_the_command_line(tiny: TinyModels) -> None:
    config = parse("--model", str(tiny.target), "--spec-method", "ngram", "--spec-tokens", "3")
    assert type(config).__name__ == "SpeculativeConfig"
    assert parse("--model", str(tiny.target)) is None


def test_arguments_can_be_copied(tiny: TinyModels) -> None:
    """As ``vllm bench latency`` and ``LLM.from_engine_args`` do, with and without the method."""
    for argv in ([], ["--spec-method", "stairs", "--spec-model", str(tiny.noisy)]):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        args = EngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny.target), *argv]))
        assert EngineArgs(**vars(args)) == args


def test_command_line_errors(tiny: TinyModels, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--model", str(tiny.target), "--stairs-layout", "packed")
    assert ended.value.code == 2
    assert "add --speculative-method stairs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--model", str(tiny.target), "--speculative-method", "stairs",
              "--speculative-model", "./nowhere")  # fmt: skip
    assert "./nowhere: there is no such folder" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        parse("--stairs-layout", "spiral")


def test_help_names_every_flag() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    text = parser.format_help()
    for flag in ("--speculative-method", "--speculative-model", "--num-speculative-tokens",
                 "--stairs-layout", "--stairs-height", "--stairs-record", "--stairs-placement",
                 "--stairs-overlap", "--stairs-draft-node", "--stairs-draft-resources",
                 "--stairs-ray-address"):  # fmt: skip
        assert flag in text


def test_draft_errors(tiny: TinyModels, tmp_path: Path) -> None:
    assert "no such folder" in error(tiny.target, {"model": "/nowhere/at/all"})
    assert "no config.json" in error(tiny.target, {"model": str(tmp_path)})
    message = error(tiny.target, {"model": "somebody/some-model"})
    assert "not in the local cache" in message
    message = error(tiny.target, {"model": str(tiny.foreign)})
    assert "another tokenizer" in message
    assert "use_heterogeneous_vocab" in message


def test_draft_that_vllm_takes_for_another_method(tiny: TinyModels, tmp_path: Path) -> None:
    folder = copy_model(tiny.noisy, tmp_path / "my-eagle-draft")
    message = error(tiny.target, {"model": str(folder)})
    assert "'eagle'" in message


@pytest.mark.parametrize("height", [0, -1, 65, 1.5, "4", True])
def test_height_out_of_range(tiny: TinyModels, height: object) -> None:
    message = error(tiny.target, {"model": str(tiny.noisy), "num_speculative_tokens": height})
    assert "whole number from 1 to 64" in message


def test_height_larger_than_the_engine(tiny: TinyModels) -> None:
    config = {"model": str(tiny.noisy), "num_speculative_tokens": 31}
    assert "from 1 to 30" in error(tiny.target, config, max_model_len=32)
    assert "from 1 to 14" in error(
        tiny.target, config, max_num_batched_tokens=16, max_num_seqs=4, max_model_len=256
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"stairs_hight": 3}, "Unknown option 'stairs_hight'"),
        ({"stairs_layout": "spiral"}, "'packed' or 'expanded'"),
        ({"parallel_drafting": True}, "parallel_drafting"),
        ({"rejection_sample_method": "block"}, "'standard' (default) or 'synthetic'"),
        ({"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}, "CPU"),
        ({"use_local_argmax_reduction": True}, "use_local_argmax_reduction"),
        ({"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size=2"),
        ({"prompt_lookup_max": 3}, "'prompt_lookup_max' is not one that"),
        ({"suffix_decoding_max_tree_depth": 3}, "leave it out"),
        ({"enable_adaptive_verification": True}, "leave it out"),
        ({"stairs": {"layout": "expanded"}}, "leave it out"),
        ({"draft_model_config": {}}, "leave it out"),
        ({"stairs_record": "/nowhere/record"}, "cannot be written"),
        ({"num_speculative_tokens_per_batch_size": [[2, 4, 1]]}, "must start at 1"),
        ({"max_model_len": 100_000}, "max_model_len (100000)"),
        ({"quantization": "nonsense"}, "nonsense"),
        ({"temperatur": 1}, "'temperatur' is not one that"),
    ],
)
def test_other_keys(tiny: TinyModels, config: dict[str, Any], expected: str) -> None:
    assert expected in error(tiny.target, {"model": str(tiny.noisy), **config})


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"worker_cls": "a.B"}, "leave --worker-cls out"),
        ({"async_scheduling": True}, "leave --async-scheduling out"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"logits_processors": ["a.B"]}, "--logits-processors"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context-par"),
        ({"kv_transfer_config": KV_TRANSFER}, "--kv-transfer-config"),
        ({"runner": "pooling"}, "a target that generates text"),
    ],
)
def test_engines_that_cannot_have_stairs(
    tiny: TinyModels, kwargs: dict[str, Any], expected: str
) -> None:
    assert expected.lower() in error(tiny.target, {"model": str(tiny.noisy)}, **kwargs).lower()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]),
            "see vllm_stairs.hf",
            id="encoder-decoder",
        ),
        pytest.param(
            transformers.Qwen2AudioConfig(architectures=["Qwen2AudioForConditionalGeneration"]),
            "--language-model-only",
            id="multimodal",
        ),
        pytest.param(
            transformers.JambaConfig(architectures=["JambaForCausalLM"]),
            "has recurrent layers",
            id="hybrid",
        ),
        pytest.param(
            transformers.MambaConfig(architectures=["MambaForCausalLM"]),
            "has recurrent layers",
            id="without-attention",
            marks=pytest.mark.full,
        ),
    ],
)
def test_targets_that_cannot_have_stairs(
    tiny: TinyModels, tmp_path: Path, config: transformers.PretrainedConfig, expected: str
) -> None:
    target = copy_model(tiny.target, tmp_path / "target")
    config.save_pretrained(target)
    assert expected in error(target, {"model": str(tiny.noisy)})


def test_installed_logits_processors(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs what a package names under this entry point, for every request."""
    folder = tmp_path / "processing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: processing\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vllm.logits_processors]\nbans = processing:Bans\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "vllm.logits_processors" in error(tiny.target, {"model": str(tiny.noisy)})


def test_v2_runner_forced(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in error(tiny.target, {"model": str(tiny.noisy)})


def test_options_of_another_method(tiny: TinyModels) -> None:
    with pytest.raises(ValueError, match="stairs_layout belongs to.*'ngram'"):
        build(tiny.target, {"method": "ngram", "num_speculative_tokens": 2,
                            "stairs_layout": "packed"})  # fmt: skip


def test_keys_that_work(tiny: TinyModels) -> None:
    config = build(
        tiny.target,
        {
            "method": "stairs",
            "model": str(tiny.noisy),
            "num-speculative-tokens": 3,
            "revision": "main",
            "max_model_len": 128,
            "draft_tensor_parallel_size": 1,
            "draft_sample_method": "probabilistic",
            "rejection_sample_method": "standard",
            "disable_padded_drafter_batch": True,
        },
    )
    assert config.draft_model_config.max_model_len == 128


DEDICATED = {"stairs_placement": "dedicated"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"stairs_overlap": "off"}, "stairs_overlap is for a draft on its own device"),
        ({"stairs_draft_node": "n"}, "add stairs_placement: dedicated, or leave it out."),
        ({"stairs_draft_resources": {"CPU": 1}}, "stairs_draft_resources is for"),
        ({"stairs_ray_address": "local"}, "stairs_ray_address is for"),
        ({**DEDICATED, "draft_sample_method": "probabilistic"}, "without the draft's probab"),
        ({**DEDICATED, "use_heterogeneous_vocab": True}, "use_heterogeneous_vocab does not"),
        ({**DEDICATED, "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size=2"),
        ({**DEDICATED, "stairs_ray_address": "127.0.0.1:1"}, "127.0.0.1:1 cannot be reached"),
        ({**DEDICATED, "stairs_ray_address": "nowhere"}, "must be HOST:PORT"),
        ({**DEDICATED, "stairs_draft_node": "elsewhere"}, "this machine only"),
        ({**DEDICATED, "stairs_draft_resources": {"fast": 1}}, "1 fast, which only a running"),
        ({**DEDICATED, "stairs_draft_resources": {"CPU": 0}}, "asks for nothing"),
        ({**DEDICATED, "stairs_draft_resources": "much"}, "must be a JSON object"),
    ],
)
def test_dedicated_errors(
    tiny: TinyModels, config: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert expected in error(tiny.target, {"model": str(tiny.noisy), **config})


def test_dedicated_stops_before_anything_is_started(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SystemExit) as ended:
        parse("--model", str(tiny.target), "--speculative-method", "stairs",
              "--speculative-model", str(tiny.noisy), "--stairs-placement", "dedicated",
              "--stairs-draft-resources", '{"CPU": 1}')  # fmt: skip
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "Ray cluster 127.0.0.1:1 cannot be reached (Connection refused)" in lines[0]


def test_dedicated(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_stairs.engine import cpu

    for variable in (cpu.BINDING, cpu.DRAFT_BINDING, "RAY_ADDRESS"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    config = build(tiny.target, {"method": "stairs", "model": str(tiny.noisy), **DEDICATED})
    assert config.stairs.placement == "dedicated"
    assert config.draft_tensor_parallel_size == 1
    assert config.stairs.draft_resources == {"CPU": float(cpu.default_draft_cores())}
    assert config.stairs_ray_address.startswith("127.0.0.1:")
    assert config.stairs_ray_gpus == []
    again = build(
        tiny.target,
        {
            "method": "stairs",
            "model": str(tiny.noisy),
            **DEDICATED,
            "stairs_draft_resources": {"CPU": 2},
            "stairs_overlap": "off",
        },
    )
    assert again.stairs_ray_address == config.stairs_ray_address
    assert again.stairs.draft_resources == {"CPU": 2.0}
    plain = build(tiny.target, {"method": "stairs", "model": str(tiny.noisy)})
    assert plain.stairs_ray_address is None
    assert plain.stairs.placement == "colocated"


def test_the_worker_gets_openmp(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_stairs.engine import cpu

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    build(tiny.target, {"method": "stairs", "model": str(tiny.noisy)})
    if cpu.find_openmp() is not None:
        assert os.environ["LD_PRELOAD"] == f"{cpu.find_openmp()}:libother.so"


def test_statistics_stay_off_where_they_are_off() -> None:
    """The plugin brings no entry point that would turn them on."""
    groups = importlib.metadata.entry_points().groups
    for group in groups:
        if group.startswith("vllm.") and group != "vllm.general_plugins":
            assert "stairs" not in importlib.metadata.entry_points(group=group).names
