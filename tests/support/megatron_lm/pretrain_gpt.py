"""A training script for Megatron-LM's ``pretrain``, as its users write them: it knows nothing of HelixPipe.

It builds a GPT in the way that each version asks for: through a model provider up to 0.18, from a
``GPTModelConfig`` since 0.19.
"""

from __future__ import annotations

import inspect
from functools import partial

import cpu_only

cpu_only.install()

import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank  # noqa: E402
from megatron.training import arguments, get_args, get_timers, pretrain  # noqa: E402
from megatron.training.utils import is_first_or_last_pipeline_stage  # noqa: E402

try:
    from megatron.training.argument_utils import core_transformer_config_from_args
except ImportError:  # 0.17
    from megatron.training.arguments import core_transformer_config_from_args

try:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
except ImportError:
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

DEFAULTS = {"tokenizer_type": "NullTokenizer"}


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def read_batch(data_iterator):
    """A micro batch as tensor-parallel ranks share it, which differs from version to version."""
    args = get_args()
    if "batch" not in inspect.signature(shared_over_tp).parameters:
        return shared_over_tp(data_iterator)
    batch = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else {}
    batch = {name: value.cuda(non_blocking=True) for name, value in batch.items() if value is not None}
    answers = {
        "batch": batch,
        "is_sft": False,
        "has_cu_seqlens": False,
        "is_hybrid_cp": False,
        "create_attention_mask_in_dataloader": args.create_attention_mask_in_dataloader,
        "broadcast_src_rank": mpu.get_tensor_model_parallel_src_rank(),
        "broadcast_group": mpu.get_tensor_model_parallel_group(),
        "cp_size": mpu.get_context_parallel_world_size(),
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "micro_batch_size": args.micro_batch_size,
        "seq_length": args.seq_length,
        "mtp_on_this_rank": False,
        "pipeline_model_parallel_size": mpu.get_pipeline_model_parallel_world_size(),
        "is_pipeline_first_stage": mpu.is_pipeline_first_stage(),
        "is_pipeline_last_stage": mpu.is_pipeline_last_stage(),
    }
    known = inspect.signature(shared_over_tp).parameters
    return shared_over_tp(**{name: value for name, value in answers.items() if name in known})


try:
    from megatron.training.utils import get_batch_on_this_tp_rank as shared_over_tp
except ImportError:  # 0.18
    from megatron.core.utils import get_batch_on_this_tp_rank as shared_over_tp


def own_part(batch):
    """What this rank of a context-parallel group has of a micro batch."""
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    more = {"is_hybrid_cp": False} if "is_hybrid_cp" in known else {}
    return get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group(), **more)


def loss_func(loss_mask, losses):
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = {}
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        batch = own_part(read_batch(data_iterator))
    timers("batch-generator").stop()
    names = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
    tokens, position_ids, attention_mask, labels, loss_mask = (batch.get(name) for name in names)
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def datasets(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )

    def is_built_here():
        return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0

    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, is_built_here, config).build()


datasets.is_distributed = True


def main():
    if not hasattr(arguments, "parse_and_validate_args"):  # 0.17
        return pretrain(datasets, model_provider, ModelType.encoder_or_decoder, forward_step,
                        args_defaults=DEFAULTS)  # fmt: skip
    args = arguments.parse_and_validate_args(args_defaults=DEFAULTS)
    from megatron.training import argument_utils

    if hasattr(argument_utils, "gpt_config_from_args"):  # 0.19
        settings = argument_utils.pretrain_cfg_container_from_args(
            args, argument_utils.gpt_config_from_args(args)
        )
        return pretrain(settings, datasets, ModelType.encoder_or_decoder, forward_step)
    settings = argument_utils.pretrain_cfg_container_from_args(args)
    return pretrain(settings, datasets, model_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
