"""A stage of Megatron's model over the chunks of one batch, as a segment of its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.elastic.recipe import Recipe
from helixpipe.layers.elastic.layout import ChunkLayout, padded_length, spans_of
from helixpipe.layers.elastic.model import ChunkRun, ElasticGPTModel
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.forward_step import IterationInput, IterationResult
from helixpipe.plan import Plan
from helixpipe.plan.stage_layers import layers_of_stages
from helixpipe.runtime.context_lending import ContextLending
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class ElasticSegments:
    """The computation behind an elastic plan, for one batch.

    Args:
        model: this rank's stage as the training loop knows it, wrapped or not.
        batch: what it is to compute.
        plan: of the batch.
        dtype: of messages.

    Raises:
        ValueError: a plan that is not for this model.
    """

    lending: WeightLending | None = None  # every stage computes where its weights are
    contexts: ContextLending | None = None  # and where the keys and values are that it reads
    has_shared_weights = False  # a tied head is a copy, or in the embedding's own stage

    def __init__(
        self,
        model: torch.nn.Module,
        batch: ElasticBatch,
        plan: Plan,
        dtype: torch.dtype,
    ) -> None:
        self.config = get_model_config(model)
        self.result = IterationResult()
        self.weight_gradients = DeferredWeightGradients()  # stays empty: elastic plans have no W
        self._model = model
        self._stage: ElasticGPTModel = get_attr_wrapped_model(model, "contexts", return_model_obj=True)
        assert isinstance(batch.recipe, Recipe)
        self._recipe = batch.recipe
        self._last = plan.num_segments - 1
        self._input: IterationInput | None = None
        self._dtype = dtype
        check_plan(plan, batch, self._stage)
        shared = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        self._lengths = [padded_length(chunk.tokens, shared) for chunk in batch.recipe.chunks]
        self._shared = shared
        self._tensors = batch.assemble(shared, next(model.parameters()).device)

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input, of which the data comes from the batch."""
        self._input = iteration
        self.result = IterationResult()
        self._stage.contexts.clear()

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights: there is one."""
        return 0

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`: [T, 1, h], or [T/tp, 1, h]."""
        length = self._lengths[micro_batch] // self._shared
        return MessageLayout((torch.Size((length, 1, self.config.hidden_size)),), self._dtype)

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`; the same steps as in Megatron's schedules."""
        assert self._input is not None
        is_last = segment == self._last
        chunk = self._recipe.chunks[micro_batch]
        tensors = self._tensors[micro_batch]
        layout = ChunkLayout(
            chunk.pieces,
            spans_of(chunk, self._lengths[micro_batch]),
            tensors["position_ids"],
            getattr(self._stage, "rotary_pos_emb", None),
            self._stage.local_rotary,
        )
        self._stage.run = ChunkRun(layout, self._recipe.checkpointed[segment][micro_batch])
        output, num_tokens = forward_step(
            with_token_counts(self._input.forward_step_func),
            iter([tensors]) if is_last or segment == 0 else None,
            self._model,
            self._input.num_microbatches,
            inputs[0] if inputs else None,
            self.result.loss_data,
            self.config,
            cp_group_size=1,
            collect_non_loss_data=self._input.collect_non_loss_data,
            is_first_microbatch=micro_batch == 0,
            current_microbatch=micro_batch,
            is_last_stage=is_last,
        )
        if not self._input.differentiate and not chunk.pieces[0].is_continued:
            self._stage.contexts.forget(chunk.pieces[0].sequence)
        if not is_last:
            return (output,)
        self.result.add_tokens(num_tokens)
        return (self._input.loss_to_differentiate(output, self.config),)

    def finish(self) -> None:
        """Check at the end of the iteration that nothing is left of any sequence."""
        self._stage.contexts.assert_empty()


def with_token_counts(forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
    """The forward step with a check of its loss: means over chunks of different sizes would be wrong."""

    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_func = forward_step_func(data_iterator, model)

        def checked(*args: Any, **kwargs: Any) -> Any:
            outputs = loss_func(*args, **kwargs)
            if not kwargs.get("non_loss_data") and len(outputs) != 3:
                raise ValueError(
                    "under the elastic schedule the loss function must return three values: the sum of the "
                    "tokens' losses, their number, and what to report"
                )
            return outputs

        return output, checked

    return step


def check_plan(plan: Plan, batch: ElasticBatch, stage: ElasticGPTModel) -> None:
    """``ValueError`` unless ``plan`` is for the model that ``stage`` is of."""
    config = stage.config
    if plan.num_ranks != config.pipeline_model_parallel_size:
        raise ValueError(
            f"the batch was planned for {plan.num_ranks} stages, the job has "
            f"{config.pipeline_model_parallel_size}; plan it with the job's pipeline-parallel size"
        )
    rank = parallel_state.get_pipeline_model_parallel_rank()
    planned = layers_of_stages(plan)
    found = [layer.layer_number for layer in stage.decoder.layers]
    if planned[-1].stop != config.num_layers or [number + 1 for number in planned[rank]] != found:
        counts = ", ".join(str(len(own)) for own in planned)
        raise ValueError(
            f"the batch was planned for {planned[-1].stop} layers over {plan.num_ranks} stages of {counts}; "
            f"this stage has layers {', '.join(map(str, found))}"
        )
    assert isinstance(batch.recipe, Recipe)
    most = max(batch.recipe.checkpointed[rank])
    if most > len(found):
        raise ValueError(f"the plan checkpoints {most} layers of a stage of {len(found)}")
    check_positions(batch, stage)


def check_positions(batch: ElasticBatch, model: ElasticGPTModel | SegmentedGPTModel) -> None:
    """``ValueError`` if a sequence is longer than learned positions reach."""
    longest = max(len(sequence) - 1 for sequence in batch.sequences)
    if model.position_embedding_type == "learned_absolute" and longest > model.max_sequence_length:
        raise ValueError(
            f"a sequence has {longest} tokens, the model {model.max_sequence_length} learned positions; "
            "truncate sequences or raise --max-position-embeddings"
        )
