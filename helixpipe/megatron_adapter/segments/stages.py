"""Stages of Megatron's own model as the segments of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config

from helixpipe.layers.experts import unsupported_experts
from helixpipe.megatron_adapter.forward_step import IterationInput, IterationResult
from helixpipe.plan import Plan
from helixpipe.refusals import refuse
from helixpipe.runtime.context_lending import ContextLending
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class StageSegments:
    """The computation behind a stage-based plan: one GPTModel chunk per segment, run by its forward step.

    Args:
        chunks: the model chunks of this rank as the training loop knows them, wrapped or not, by stage.
        plan: its segments on ``rank`` are those chunks, in ascending order.
        rank: this pipeline rank.
        seq_length, micro_batch_size: sizes of every micro batch.
        dtype: of activations.
        weight_gradients: where the chunks leave their weight gradients in plans with W.

    Raises:
        ValueError: an option that would be ignored or wrong under a plan.
    """

    lending: WeightLending | None = None  # every stage computes where its weights are
    contexts: ContextLending | None = None  # and where the keys and values are that it reads
    has_shared_weights = False  # not between segments: a tied head is a copy, or in the embedding's own stage

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        plan: Plan,
        rank: int,
        seq_length: int,
        micro_batch_size: int,
        dtype: torch.dtype,
        weight_gradients: DeferredWeightGradients,
    ) -> None:
        self.config = get_model_config(chunks[0])
        check_supported(self.config, plan.schedule)
        self.result = IterationResult()
        self.weight_gradients = weight_gradients
        self._chunks = chunks
        own = [segment for segment in range(plan.num_segments) if plan.owner_of(segment) == rank]
        if len(own) != len(chunks):
            raise ValueError(
                f"the plan has {len(own)} stages on rank {rank}, the model has {len(chunks)} chunks"
            )
        self._index = {segment: index for index, segment in enumerate(own)}
        self._last = plan.num_segments - 1
        length = seq_length // self.config.context_parallel_size
        if self.config.sequence_parallel:
            length //= self.config.tensor_model_parallel_size
        shape = torch.Size((length, micro_batch_size, self.config.hidden_size))
        self._layout = MessageLayout((shape,), dtype)
        self._input: IterationInput | None = None

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        self._input = iteration
        self.result = IterationResult()

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights."""
        return self._index[segment]

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`: the hidden state [s, b, h].

        Context parallelism, and with it sequence parallelism, share s out.
        """
        return self._layout

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`; the same steps as in Megatron's schedules."""
        assert self._input is not None
        index = self._index[segment]
        is_last = segment == self._last
        output, num_tokens = forward_step(
            self._input.forward_step_func,
            self._input.data_iterators[index],
            self._chunks[index],
            self._input.num_microbatches,
            inputs[0] if inputs else None,
            self.result.loss_data,
            self.config,
            cp_group_size=self.config.context_parallel_size,
            collect_non_loss_data=self._input.collect_non_loss_data,
            is_first_microbatch=micro_batch == 0,
            current_microbatch=micro_batch,
            is_last_stage=is_last,
        )
        if not is_last:
            return (output,)
        self.result.add_tokens(num_tokens)
        return (self._input.loss_to_differentiate(output, self.config),)

    def finish(self) -> None:
        """Nothing is kept over iterations."""


def check_supported(config: TransformerConfig, schedule: str) -> None:
    """``ValueError`` for options that a plan of stages would ignore or get wrong."""
    unsupported = {
        **unsupported_experts(config),
        "multi-latent attention": config.multi_latent_attention,
        "multi-token prediction": bool(config.mtp_num_layers),
        "virtual pipeline stages": config.virtual_pipeline_model_parallel_size is not None,
        "recomputation of some micro batches only": bool(
            config.num_microbatches_with_partial_activation_checkpoints
        ),
        "variable sequence lengths": config.variable_seq_lengths,
        "fp8 or fp4": bool(config.fp8 or config.fp4),
        "CPU offloading": config.cpu_offloading or config.fine_grained_activation_offloading,
        "CUDA graphs": config.cuda_graph_impl != "none",
    }
    refuse(unsupported, f"the {schedule} schedule does not support {{}}; leave it out or use 1f1b")
