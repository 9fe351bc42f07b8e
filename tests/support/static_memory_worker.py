"""What Megatron itself holds on every rank of a layout: weights, gradients and optimizer states, as JSON.

One process stands for one rank after the other: its groups have the layout's sizes and transport nothing.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from helixpipe.megatron_adapter import cpu_backend  # noqa: E402

cpu_backend.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402


def held(rank: int, layout: dict[str, int], *, tied: bool, distributed: bool) -> dict[str, int]:
    """Weights of matrices, other weights, and bytes of each kind on one rank."""
    t, p, d = (layout[name] for name in ("tensor", "pipeline", "data"))
    dist.init_process_group("fake", rank=rank, world_size=t * p * d, store=FakeStore())
    parallel_state.initialize_model_parallel(t, p, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=160,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        tensor_model_parallel_size=t, pipeline_model_parallel_size=p,
        pipeline_dtype=torch.bfloat16, bf16=True, params_dtype=torch.bfloat16, use_cpu_initialization=True,
        bias_dropout_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=512,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    wrapped = DistributedDataParallel(config, ddp_config, Float16Module(config, model))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, use_distributed_optimizer=distributed),
        [wrapped],
        use_gloo_process_groups=False,
    )
    weights = list(model.parameters())
    matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    masters = [
        tensor for each in optimizer.chained_optimizers for group in each.optimizer.param_groups
        for tensor in group["params"]
    ]  # fmt: skip
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    found = {
        "matrices": matrices,
        "others": sum(weight.numel() for weight in weights) - matrices,
        "weight_bytes": sum(weight.nbytes for weight in weights),
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        # Adam has two moments of its master weights.
        "state_bytes": sum(3 * master.nbytes for master in masters),
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    results = []
    for case in cases:
        layout = case["layout"]
        world = layout["tensor"] * layout["pipeline"] * layout["data"]
        # Ranks of one stage hold as much as each other: the first of each.
        firsts = range(0, world, layout["tensor"] * layout["data"])
        results.append([held(r, layout, tied=case["tied"], distributed=case["distributed"]) for r in firsts])
    print(json.dumps(results))
