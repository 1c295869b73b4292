"""A draft's shape, its first weights, and its files.

A draft is a model of the target's own type with fewer layers, or narrower ones. At the
target's own width its embeddings, final norm and head *are* the target's: they are never
trained, and need not be stored. What is stored then is a *delta*, the weights that training
made, and :func:`assemble` adds the rest from the target, bit for bit.

Nothing here needs vLLM; PyTorch is imported when there is work for it.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_stairs.distill.errors import DistillError
from vllm_stairs.folders import copy_tokenizer, new_file, new_folder, writing
from vllm_stairs.proposer.vocabulary import FREQUENCIES_FILE, read_frequencies, save_frequencies
from vllm_stairs.versions import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "smollm3",
)
"""Types of target (``model_type``). All are decoders whose tensors are named
``model.embed_tokens``, ``model.layers.N``, ``model.norm`` and ``lm_head``; the unit tests make
a draft of each."""

WEIGHTS_FILE = "model.safetensors"
DELTA_FILE = "delta.safetensors"
MANIFEST_FILE = "delta.json"
ASSEMBLED_FILE = "assembled.json"
"""The manifest of the delta from which a folder was assembled."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")
"""A model's folder without any of them has no tokenizer."""
MADE_BY = "distill.json"
"""In a draft's folder: how it was made."""
EXTRA_FILES = (FREQUENCIES_FILE, "README.md", MADE_BY)
"""What lies beside a draft's weights, where there is any."""
FORMATS = {"int8": 2}
"""What a delta's manifest says of its dtype; 1 is any other."""
SCALE = ".scale"
"""Of a matrix that is stored in int8: this, after its name, holds a number for each row."""

_HASHED_FILES = ("config.json", DELTA_FILE)
_LAYERS = "model.layers."
_WRITES = ("o_proj", "down_proj")
"""The parts of a layer whose outputs are added to what it was given, by most types."""
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
"""What some types do to these outputs before; a layer that has the second is of such a type."""
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_PER_LAYER = ("layer_types", "no_rope_layers")
"""Entries of a configuration that are lists with one value a layer."""
_NOT_INHERITED = ("_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version")
_HASHED_AT_ONCE = 2**24
"""Numbers; the target's embeddings may be larger than what is free."""


@dataclass(frozen=True)
class DraftShape:
    """How large a draft is. What is None follows from the target (:func:`resolve`)."""

    layers: int = 2
    from_layers: tuple[int, ...] | None = None
    """The target's layers that the draft's begin as, counted from 0; None: see :func:`spread`.
    Only at the target's own width."""
    hidden_size: int | None = None
    """None: the target's, times :attr:`width`."""
    width: float = 1.0
    """Fraction of the target's hidden size; has no meaning if the hidden size is given."""
    heads: int | None = None
    """Attention heads. None: the target's number, narrower if the draft is."""
    kv_heads: int | None = None
    """Key-value heads. None: the target's number, or all heads if the target has one for each."""
    head_dim: int | None = None
    """None: the target's if the number of heads is given; else it shrinks with the width."""
    intermediate_size: int | None = None
    """Of the MLP. None: the target's, in proportion to the hidden size."""
    tied: bool | None = None
    """Whether embeddings and head are one matrix. None: as in the target."""

    @property
    def full_width(self) -> bool:
        """Whether embeddings, final norm and head are the target's own."""
        return self.hidden_size is None and self.width == 1


PRESETS = {
    "shared-2": DraftShape(layers=2),
    "shared-3": DraftShape(layers=3),
    "shared-4": DraftShape(layers=4),
    "narrow": DraftShape(layers=4, width=0.5),
}
"""``shared-N`` trains N layers of the target's width between its own embeddings and head, which
stay as they are; ``narrow`` has half the width, so a quarter of the work in a layer and half of
it in the head, and all of it is trained and stored."""


def spread(total: int, count: int) -> tuple[int, ...]:
    """``count`` of ``total`` layers at even distances, the first and the last among them.

    The first is the one that knows embeddings, the last the one that knows what the final norm
    and the head read. For one layer it is the first, as in the layer tables of Shleifer and Rush
    (arXiv 2010.13002).
    """
    return tuple(i * (total - 1) // max(count - 1, 1) for i in range(count))


def check_supported(config: "PretrainedConfig") -> None:
    """Refuse a target of which no draft can be made.

    Raises:
        DistillError: its type is not in :data:`SUPPORTED`, it is quantized, or its layers
            differ in shape.
    """
    kind = getattr(config, "model_type", "") or "unknown"
    if kind not in SUPPORTED:
        raise DistillError(
            f"no draft can be made for a target of type {kind}; these work: {', '.join(SUPPORTED)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise DistillError("the target is quantized: give the model that it was quantized from")
    if getattr(config, "is_heterogeneous", False):
        raise DistillError("the target's layers differ in shape (per_layer_config): not supported")


def resolve(config: "PretrainedConfig", shape: DraftShape) -> DraftShape:
    """Fill in what follows from the target, and check the rest against it.

    Returns:
        a shape with every number known, except that ``hidden_size`` is None at the target's own
        width and ``from_layers`` is None at any other. Resolving it again changes nothing.

    Raises:
        DistillError: the target is not supported, or a number does not fit it.
    """
    check_supported(config)
    if not 0 < shape.width <= 1:
        raise DistillError(f"a width of {shape.width:g}: choose more than 0 and at most 1")
    for name in ("heads", "kv_heads", "head_dim", "intermediate_size"):
        value = getattr(shape, name)
        if value is not None and value < 1:
            raise DistillError(f"a draft with {name} = {value}: choose at least 1")
    hidden = shape.hidden_size
    if hidden is None:
        hidden = round(config.hidden_size * shape.width)
    if not 1 <= hidden <= config.hidden_size:
        raise DistillError(
            f"a hidden size of {hidden}: the target has {config.hidden_size}, "
            f"so choose 1 to {config.hidden_size}"
        )
    full_width = hidden == config.hidden_size
    heads, kv_heads, head_dim = _attention(config, shape, hidden)
    return DraftShape(
        layers=shape.layers,
        from_layers=_from_layers(config.num_hidden_layers, shape, full_width),
        hidden_size=None if full_width else hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=shape.intermediate_size
        or max(1, round(config.intermediate_size * hidden / config.hidden_size)),
        tied=_tied(config, shape, full_width),
    )


def shape_of(folder: Path, target_dir: Path, config: "PretrainedConfig") -> DraftShape:
    """The shape of a draft that a training is to go on with, resolved.

    Args:
        folder: of the draft.
        target_dir: the target's folder.
        config: the target's.

    Raises:
        DistillError: no whole model is there, or it is no draft for this target.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DistillError(f"no draft in {str(folder)!r}: config.json is not readable") from error
    try:
        made = json.loads((folder / MADE_BY).read_text())["shape"]["from_layers"]
    except (OSError, ValueError, LookupError, TypeError):
        made = None
    no_draft = f"{str(folder)!r} is no draft for this target:"
    try:
        for what, theirs, ours in (
            ("type", config.model_type, values["model_type"]),
            ("vocabulary", config.vocab_size, values["vocab_size"]),
        ):
            if theirs != ours:
                raise DistillError(f"{no_draft} its {what} is {ours}, the target's {theirs}")
        layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
        full_width = values["hidden_size"] == config.hidden_size
        shape = DraftShape(
            layers=layers,
            from_layers=tuple(made) if full_width and made and len(made) == layers else None,
            hidden_size=values["hidden_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim"),
            intermediate_size=values["intermediate_size"],
            tied=values.get("tie_word_embeddings"),
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise DistillError(f"no draft in {str(folder)!r}: its config.json lacks {error}") from None
    shape = resolve(config, shape)
    _check_begun(folder, target_dir, draft_config(config, shape), values, shape)
    return shape


def grown(
    shape: DraftShape,
    config: "PretrainedConfig",
    *,
    layers: int | None = None,
    from_layers: Sequence[int] | None = None,
) -> DraftShape:
    """The shape of a draft that gets more layers, see :func:`begin_as`; resolved.

    Args:
        shape: what it has, resolved.
        config: the target's.
        layers: how many it is to have; None: as ``from_layers`` says.
        from_layers: layers of the target that all of its are to begin as, those that it began as
            among them; None: the ones nearest to either end are added, of which a draft learns
            the most.

    Raises:
        DistillError: the draft is narrower than the target, has as many layers already, or the
            layers that it began as are missing.
    """
    own = shape.from_layers
    if own is None:
        raise DistillError("only a draft of the target's own width can be given more layers")
    total = config.num_hidden_layers
    if from_layers is None:
        wanted = shape.layers if layers is None else layers
        if wanted < shape.layers:
            raise DistillError(f"the draft to begin with has {shape.layers} layers, not {wanted}")
        others = [layer for layer in range(total) if layer not in own]
        others.sort(key=lambda layer: (min(layer, total - 1 - layer), layer))
        from_layers = sorted([*own, *others[: wanted - shape.layers]])
    if not set(own) <= set(from_layers):
        raise DistillError(
            f"the draft to begin with was made of the target's layers {', '.join(map(str, own))}: "
            "all of them must be among the layers that are chosen"
        )
    chosen = tuple(from_layers)
    count = len(chosen) if layers is None else layers
    return resolve(config, replace(shape, layers=count, from_layers=chosen))


def _check_begun(
    folder: Path,
    target_dir: Path,
    config: "PretrainedConfig",
    values: Mapping[str, Any],
    shape: DraftShape,
) -> None:
    """Refuse a draft that is not what ``build`` would make, its trained weights apart.

    Args:
        folder: of the draft.
        target_dir: the target's folder.
        config: of the draft that would be made.
        values: the configuration of the one that is there.
        shape: of both.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    no_draft = f"{str(folder)!r} is no draft for this target:"
    for name in _PER_LAYER:
        if name in values and values[name] != getattr(config, name, None):
            raise DistillError(f"{no_draft} its {name} are {values[name]}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    frozen = frozen_names(model, shape)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
            there = set(opened.keys())
            for name, parameter in model.named_parameters():
                found = opened.get_slice(name).get_shape() if name in there else None
                if found != list(parameter.shape):
                    raise DistillError(f"{no_draft} {name} is {found}, not {list(parameter.shape)}")
            theirs = fingerprint({name: opened.get_tensor(name) for name in frozen})
    except (SafetensorError, OSError) as error:
        raise DistillError(
            f"no draft in {str(folder)!r}: {WEIGHTS_FILE} is missing or damaged"
        ) from error
    if frozen and theirs != target_fingerprint(target_dir, frozen):
        raise DistillError(f"{no_draft} embeddings and head are another target's")


def _from_layers(total: int, shape: DraftShape, full_width: bool) -> tuple[int, ...] | None:
    most = total - 1 if full_width else total
    if most < 1:
        raise DistillError("the target has one layer: only a narrower draft can be smaller")
    if not 1 <= shape.layers <= most:
        raise DistillError(
            f"a draft of {shape.layers} layers: the target has {total}, so choose 1 to {most}"
        )
    chosen = shape.from_layers
    if not full_width:
        if chosen is not None:
            raise DistillError(
                "a narrower draft cannot begin as layers of the target: leave out either the "
                "layers or the hidden size"
            )
        return None
    if chosen is None:
        return spread(total, shape.layers)
    listed = ", ".join(map(str, chosen))
    if len(chosen) != shape.layers:
        raise DistillError(
            f"a draft of {shape.layers} layers from {len(chosen)} of the target's ({listed}): "
            "name as many as it has"
        )
    if list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < total:
        raise DistillError(
            f"the target's layers {listed}: choose different ones, in order, from 0 to {total - 1}"
        )
    return tuple(chosen)


def _attention(config: Any, shape: DraftShape, hidden: int) -> tuple[int, int, int]:
    """Heads, key-value heads, and the size of a head."""
    target_heads = config.num_attention_heads
    target_kv_heads = getattr(config, "num_key_value_heads", None) or target_heads
    own_dim = getattr(config, "head_dim", None)  # None: the type has no such setting
    target_dim = own_dim or config.hidden_size // target_heads

    heads = target_heads if shape.heads is None else shape.heads
    if (hidden, heads) != (config.hidden_size, target_heads) and hidden % heads:
        raise DistillError(
            f"{heads} attention heads do not divide a hidden size of {hidden}: change one of them"
        )
    kv_heads = shape.kv_heads
    if kv_heads is None:
        kv_heads = heads if target_kv_heads == target_heads else target_kv_heads
    if heads % kv_heads:
        raise DistillError(
            f"{kv_heads} key-value heads do not divide {heads} attention heads: change one of them"
        )
    if own_dim is None:
        head_dim = hidden // heads
        if shape.head_dim not in (None, head_dim):
            raise DistillError(
                f"heads of {shape.head_dim}: in a model of type {config.model_type} they have "
                f"hidden size / heads = {head_dim}"
            )
    elif shape.head_dim is not None:
        head_dim = shape.head_dim
    elif shape.heads is not None:
        head_dim = target_dim
    else:
        head_dim, remainder = divmod(target_dim * hidden, config.hidden_size)
        if remainder:
            raise DistillError(
                f"a hidden size of {hidden} makes no whole heads of the target's {target_dim}: "
                "give the number of heads"
            )
    if head_dim % 2:
        raise DistillError(
            f"heads of {head_dim}: rotary embeddings need an even number; give another hidden "
            "size or number of heads"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if head_dim != target_dim and any(isinstance(value, list) for value in rope.values()):
        raise DistillError(
            f"the target's rotary embeddings are scaled for heads of {target_dim}, not of "
            f"{head_dim}: give a number of heads that keeps their size"
        )
    return heads, kv_heads, head_dim


def _tied(config: Any, shape: DraftShape, full_width: bool) -> bool:
    theirs = bool(config.tie_word_embeddings)
    if shape.tied is None or shape.tied == theirs:
        return theirs
    if full_width:
        raise DistillError(
            "at the target's own width the draft has the target's embeddings and head, which are "
            f"{'one matrix' if theirs else 'two matrices'} there: leave out the tying"
        )
    return shape.tied


def draft_config(config: "PretrainedConfig", shape: DraftShape) -> "PretrainedConfig":
    """The target's configuration with the draft's numbers; positions, rotary embeddings and
    special tokens stay.

    Raises:
        DistillError: as :func:`resolve`.
    """
    shape = resolve(config, shape)
    kept = shape.from_layers or spread(config.num_hidden_layers, shape.layers)
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_INHERITED}
    values.update(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size or config.hidden_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tied,
    )
    if getattr(config, "head_dim", None) is not None:
        values["head_dim"] = shape.head_dim
    for name in _PER_LAYER:
        if values.get(name):
            values[name] = [values[name][layer] for layer in kept]
    if values.get("max_window_layers") is not None:  # Qwen: where sliding windows begin
        values["max_window_layers"] = min(values["max_window_layers"], shape.layers)
    return type(config).from_dict(values)


def build(target: "PreTrainedModel", shape: DraftShape, *, seed: int = 0) -> "PreTrainedModel":
    """Make an untrained draft: a new model on the CPU, float32, nothing shared with the target.

    At the target's width every tensor whose shape is the target's begins as a copy: embeddings,
    final norm and head, which need no gradient, and the layers ``from_layers``. A narrower draft
    begins with the target's embeddings and head in the directions that hold most of their
    energy. All else is drawn by the type's own rule.

    Args:
        target: in the dtype it is stored in, or float32; else the copies are rounded and
            :func:`save_delta` refuses them.
        shape: is resolved here.
        seed: of what is drawn; PyTorch's own generators are left as they were.

    Raises:
        DistillError: as :func:`resolve`, or a tensor is not where its type has it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shape = resolve(target.config, shape)
    config = draft_config(target.config, shape)
    theirs = target.state_dict()
    for name in (_EMBEDDING, _HEAD):
        _tensor(theirs, name)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        draft = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    mine = draft.state_dict()
    with torch.no_grad():
        if shape.full_width:
            for name, tensor in mine.items():
                source = _tensor(theirs, _source(name, shape.from_layers or ()))
                if source.shape == tensor.shape:
                    tensor.copy_(source)
        else:
            size = config.hidden_size
            # One matrix for both begins as the head: its rows must tell the tokens apart.
            mine[_HEAD].copy_(_narrowed(theirs[_HEAD], size))
            if not shape.tied:
                mine[_EMBEDDING].copy_(_narrowed(theirs[_EMBEDDING], size))
    if target.generation_config is not None:
        draft.generation_config = copy.deepcopy(target.generation_config)
    freeze(draft, shape)
    return draft.eval()


def begin_as(
    draft: "PreTrainedModel",
    shape: DraftShape,
    trained: Mapping[str, "torch.Tensor"],
    begun: DraftShape,
) -> None:
    """Give a draft the weights of a trained one that has as many layers, or fewer.

    The layers in between add nothing yet (what they write is multiplied by zeros, all else in them
    is the target's), so that the draft begins as good as the trained one is: Net2Net's deeper net
    (Chen, Goodfellow and Shlens, arXiv 1511.05641) for residual layers. Where what they write is
    normalised, the zeros are the norm's: a norm would make much of the little that comes next.

    Args:
        draft: as :func:`build` has made it; is written into.
        shape: its, resolved.
        trained: weights of the other one.
        begun: its shape, as :func:`shape_of` says; ``shape`` is :func:`grown` from it.
    """
    import torch

    places = tuple(range(begun.layers))
    if shape.from_layers and begun.from_layers:
        places = tuple(map(shape.from_layers.index, begun.from_layers))
    tensors = {_source(name, places): tensor for name, tensor in trained.items()}
    mine = draft.state_dict()
    normalised = any(name.split(".")[-2] == _POST_NORMS[1] for name in mine)
    silenced = _POST_NORMS if normalised else _WRITES
    # Gemma multiplies with one more than the weight.
    silence = -1.0 if normalised and draft.config.model_type.startswith("gemma") else 0.0
    for name, tensor in mine.items():
        if name not in tensors:
            silent = name.split(".")[-2] in silenced
            tensors[name] = torch.full_like(tensor, silence) if silent else tensor
    draft.load_state_dict(tensors)


def _tensor(tensors: Mapping[str, "torch.Tensor"], name: str) -> "torch.Tensor":
    if name not in tensors:
        raise DistillError(f"the target has no tensor {name}: it is not what its type says")
    return tensors[name]


def _source(name: str, from_layers: tuple[int, ...]) -> str:
    """What the tensor ``name`` is called in a model in which layer ``i`` is ``from_layers[i]``."""
    if not name.startswith(_LAYERS):
        return name
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{from_layers[int(layer)]}.{rest}"


def _narrowed(matrix: "torch.Tensor", size: int) -> "torch.Tensor":
    """The rows of ``[vocabulary, hidden]`` in their ``size`` principal directions, float32."""
    import torch

    rows = matrix.float()
    _, directions = torch.linalg.eigh(rows.T @ rows)  # by rising energy
    return rows @ directions[:, -size:]


def frozen_names(draft: "PreTrainedModel", shape: DraftShape) -> list[str]:
    """The parameters that are the target's own and are not trained.

    Args:
        draft: of this shape.
        shape: as :func:`resolve` returns it.
    """
    if not shape.full_width:
        return []
    return [name for name, _ in draft.named_parameters() if not name.startswith(_LAYERS)]


def freeze(draft: "PreTrainedModel", shape: DraftShape) -> None:
    """Take the gradient from the parameters that are the target's own.

    :func:`build` has done it; a draft that was loaded from a folder needs it again.
    """
    frozen = set(frozen_names(draft, shape))
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name not in frozen)


def save(
    draft: "PreTrainedModel",
    folder: Path,
    target_dir: Path,
    *,
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write a draft as a model folder that Transformers and vLLM load: safetensors,
    configuration, and the target's tokenizer, chat template and settings of generation.

    Each file takes its place when it is whole; other files in the folder are left alone.

    Args:
        draft: on any device.
        folder: is made if it is not there.
        target_dir: the target's folder.
        dtype: to store; None: the target's.

    Raises:
        DistillError: the target has no tokenizer, or the folder cannot be written.
    """
    _check_target(target_dir)
    tensors = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    with writing(folder, DistillError):
        folder.mkdir(parents=True, exist_ok=True)
        _write_model(folder, tensors, _config_values(draft), target_dir, dtype)


def _config_values(draft: "PreTrainedModel") -> dict[str, Any]:
    values: dict[str, Any] = json.loads(draft.config.to_json_string())
    values["architectures"] = [type(draft).__name__]
    return values


def _write_model(
    folder: Path,
    tensors: Mapping[str, "torch.Tensor"],
    config: dict[str, Any],
    target_dir: Path,
    dtype: "torch.dtype | None",
) -> None:
    dtype = _stored_dtype(target_dir) if dtype is None else dtype
    config = {k: v for k, v in config.items() if k not in ("auto_map", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_tensors(folder / WEIGHTS_FILE, tensors, dtype)
    _write_json(folder / "config.json", config)
    copy_tokenizer(target_dir, folder)


def _write_tensors(file: Path, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> None:
    _write_as_they_are(file, {k: t.to("cpu", dtype).contiguous() for k, t in tensors.items()})


def _write_delta(file: Path, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> None:
    import torch

    if dtype is not torch.int8:
        _write_tensors(file, tensors, dtype)
        return
    stored = {}
    for name, tensor in tensors.items():
        values = tensor.to("cpu", torch.float32)
        if values.ndim != 2:  # Few, and the ones that everything is multiplied with.
            stored[name] = values.bfloat16()
            continue
        scale = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        stored[name] = (values / scale).round().to(torch.int8)
        stored[name + SCALE] = scale
    _write_as_they_are(file, stored)


def _write_as_they_are(file: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    from safetensors.torch import save_file

    with new_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _read_delta(file: Path) -> dict[str, "torch.Tensor"]:
    from safetensors.torch import load_file

    stored = load_file(file)
    return {
        name: tensor * stored[name + SCALE] if name + SCALE in stored else tensor
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    with new_file(file) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def fingerprint(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over names, shapes and float32 values, the same for every dtype that holds them."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for part in tensor.flatten().split(_HASHED_AT_ONCE):
            digest.update(part.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def target_fingerprint(target_dir: Path, names: Iterable[str]) -> str:
    """:func:`fingerprint` of the tensors ``names`` as the target's folder holds them.

    Raises:
        DistillError: the folder does not hold them as safetensors.
    """
    return fingerprint(_read_target(target_dir, names))


def save_delta(
    draft: "PreTrainedModel",
    folder: Path,
    *,
    target_name: str,
    target_fingerprint: str,
    dtype: "torch.dtype | None" = None,
    extras_from: Path | None = None,
) -> None:
    """Write only what the draft does not have from its target.

    Args:
        draft: what is frozen in it (:func:`freeze`) is left out.
        folder: appears whole or not at all, and replaces only what this function made.
        target_name: for the reader.
        target_fingerprint: from the function of that name, for :func:`frozen_names`.
        dtype: of the trained weights; None: bfloat16. int8 takes half of it: each row of a matrix
            in 255 steps, and a float32 number for the row.
        extras_from: a folder whose :data:`EXTRA_FILES` are copied, where it has them.

    Raises:
        DistillError: nothing is frozen, the frozen weights are not the target's, or ``folder``
            cannot be written or is something else.
    """
    import torch

    parameters = dict(draft.named_parameters())
    taken = {name: p for name, p in parameters.items() if not p.requires_grad}
    if not taken:
        raise DistillError("every weight of this draft is its own: there is nothing to leave out")
    if fingerprint(taken) != target_fingerprint:
        raise DistillError(
            f"the frozen weights of the draft are not those of {target_name}: load the target in "
            "the dtype that it is stored in, and train nothing that is frozen"
        )
    dtype = torch.bfloat16 if dtype is None else dtype
    dtype_name = str(dtype).removeprefix("torch.")
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    config = _config_values(draft)
    config.pop("dtype", None)  # the target's, when it is assembled
    with new_folder(folder, MANIFEST_FILE, DistillError) as partial:
        _write_delta(partial / DELTA_FILE, trained, dtype)
        _write_json(partial / "config.json", config)
        if extras_from is not None:
            _copy_extras(extras_from, partial)
        _write_json(
            partial / MANIFEST_FILE,
            {
                "format": FORMATS.get(dtype_name, 1),
                "target": target_name,
                "target_fingerprint": target_fingerprint,
                "from_target": sorted(taken),
                "dtype": dtype_name,
                "sha256": {name: _hash_of(partial / name) for name in _HASHED_FILES},
                "vllm_stairs": __version__,
            },
        )


def assemble(delta_dir: Path, target_dir: Path, out_dir: Path) -> None:
    """Make a draft's folder from its delta and its target.

    The folder is the one :func:`save` would have written after rounding the trained weights as
    the delta does. It appears whole or not at all, and replaces only what this function made.

    Raises:
        DistillError: a file is missing or damaged, the target is another one, or ``out_dir``
            cannot be written or is something else.
    """
    with new_folder(out_dir, ASSEMBLED_FILE, DistillError) as folder:
        assemble_into(delta_dir, target_dir, folder)


def assemble_into(delta_dir: Path, target_dir: Path, folder: Path) -> None:
    """:func:`assemble` into an empty folder of the caller's.

    Raises:
        DistillError: a file is missing or damaged, or the target is another one.
    """
    manifest = _read_manifest(delta_dir)
    _check_target(target_dir)
    taken = _read_target(target_dir, manifest["from_target"])
    if fingerprint(taken) != manifest["target_fingerprint"]:
        raise DistillError(
            f"{target_dir} is not the model that this draft was made for ({manifest['target']}): "
            "its weights differ"
        )
    tensors = {**taken, **_read_delta(delta_dir / DELTA_FILE)}
    config = json.loads((delta_dir / "config.json").read_text())
    _write_model(folder, tensors, config, target_dir, None)
    _copy_extras(delta_dir, folder)
    if (folder / FREQUENCIES_FILE).is_file():  # With the index that keeps them from the weights.
        try:
            counts = read_frequencies(folder / FREQUENCIES_FILE)
        except ValueError as error:
            raise DistillError(
                f"{delta_dir / FREQUENCIES_FILE} is damaged: copy it anew"
            ) from error
        save_frequencies(folder, counts)
    _write_json(folder / ASSEMBLED_FILE, manifest)


def _read_manifest(delta_dir: Path) -> dict[str, Any]:
    """The manifest of a delta whose files are all there and whole."""
    for name in (MANIFEST_FILE, *_HASHED_FILES):
        if not (delta_dir / name).is_file():
            raise DistillError(f"{delta_dir} is not a whole draft: {name} is missing")
    try:
        manifest: dict[str, Any] = json.loads((delta_dir / MANIFEST_FILE).read_text())
        version = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise DistillError(f"{delta_dir / MANIFEST_FILE} is damaged: copy it anew") from error
    if version not in (1, *FORMATS.values()):
        raise DistillError(
            f"{delta_dir} is of format {version}, which this version does not read: "
            "update vllm-stairs"
        )
    for name in _HASHED_FILES:
        if _hash_of(delta_dir / name) != manifest["sha256"][name]:
            raise DistillError(f"{delta_dir / name} is damaged: copy it anew")
    return manifest


def _check_target(target_dir: Path) -> None:
    if not (target_dir / "config.json").is_file():
        raise DistillError(f"the target {target_dir} is missing or incomplete: no config.json")
    if not any((target_dir / name).is_file() for name in VOCABULARY_FILES):
        raise DistillError(f"the target {target_dir} has no tokenizer (tokenizer.json)")


def _read_target(target_dir: Path, names: Iterable[str]) -> dict[str, "torch.Tensor"]:
    """Some tensors of the target, from one safetensors file or from shards."""
    from safetensors import SafetensorError, safe_open

    index = target_dir / f"{WEIGHTS_FILE}.index.json"
    if not index.is_file() and not (target_dir / WEIGHTS_FILE).is_file():
        raise DistillError(f"the target {target_dir} has no {WEIGHTS_FILE}")
    tensors = {}
    for name in names:
        try:
            file = WEIGHTS_FILE
            if index.is_file():
                file = json.loads(index.read_text())["weight_map"][name]
            with safe_open(target_dir / file, framework="pt") as opened:
                tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DistillError(f"the target {target_dir} has no readable {name}") from error
    return tensors


def _stored_dtype(target_dir: Path) -> "torch.dtype":
    """The dtype that the target's configuration states; float32 where it states none."""
    import torch

    values = json.loads((target_dir / "config.json").read_text())
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _copy_extras(source: Path, destination: Path) -> None:
    for name in EXTRA_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
