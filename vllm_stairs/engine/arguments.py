"""Flags and ``speculative_config`` -> a checked :class:`StairsSpeculativeConfig`.

Everything a user can get wrong is found here, before any process is started, and said in one
sentence: what is wrong and what would be right.
"""

import argparse
import importlib.metadata
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError

from vllm_stairs.config import (
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    DRAFT_SUFFIX,
    MAX_NUM_SPECULATIVE_TOKENS,
    METHOD,
    OPTION_PREFIX,
    StairsOptions,
    option_names,
    parse_options,
)
from vllm_stairs.proposer.vocabulary import (
    FREQUENCIES_FILE,
    LARGEST_SHARE,
    DraftVocabulary,
    check_index,
    choose_vocabulary,
    read_frequencies,
)

_CPU_WORKER = "vllm_stairs.engine.worker.StairsCPUWorker"
_GPU_WORKER = "vllm_stairs.engine.worker.StairsGPUWorker"

# Arguments that came from a command line, where an error is one line and no traceback. Not an
# attribute: vLLM makes copies with ``EngineArgs(**vars(engine_args))``.
_from_command_line: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

# The keys of vLLM's speculative_config that mean something to a draft model here. Keys of other
# methods, keys that vLLM fills in itself, and keys of releases that this one was not read with stop
# at start-up instead of being ignored.
_KEYS = frozenset(
    {
        "method",
        "model",
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "max_model_len",
        "revision",
        "code_revision",
        "quantization",
        "kv_cache_dtype",
        "attention_backend",
        "moe_backend",
        "enforce_eager",
        "draft_load_config",
        "draft_tensor_parallel_size",
        "draft_sample_method",
        "rejection_sample_method",
        "synthetic_acceptance_rates",
        "synthetic_acceptance_length",
        "use_heterogeneous_vocab",
        "disable_padded_drafter_batch",
    }
)


# --------------------------------------------------------------------------- hooks


def add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    """Add the flags of the method to vLLM's parser (wraps ``EngineArgs.add_cli_args``)."""
    parser = original(parser)
    for action in parser._actions:
        if "--spec-method" in action.option_strings and action.choices is not None:
            action.choices = [*action.choices, METHOD]
            method_choices = action.choices
            break
    else:
        method_choices = None
    group = parser.add_argument_group(
        title="stairs",
        description="Stairs speculative decoding (plugin vllm-stairs): "
        "--speculative-method stairs --speculative-model DRAFT.",
    )
    group.add_argument(
        "--speculative-method",
        dest="spec_method",
        choices=method_choices,
        metavar="METHOD",
        help=f"Same as --spec-method. {METHOD!r}: this plugin.",
    )
    group.add_argument(
        "--speculative-model",
        dest="spec_model",
        metavar="PATH_OR_ID",
        help="Same as --spec-model: the draft. With --speculative-method stairs and no draft "
        f"named, TARGET{DRAFT_SUFFIX} is used if it lies beside the target.",
    )
    group.add_argument(
        "--num-speculative-tokens",
        dest="spec_tokens",
        type=int,
        metavar="K",
        help="Same as --spec-tokens. For stairs the largest height of a staircase; "
        f"default {DEFAULT_NUM_SPECULATIVE_TOKENS}.",
    )
    for name, field in StairsOptions.model_fields.items():
        is_choice = get_origin(field.annotation) is Literal
        group.add_argument(
            "--" + (OPTION_PREFIX + name).replace("_", "-"),
            dest=OPTION_PREFIX + name,
            choices=get_args(field.annotation) if is_choice else None,
            default=None,
            help=f"{field.description} Default: {field.default}.",
        )
    return parser


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Carry the flags over (wraps ``EngineArgs.from_cli_args``, which keeps its own only)."""
    options = {
        name: value
        for name, value in vars(args).items()
        if name.startswith(OPTION_PREFIX) and value is not None
    }
    if options:
        given = {k.replace("-", "_"): v for k, v in (args.speculative_config or {}).items()}
        twice = sorted(options.keys() & given.keys())
        if twice:
            _exit(
                f"--{twice[0].replace('_', '-')} and --speculative-config['{twice[0]}'] "
                "are mutually exclusive."
            )
        args.speculative_config = {**given, **options}
    engine_args = original(cls, args)
    _from_command_line[id(engine_args)] = engine_args
    return engine_args


def create_speculative_config(
    original: Callable[..., Any],
    engine_args: Any,
    target_model_config: Any,
    target_parallel_config: Any,
) -> Any:
    """Build our configuration (wraps ``EngineArgs.create_speculative_config``)."""
    config = engine_args.speculative_config or {}
    method = engine_args.spec_method or (
        config.get("method") if isinstance(config, Mapping) else None
    )
    if method != METHOD:
        stray = sorted(key for key in config if key.replace("-", "_").startswith(OPTION_PREFIX))
        if not stray:
            return original(engine_args, target_model_config, target_parallel_config)
    try:
        if method != METHOD:
            raise ValueError(
                f"{stray[0]} belongs to the speculative method 'stairs', but the method is "
                f'{method!r}: add --speculative-method stairs (or "method": "stairs").'
            )
        return build(engine_args, target_model_config, target_parallel_config)
    except ValueError as error:
        if _from_command_line.get(id(engine_args)) is engine_args:
            _exit(str(error))
        raise


def _exit(message: str) -> NoReturn:
    """End a command the way its own parser does: one line, status 2, no traceback."""
    print(f"vllm: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------- build


def build(engine_args: Any, target: Any, parallel: Any) -> Any:
    """Check everything and build the configuration.

    Args:
        engine_args: vLLM's ``EngineArgs``.
        target: the target's ``ModelConfig``.
        parallel: the target's ``ParallelConfig``; its worker class is set to ours.

    Raises:
        ValueError: one sentence for the user.
    """
    from vllm.platforms import current_platform

    from vllm_stairs.engine import contract, deployment, frontend, metrics

    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise ValueError(
            "The speculative method 'stairs' runs on CPU, CUDA and ROCm; this platform is "
            f"{current_platform.device_name}: serve without stairs."
        )
    contract.require()
    values = _merge_flags(engine_args)
    options = parse_options(
        {key: values.pop(key) for key in list(values) if key.startswith(OPTION_PREFIX)}
    )
    _check_record(options)
    _check_engine(engine_args, target, parallel)
    _check_keys(values)
    _check_dedicated(options, values)
    options = _settle_placement(options, values, parallel.tensor_parallel_size)
    values["num_speculative_tokens"] = _check_height(engine_args, target, values)
    values["model"] = _find_draft(values.get("model"), target)
    _check_table(values)
    _check_tokenizer(target, values)

    config = _construct(
        {
            **values,
            "method": "draft_model",
            "stairs": options,
            "stairs_counters_file": metrics.create_counters_file(values["num_speculative_tokens"]),
            "target_model_config": target,
            "target_parallel_config": parallel,
        }
    )

    config.stairs_vocabulary = _choose_draft_vocabulary(options.draft_vocab, config, target)
    bundle = deployment.draft_bundle(options) if options.placement == "dedicated" else None

    if current_platform.is_cpu():
        from vllm_stairs.engine import cpu

        parallel.worker_cls = _CPU_WORKER
        cpu.preload_openmp()
        binding = cpu.bind_threads(
            parallel.tensor_parallel_size,
            deployment.cores_beside_the_target(bundle) if bundle else 0,
            processes=not cpu.in_process(),
        )
        if binding is not None:
            _logger().info(
                "Stairs binds the workers' threads to cores %s (one worker to a bar); with %s set "
                "it leaves that to you.",
                binding,
                cpu.BINDING,
            )
    else:
        parallel.worker_cls = _GPU_WORKER
        # The official switch; vLLM's processes inherit it.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if engine_args.async_scheduling is None:
            engine_args.async_scheduling = False
        _logger().warning(
            "Stairs on %s runs in vLLM's V1 model runner, without asynchronous scheduling and "
            "with piecewise CUDA graphs; plain vLLM has the V2 model runner, asynchronous "
            "scheduling and full graphs there.",
            current_platform.device_name,
        )
    # Of several API servers the parent alone starts the engine.
    if bundle is not None and (parallel._api_process_count == 1 or parallel._api_process_rank < 0):
        deployment.place(config, bundle, parallel)
    if _has_worker_processes(parallel):
        from vllm_stairs.engine.executor import StairsMultiprocExecutor

        parallel.distributed_executor_backend = StairsMultiprocExecutor
    frontend.install()
    return config


def _has_worker_processes(parallel: Any) -> bool:
    """Whether vLLM will take its executor for worker processes; on CPU that comes later."""
    from vllm.platforms import current_platform

    from vllm_stairs.engine.cpu import in_process

    backend = parallel.distributed_executor_backend
    return backend == "mp" or (backend == "uni" and current_platform.is_cpu() and not in_process())


def _logger() -> Any:
    from vllm.logger import init_logger

    # vLLM configures loggers below "vllm" only.
    return init_logger("vllm.stairs.arguments")


def _merge_flags(engine_args: Any) -> dict[str, Any]:
    values = {k.replace("-", "_"): v for k, v in (engine_args.speculative_config or {}).items()}
    for flag, key, value in (
        ("--spec-method/--speculative-method", "method", engine_args.spec_method),
        ("--spec-model/--speculative-model", "model", engine_args.spec_model),
        (
            "--spec-tokens/--num-speculative-tokens",
            "num_speculative_tokens",
            engine_args.spec_tokens,
        ),
    ):
        if value is None:
            continue
        if values.get(key) is not None:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive.")
        values[key] = value
    return values


def _check_engine(engine_args: Any, target: Any, parallel: Any) -> None:
    """What the engine around the method must not be."""
    unsupported = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "data parallelism (--data-parallel-size); run one server per replica instead": (
            parallel.data_parallel_size > 1
        ),
        "context parallelism (--decode-context-parallel-size, --prefill-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "LoRA adapters (--enable-lora)": engine_args.enable_lora,
        "sleep mode (--enable-sleep-mode)": engine_args.enable_sleep_mode,
        "KV transfer (--kv-transfer-config)": engine_args.kv_transfer_config is not None,
        "custom logits processors (--logits-processors)": bool(target.logits_processors),
        "logits processors of installed packages (entry points vllm.logits_processors)": bool(
            importlib.metadata.entry_points(group="vllm.logits_processors")
        ),
    }
    for feature, asked_for in unsupported.items():
        if asked_for:
            raise ValueError(
                f"The speculative method 'stairs' does not work with {feature} yet: "
                "leave one of the two out."
            )
    if target.runner_type != "generate" or target.is_encoder_decoder:
        raise ValueError(
            "The speculative method 'stairs' needs a target that generates text and is "
            f"decoder-only; {target.model} is not (for encoder-decoder models see "
            "vllm_stairs.hf)."
        )
    if target.is_multimodal_model:
        raise ValueError(
            f"The speculative method 'stairs' takes text-only targets; {target.model} is "
            "multimodal: serve it without stairs, or with --language-model-only."
        )
    if target.is_hybrid or target.is_attention_free:
        raise ValueError(
            "The speculative method 'stairs' needs a target whose layers all keep a paged KV "
            f"cache; {target.model} has recurrent layers: serve it without stairs."
        )
    if parallel.worker_cls != "auto":
        raise ValueError(
            f"--worker-cls {parallel.worker_cls} cannot be combined with the speculative method "
            "'stairs', which brings its own worker: leave --worker-cls out."
        )
    if engine_args.async_scheduling:
        raise ValueError(
            "The speculative method 'stairs' needs synchronous scheduling: leave "
            "--async-scheduling out (stairs turns it off)."
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise ValueError(
            "The speculative method 'stairs' runs in vLLM's V1 model runner: unset "
            "VLLM_USE_V2_MODEL_RUNNER."
        )


def _check_keys(values: Mapping[str, Any]) -> None:
    """The other keys of vLLM's ``speculative_config``: each works or stops here."""
    from vllm.platforms import current_platform

    if values.get("parallel_drafting"):
        raise ValueError(
            "parallel_drafting needs a draft that was trained for it; 'stairs' writes its drafts "
            "token by token: leave it out."
        )
    for key, value in values.items():
        if key not in _KEYS and value is not None and value is not False:
            raise ValueError(
                f"speculative_config key {key!r} is not one that the method 'stairs' knows: leave "
                f"it out, or use {', '.join(sorted(_KEYS))} or {', '.join(option_names())}."
            )
    rejection = values.get("rejection_sample_method")
    if rejection not in (None, "standard", "synthetic"):
        raise ValueError(
            f"rejection_sample_method={rejection!r}: 'stairs' takes 'standard' (default) or "
            "'synthetic'."
        )
    if rejection == "synthetic" and current_platform.is_cpu():
        raise ValueError(
            "rejection_sample_method='synthetic' does not exist in vLLM's CPU build: leave it out."
        )


def _settle_placement(
    options: StairsOptions, values: dict[str, Any], tensor_parallel_size: int
) -> StairsOptions:
    """Bring ``stairs_placement`` and vLLM's ``draft_tensor_parallel_size`` together.

    Args:
        options: as given.
        values: the other keys; get the draft's size.
        tensor_parallel_size: of the target.

    Returns:
        Options with the placement that it will be: without tensor parallelism there is one.
    """
    key = "draft_tensor_parallel_size"
    sizes = {"colocated": tensor_parallel_size, "replicated": 1, "dedicated": 1}
    size = values.get(key)
    if size is None:
        size = sizes[options.placement]
    elif size not in sizes.values():
        whole = "" if tensor_parallel_size == 1 else "1 (the whole draft on every rank) or "
        raise ValueError(
            f"{key}={size!r}: the draft runs sharded as the target is, or whole on every rank: "
            f"leave it out or set it to {whole}{tensor_parallel_size}."
        )
    elif "placement" in options.model_fields_set and size != sizes[options.placement]:
        raise ValueError(
            f"{key}={size} does not go with stairs_placement={options.placement}, which is "
            f"{sizes[options.placement]}: leave one of the two out."
        )
    values[key] = size
    if options.placement == "dedicated":
        return options
    replicated = size < tensor_parallel_size
    return options.model_copy(update={"placement": "replicated" if replicated else "colocated"})


def _check_dedicated(options: StairsOptions, values: Mapping[str, Any]) -> None:
    """What a draft on its own device cannot do, and what others cannot."""
    if options.placement != "dedicated":
        for name in ("overlap", "draft_node", "draft_resources", "ray_address"):
            if name in options.model_fields_set and getattr(options, name) is not None:
                raise ValueError(
                    f"stairs_{name} is for a draft on its own device: add stairs_placement: "
                    "dedicated, or leave it out."
                )
        return
    if values.get("draft_sample_method") == "probabilistic":
        raise ValueError(
            "draft_sample_method='probabilistic' does not work with stairs_placement=dedicated, "
            "whose drafts come without the draft's probabilities: leave one of the two out."
        )
    if values.get("use_heterogeneous_vocab"):
        raise ValueError(
            "use_heterogeneous_vocab does not work with stairs_placement=dedicated yet: leave one "
            "of the two out."
        )


def _check_record(options: StairsOptions) -> None:
    if options.record is None:
        return
    try:
        with open(options.record, "a"):
            pass
    except OSError as error:
        raise ValueError(
            f"stairs_record={options.record!r} cannot be written: {error.strerror}."
        ) from None


def _check_height(engine_args: Any, target: Any, values: Mapping[str, Any]) -> int:
    height = values.get("num_speculative_tokens")
    if height is None:
        height = DEFAULT_NUM_SPECULATIVE_TOKENS
    # A step of one request is its newest token and its drafts, and yields one token more.
    largest = min(MAX_NUM_SPECULATIVE_TOKENS, target.max_model_len - 2)
    if engine_args.max_num_batched_tokens is not None:
        largest = min(largest, engine_args.max_num_batched_tokens - 2)
    if largest < 1:
        raise ValueError(
            f"max_model_len={target.max_model_len} and max_num_batched_tokens="
            f"{engine_args.max_num_batched_tokens} leave no room for a single draft: raise them."
        )
    if isinstance(height, bool) or not isinstance(height, int) or not 1 <= height <= largest:
        raise ValueError(
            f"num_speculative_tokens={height!r}: must be a whole number from 1 to {largest} "
            f"(max_model_len {target.max_model_len}, max_num_batched_tokens "
            f"{engine_args.max_num_batched_tokens or 'by default'})."
        )
    return height


def _check_table(values: dict[str, Any]) -> None:
    """vLLM's table of heights by batch size is a ceiling; without one, set one that says K.

    With a table vLLM takes heights as they come. Without one it pads a request that enters the
    batch with a single token left to compute by K rows that are rejected anyway, to keep full
    graphs uniform, which ragged heights are not.
    """
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    key = "num_speculative_tokens_per_batch_size"
    if values.get(key) is None:
        values[key] = [(1, 1, values["num_speculative_tokens"])]
    else:
        validate_and_normalize_dynamic_sd_schedule(values[key])


def _find_draft(model: str | None, target: Any) -> str:
    """The draft that was named, or the one that lies beside the target."""
    beside = str(target.model).rstrip("/") + DRAFT_SUFFIX
    if model is None:
        if _is_model_folder(beside):
            return beside
        raise ValueError(
            "The speculative method 'stairs' needs a draft: name one (--speculative-model "
            f"PATH_OR_ID), put one at {beside}, or name the target itself ({target.model}) to "
            "try the machinery."
        )
    if _is_model_folder(model):
        return model
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if Path(model).exists():
        raise ValueError(f"Draft model {model}: there is no config.json in it.")
    if looks_like_path:
        raise ValueError(f"Draft model {model}: there is no such folder.")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES"):
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            raise ValueError(
                f"Draft model {model}: no such folder, and as a Hugging Face id it is not in the "
                "local cache while HF_HUB_OFFLINE is set."
            )
    return model


def _is_model_folder(path: str) -> bool:
    return (Path(path) / "config.json").is_file()


def _check_tokenizer(target: Any, values: Mapping[str, Any]) -> None:
    """Draft and target must mean the same by an id."""
    draft = values["model"]
    if values.get("use_heterogeneous_vocab") or draft == target.model or target.skip_tokenizer_init:
        return
    target_file, draft_file = (Path(path) / "tokenizer.json" for path in (target.tokenizer, draft))
    both_exist = target_file.is_file() and draft_file.is_file()
    if both_exist and target_file.read_bytes() == draft_file.read_bytes():
        return
    from vllm.tokenizers import get_tokenizer

    try:
        draft_vocab = get_tokenizer(
            draft, trust_remote_code=target.trust_remote_code, revision=values.get("revision")
        ).get_vocab()
    except Exception as error:
        _logger().warning(
            "Draft model %s has no tokenizer that could be loaded (%s); it is taken to share the "
            "target's.",
            draft,
            type(error).__name__,
        )
        return
    target_vocab = get_tokenizer(
        target.tokenizer,
        trust_remote_code=target.trust_remote_code,
        revision=target.tokenizer_revision,
    ).get_vocab()
    if draft_vocab != target_vocab:
        different = sum(draft_vocab.get(token) != id_ for token, id_ in target_vocab.items())
        raise ValueError(
            f"Draft model {draft} has another tokenizer than the target {target.model} "
            f"({different} of {len(target_vocab)} tokens differ): choose a draft of the target's "
            "family, or set use_heterogeneous_vocab."
        )


def _choose_draft_vocabulary(value: str | int, config: Any, target: Any) -> DraftVocabulary | None:
    """The ids that the draft may write, None for all.

    Args:
        value: the option ``stairs_draft_vocab``.
        config: the configuration, complete but for this.
        target: the target's ``ModelConfig``.
    """
    draft = config.draft_model_config
    if config.use_heterogeneous_vocab:
        if value not in ("auto", "full"):
            raise ValueError(
                f"stairs_draft_vocab={value} does not work with use_heterogeneous_vocab, which "
                "limits the draft to the ids that both tokenizers have: leave one of the two out."
            )
        return None
    check_index(Path(draft.model))
    if value == "full":
        return None
    file = _find_frequencies(draft)
    if value == "auto" and file is None:
        return None
    vocab_size = min(draft.get_vocab_size(), target.get_vocab_size())
    counts = None if file is None else read_frequencies(file)
    chosen = choose_vocabulary(value, counts, vocab_size, _indispensable_ids(target))
    if chosen is None:
        _logger().info(
            "Stairs: the draft's output head stays whole: more than %d %% of its ids would be "
            "kept. --stairs-draft-vocab takes a number of ids.",
            100 * LARGEST_SHARE,
        )
    return chosen


def _find_frequencies(draft: Any) -> Path | None:
    """The token frequencies that came with a draft: in its folder, or on the Hugging Face hub."""
    if Path(draft.model).is_dir():
        file = Path(draft.model) / FREQUENCIES_FILE
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(draft.model, FREQUENCIES_FILE, revision=draft.revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def _indispensable_ids(target: Any) -> set[int]:
    """What a draft should always be able to write: the ends of texts, and special tokens.

    Chat templates and tools mark their turns with the latter, which a list of ids made from plain
    text would lack.
    """
    ends = [
        target.try_get_generation_config().get("eos_token_id"),
        getattr(target.hf_text_config, "eos_token_id", None),
    ]
    ids = {id_ for end in ends for id_ in (end if isinstance(end, list) else [end])}
    if not target.skip_tokenizer_init:
        from vllm.tokenizers import get_tokenizer

        tokenizer = get_tokenizer(
            target.tokenizer,
            trust_remote_code=target.trust_remote_code,
            revision=target.tokenizer_revision,
        )
        ids.update(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids.update(id_ for id_, token in added.items() if token.special)
    return {id_ for id_ in ids if isinstance(id_, int)}


def _construct(values: dict[str, Any]) -> Any:
    from vllm_stairs.engine.speculative import StairsSpeculativeConfig

    try:
        config = StairsSpeculativeConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"speculative_config{'.' + where if where else ''}: {message}") from None
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"Draft model {values['model']}: {first_line}") from None
    if config.method != "draft_model":
        raise ValueError(
            f"Draft model {values['model']}: vLLM takes it for a draft of the method "
            f"{config.method!r}, by its name or its model_type; 'stairs' needs an ordinary "
            "language model (in a folder whose path does not name another method)."
        )
    return config
