"""Every private or patched name of torch, numpy, megatron-core and flash-attn that the project depends on.

Such a name may move with any release, and nothing promises that it still means the same. Each stands here
once, with what it is used for and the release with which that was found to hold; a test looks all of them up
in the installed packages, with the arguments that are counted on. Names are put in the place of others'
through :func:`replace` only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

_TORCH, _CORE = "torch 2.13.0", "megatron-core 0.16.1"
_FLASH_2, _FLASH_3 = "flash-attn 2.7", "flash-attn 3"

FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")


class ContactPoint(NamedTuple):
    """One name of another package.

    Attributes:
        owner: ``module`` or ``module:Class`` that has it.
        name: in the owner.
        why: what depends on it.
        since: the release with which it was found.
        arguments: those that are counted on, in order; None where it is no function of Python's.
    """

    owner: str
    name: str
    why: str
    since: str
    arguments: tuple[str, ...] | None = None


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FLASH_INPUT = ("query", "key", "value", "dropout_p", "is_causal")
_OPTIMIZERS = "megatron.core.optimizer"

# Called or read.
CALLED = (
    ContactPoint(
        "torch._C", "_storage_Use_Count", "whether anybody still uses a buffer of a message", _TORCH
    ),
    ContactPoint("torch:UntypedStorage", "_cdata", "the storage, for the count above", _TORCH),
    ContactPoint("torch.cuda.memory", "_record_memory_history", "--record-memory-history", _TORCH),
    ContactPoint(
        "torch.cuda.memory", "_dump_snapshot", "--record-memory-history", _TORCH, ("filename",)
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_flash_attention_for_cpu",
        "attention with its log-sum-exp", _TORCH,
        _FLASH_INPUT,
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_flash_attention_for_cpu_backward", "its backward pass", _TORCH,
        ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"),
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_flash_attention", "attention with its log-sum-exp", _TORCH,
        _FLASH_INPUT,
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_flash_attention_backward", "its backward pass", _TORCH,
        ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_efficient_attention", "attention in fp32 on GPUs", _TORCH,
        ("query", "key", "value", "attn_bias", "compute_log_sumexp"),
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_efficient_attention_backward", "its backward pass", _TORCH,
        ("grad_out_", "query", "key", "value", "attn_bias", "out", "logsumexp"),
    ),
    ContactPoint(
        "torch.autograd:Variable", "_execution_engine", "runs a backward pass without what its caller adds",
        _TORCH,
    ),
    ContactPoint(
        "torch.autograd:Variable", "_execution_engine", "a backward pass without a look at each argument",
        _TORCH,
    ),
    ContactPoint("torch.autograd", "_profiler_enabled", "ranges only where a profiler sees them", _TORCH),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_cudnn_attention", "attention by cuDNN", _TORCH,
        ("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal",
         "return_debug_mask"),
    ),
    ContactPoint(
        "torch.ops.aten", "_scaled_dot_product_cudnn_attention_backward", "its backward pass", _TORCH,
        ("grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset", "attn_bias",
         "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
    ),
    ContactPoint(
        "torch.ops.aten", "_flash_attention_forward", "attention of packed sequences", _TORCH,
        ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
         "return_debug_mask"),
    ),
    ContactPoint(
        "torch.ops.aten", "_flash_attention_backward", "its backward pass", _TORCH,
        ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
         "dropout_p", "is_causal", "rng_state", "unused"),
    ),
    ContactPoint(
        "megatron.core.datasets.blended_megatron_dataset_builder", "_get_size_per_split_per_dataset",
        "how many samples a blend asks of each dataset", _CORE,
        ("normalized_weights", "target_size_per_split", "surplus"),
    ),
    ContactPoint(
        "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
        "_yarn_get_concentration_factor_from_config",
        "what YaRN multiplies queries and keys by", _CORE, ("config",),
    ),
    ContactPoint(
        "megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd",
        "what fused rotary positions are held against", _CORE, ("t", "freqs"),
    ),
    ContactPoint(
        "torch.distributed.distributed_c10d", "_get_default_store",
        "ranks meet there after a gradient that is not finite", _TORCH, (),
    ),
    ContactPoint(
        "torch.distributed:ProcessGroup", "_get_backend",
        "the timeout of a group, for groups beside it", _TORCH
    ),
    ContactPoint("torch.distributed:ProcessGroupGloo._Options", "_timeout", "the timeout of a group", _TORCH),
    ContactPoint(
        "torch.distributed.checkpoint.filesystem", "_write_item",
        "writes one tensor in torch's form to a file that is hashed on the way", _TORCH,
        ("transforms", "stream", "data", "write_item", "storage_key", "serialization_format"),
    ),
    ContactPoint(
        "megatron.core.transformer.transformer_layer:TransformerLayer", "_forward_mlp",
        "the second half of a layer, as a piece of a segment", _CORE, ("self", "hidden_states"),
    ),
    ContactPoint(
        "megatron.core.transformer.transformer_layer:TransformerLayer", "_forward_post_mlp",
        "the end of a layer after an MLP in slices", _CORE, ("self", "mlp_output_with_bias", "residual"),
    ),
    ContactPoint("torch.nn:Module", "_modules", "an MLP without its second product", _TORCH),
)  # fmt: skip

# Called where the package is installed.
OPTIONAL = (
    *(
        ContactPoint(
            "flash_attn.flash_attn_interface", f"_flash_attn{kind}_forward",
            "attention with its log-sum-exp", _FLASH_2, ("q", "k", "v", *lengths, "dropout_p"),
        )
        for kind, lengths in (("", ()), ("_varlen", _LENGTHS))
    ),
    *(
        ContactPoint(
            "flash_attn.flash_attn_interface", f"_flash_attn{kind}_backward", "its backward pass", _FLASH_2,
            ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *lengths, "dropout_p"),
        )
        for kind, lengths in (("", ()), ("_varlen", _LENGTHS))
    ),
    ContactPoint(
        "flash_attn_interface", "_flash_attn_forward", "attention with its log-sum-exp", _FLASH_3,
        ("q", "k", "v", "k_new", "v_new", "qv"),
    ),
    ContactPoint(
        "flash_attn_interface", "_flash_attn_backward", "its backward pass", _FLASH_3,
        ("dout", "q", "k", "v", "out", "softmax_lse", "cu_seqlens_q", "cu_seqlens_k", "sequed_q", "sequed_k",
         "max_seqlen_q", "max_seqlen_k", "dq", "dk", "dv", "softmax_scale"),
    ),
)  # fmt: skip

# Overridden in our subclasses.
OVERRIDDEN = (
    ContactPoint(
        "megatron.core.transformer.transformer_layer:TransformerLayer", "_forward_attention",
        "recomputes without attention", _CORE, ("self", "hidden_states", "attention_mask"),
    ),
    ContactPoint(
        "megatron.core.transformer.transformer_layer:TransformerLayer", "_forward_mlp",
        "runs in slices", _CORE,
        ("self", "hidden_states", "inference_context", "padding_mask"),
    ),
    ContactPoint(
        "megatron.core.models.gpt:GPTModel", "_postprocess", "losses of slices of the sequence", _CORE,
        ("self", "hidden_states", "input_ids", "position_ids", "labels"),
    ),
    ContactPoint(
        "megatron.core.models.gpt:GPTModel", "_preprocess", "positions of slices and packed samples", _CORE,
        ("self", "input_ids", "position_ids"),
    ),
    ContactPoint(
        "megatron.core.datasets.gpt_dataset:GPTDataset", "_build_document_sample_shuffle_indices",
        "one rank of every node writes the index cache", _CORE, ("self",),
    ),
    ContactPoint(
        "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy",
        "_get_save_and_finalize_callbacks", "keeps Megatron from writing what is written here", _CORE,
        ("self", "writer", "save_state_dict_ret"),
    ),
)  # fmt: skip

# Put in the place of others', by :func:`replace`.
PATCHED = (
    *(
        ContactPoint("torch", name, "without a GPU: makes tensors on the CPU", _TORCH)
        for name in (*FACTORIES, *LIKE_FACTORIES)
    ),
    ContactPoint("torch:Tensor", "to", "without a GPU: stays on the CPU", _TORCH),
    ContactPoint("torch:Tensor", "cuda", "without a GPU: stays on the CPU", _TORCH),
    ContactPoint("torch:Tensor", "type", "without a GPU: answers what Megatron's optimizer asks for", _TORCH),
    ContactPoint("torch.nn:Module", "cuda", "without a GPU: stays on the CPU", _TORCH),
    ContactPoint("torch.cuda", "current_device", "without a GPU: the CPU", _TORCH),
    ContactPoint("torch.cuda", "synchronize", "without a GPU: nothing to wait for", _TORCH),
    ContactPoint("torch.cuda", "set_device", "without a GPU: nothing to choose", _TORCH),
    ContactPoint("torch.cuda", "current_stream", "without a GPU: nothing to wait for", _TORCH),
    ContactPoint("torch.cuda", "Stream", "without a GPU: has nothing to wait for", _TORCH),
    ContactPoint("torch.cuda", "stream", "without a GPU: nothing to choose", _TORCH),
    ContactPoint("torch.cuda", "get_rng_state", "without a GPU: the CPU's generator", _TORCH),
    ContactPoint("torch.cuda", "manual_seed", "without a GPU: the CPU's generator", _TORCH),
    ContactPoint(
        "torch", "compile",
        "while megatron.core is imported: compiles when a function is first called", _TORCH
    ),
    ContactPoint("torch", "load", "while a checkpoint is read: plain data only", _TORCH),
    ContactPoint(
        "torch.distributed.checkpoint.filesystem", "pickle",
        "while a checkpoint is read: runs no code", _TORCH
    ),
    ContactPoint(
        "megatron.core.tensor_parallel.random", "_get_cuda_rng_state", "without a GPU: the CPU's generator",
        _CORE, ("device", "clone", "graph_safe"),
    ),
    ContactPoint(
        "megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "without a GPU: the CPU's generator",
        _CORE, ("new_state", "device", "graph_safe"),
    ),
    ContactPoint(
        f"{_OPTIMIZERS}.clip_grads", "clip_grad_by_total_norm_fp32",
        "without a GPU: asks for CUDA's type names",
        _CORE, ("parameters", "max_norm", "total_norm"),
    ),
    ContactPoint(
        f"{_OPTIMIZERS}.optimizer", "clip_grad_by_total_norm_fp32", "the same function under a second name",
        _CORE, ("parameters", "max_norm", "total_norm"),
    ),
    ContactPoint(
        f"{_OPTIMIZERS}.optimizer:Float16OptimizerWithFloat16Params", "__init__",
        "without a GPU: asks for CUDA's type names", _CORE,
    ),
    ContactPoint(
        f"{_OPTIMIZERS}.distrib_optimizer:DistributedOptimizer", "__init__",
        "without a GPU: asks for CUDA's type names", _CORE,
    ),
    ContactPoint(
        f"{_OPTIMIZERS}.optimizer:MegatronOptimizer", "get_grad_norm",
        "one optimizer's: stops its step where the norm is not finite", _CORE, ("self",),
    ),
    ContactPoint(
        "megatron.core.tensor_parallel:ColumnParallelLinear", "_forward_impl",
        "one layer's: leaves the weight gradient for later", _CORE, ("self", "input", "weight"),
    ),
    ContactPoint(
        "megatron.core.tensor_parallel:RowParallelLinear", "_forward_impl",
        "one layer's: leaves the weight gradient for later", _CORE, ("self", "input", "weight"),
    ),
    ContactPoint(
        "megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu",
        "without a GPU: numbers of tokens as messages take them", _CORE,
        ("tensor", "as_numpy", "record_stream"),
    ),
    ContactPoint(
        "megatron.core.transformer.moe.router:TopKRouter", "_apply_expert_bias",
        "counts the tokens of experts without the compiler", _CORE, ("self", "routing_map", "padding_mask"),
    ),
    ContactPoint(
        "megatron.core.pipeline_parallel.schedules", "get_forward_backward_func",
        "gives a schedule of ours to another program", _CORE,
    ),
    ContactPoint(
        "megatron.core.pipeline_parallel.schedules", "get_model_config",
        "stops a step that another program makes without the schedule that it asked for", _CORE,
    ),
    ContactPoint(
        "megatron.core.models.gpt:GPTModel", "__new__",
        "another program's model in segments, wherever it has the class from", _CORE,
    ),
    ContactPoint(
        "megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue",
        "keeps Megatron from starting a process that writes", _CORE,
    ),
)  # fmt: skip

# The same, where megatron-core has its training program: since 0.17.
PATCHED_IN_PROGRAM = (
    ContactPoint(
        "megatron.training.training", "build_train_valid_test_data_iterators",
        "data on every rank, for a head on every rank", "megatron-core 0.17.1",
    ),
    ContactPoint(
        "megatron.training.training", "get_model", "two model chunks on each rank", "megatron-core 0.17.1",
        ("model_provider_func",),
    ),
)  # fmt: skip

# The same, where that program builds models from configurations: since 0.18.
PATCHED_IN_BUILDERS = (
    ContactPoint(
        "megatron.training.models.dist_utils", "build_virtual_pipeline_stages",
        "two model chunks on each rank", "megatron-core 0.18.2",
        ("build_model_func", "pg_collection", "vp_size"),
    ),
)  # fmt: skip

# Read by a class of its owner, but only there where an optional package is.
MISSING = (
    ContactPoint(
        "megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction", "te_general_gemm",
        "without Transformer Engine: routers find that they do not have its product", _CORE,
    ),
)  # fmt: skip

_PATCHED = {
    *((point.owner, point.name) for point in (*PATCHED, *PATCHED_IN_PROGRAM, *PATCHED_IN_BUILDERS)),
    *((point.owner.partition(":")[0], point.name) for point in MISSING),
}


def find(owner: str) -> Any:
    """What an owner's text form names.

    Raises:
        ImportError, AttributeError: it is not there.
    """
    if owner == "torch.ops.aten":
        return importlib.import_module("torch").ops.aten
    module, _, path = owner.partition(":")
    return reduce(getattr, path.split(".") if path else [], importlib.import_module(module))


def has_module(name: str) -> bool:
    """True if there is a module of that name; imports the packages that it is in."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # one of the packages
        return False


def replace(owner: str, name: str, value: Any, *, on: Any = None) -> Callable[[], None]:
    """Put ``value`` in the place of a name of :data:`PATCHED`.

    Args:
        owner, name: of the contact point.
        value: what comes in its place.
        on: one object of the owner's, which alone is changed; None for the owner itself.

    Returns:
        A function that gives the original back.
    """
    assert (owner, name) in _PATCHED, f"{owner} {name} is no contact point"
    target = find(owner) if on is None else on
    before = vars(target)
    is_own, original = name in before, before.get(name)
    setattr(target, name, value)

    def undo() -> None:
        if is_own:
            setattr(target, name, original)
        elif name == "__new__":
            # CPython does not go back to the inherited one: it would refuse the constructor's arguments.
            setattr(target, name, lambda cls, *args, **kwargs: object.__new__(cls))
        else:
            delattr(target, name)

    return undo


def replace_everywhere(module: str, name: str, value: Any) -> Callable[[], None]:
    """Put ``value`` in the place of a function of :data:`PATCHED`, also where it was imported from there.

    Args:
        module, name: of the contact point.
        value: what comes in its place in every module that holds the function now, under whatever name; an
            object of its own, by which it is found again.

    Returns:
        A function that gives the original back.
    """
    assert (module, name) in _PATCHED, f"{module} {name} is no contact point"
    original = getattr(find(module), name)
    held = [
        (holder, alias)
        for holder in list(sys.modules.values())
        for alias, found in list(getattr(holder, "__dict__", {}).items())
        if found is original
    ]
    for holder, alias in held:
        setattr(holder, alias, value)

    def undo() -> None:
        for holder, alias in held:
            setattr(holder, alias, original)
        # Modules that came later imported what was here then.
        for holder in list(sys.modules.values()):
            for alias, found in list(getattr(holder, "__dict__", {}).items()):
                if found is value:
                    setattr(holder, alias, original)

    return undo
