"""A stage of Megatron's model over slices of sequences, as a segment of a plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from helixpipe.elastic.chunks import Piece
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.layout import ChunkLayout, layout_of_slice
from helixpipe.layers.elastic.model import ChunkRun, ElasticGPTModel
from helixpipe.megatron_adapter.forward_step import IterationInput, IterationResult, ModelCall, StandInModel
from helixpipe.megatron_adapter.segments.contract import IterationSize
from helixpipe.megatron_adapter.segments.stages import check_supported
from helixpipe.plan import Plan
from helixpipe.plan.slice_ends import TokenTimes, ends_for
from helixpipe.runtime.context_lending import ContextLending
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

_Call: TypeAlias = tuple[ModelCall, Callable[..., Any] | None]
_Gradients: TypeAlias = dict[Piece, Tensor]


class SliceSegments:
    """The computation behind a plan of slices: one stage per rank, whose micro batches are slices.

    A forward step is called once for each sequence. Its loss function gets the outputs of all slices, joined,
    when the last one has run; backward passes begin after that, with the last slice.

    Args:
        model: this rank's stage as the training loop knows it, wrapped or not.
        plan: says where slices end.
        size: of the iteration, whose micro batches are sequences.
        dtype: of messages.

    Raises:
        ValueError: an option that would be ignored or wrong, or a plan for other sequences.
    """

    lending: WeightLending | None = None  # every stage computes where its weights are
    contexts: ContextLending | None = None  # and where the keys and values are that it reads
    has_shared_weights = False  # a tied head is a copy, or in the embedding's own stage

    def __init__(self, model: torch.nn.Module, plan: Plan, size: IterationSize, dtype: torch.dtype) -> None:
        self.config = get_model_config(model)
        check_supported(self.config, plan.schedule)
        self.result = IterationResult()
        self.weight_gradients = DeferredWeightGradients()  # stays empty: plans of slices have no W
        self._model = model
        self._stand_in = StandInModel(model)
        self._stage: ElasticGPTModel = get_attr_wrapped_model(model, "contexts", return_model_obj=True)
        self._last = plan.num_segments - 1
        self._size = size
        self._dtype = dtype
        self._shared = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        self._pieces = pieces_of(plan, ends_for(plan, size.seq_length, self._shared))
        self._positions = torch.arange(size.seq_length, device=next(model.parameters()).device)[None]
        self._input: IterationInput | None = None
        self._calls: dict[int, _Call] = {}
        self._outputs: list[Tensor] = []
        self._gradients: _Gradients = {}

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        self._input = iteration
        self.result = IterationResult()
        self._calls.clear()
        self._outputs.clear()
        self._gradients.clear()
        self._stage.contexts.clear()

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights: there is one."""
        return 0

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`: [T, b, h], or [T/tp, b, h]."""
        length = self._pieces[micro_batch].length // self._shared
        shape = torch.Size((length, self._size.micro_batch_size, self.config.hidden_size))
        return MessageLayout((shape,), self._dtype)

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        assert self._input is not None
        piece = self._pieces[micro_batch]
        is_first, is_last = segment == 0, segment == self._last
        reads = is_first or is_last or self._stage.needs_documents
        call, loss_func = self._call(piece) if reads else (_NO_CALL, None)
        self._stage.run = ChunkRun(self._layout_of(piece, call.documents), num_checkpointed=0)
        self._stage.set_input_tensor(inputs[0] if inputs else None)
        output = self._model(
            part_of(call.tokens, piece) if is_first else None,
            part_of(call.position_ids, piece) if is_first else None,
            None,
            labels=part_of(call.labels, piece) if is_last else None,
        )
        if not self._input.differentiate and not piece.is_continued:
            self._stage.contexts.forget(piece.sequence)
        return (self._share_of_loss(output, piece, loss_func) if is_last else output,)

    def finish(self) -> None:
        """Check at the end of the iteration that nothing is left of any sequence."""
        self._stage.contexts.assert_empty()
        left = {*self._calls, *(piece.sequence for piece in self._gradients)}
        assert not left, f"sequences that have not ended: {sorted(left)}"

    def _layout_of(self, piece: Piece, documents: Documents | None) -> ChunkLayout:
        rotary = getattr(self._stage, "rotary_pos_emb", None)
        return layout_of_slice(piece, self._positions, documents, rotary, self._stage.local_rotary)

    def _call(self, piece: Piece) -> _Call:
        """What the forward step has asked for: called for the first slice, forgotten after the last."""
        assert self._input is not None
        if piece.start == 0:
            (data_iterator,) = self._input.data_iterators
            shape = (self._size.micro_batch_size, self._size.seq_length)
            call = self._input.call(data_iterator, self._stand_in, shape, piece.sequence)
            check_documents(call[0], is_needed=self._stage.needs_documents)
            self._calls[piece.sequence] = call
        return self._calls[piece.sequence] if piece.is_continued else self._calls.pop(piece.sequence)

    def _share_of_loss(self, output: Tensor, piece: Piece, loss_func: Callable[..., Any] | None) -> Tensor:
        """A scalar whose backward pass is that of the sequence's loss to this slice's output."""
        assert self._input is not None
        self._outputs.append(output.detach())
        if not piece.is_continued:
            whole = torch.cat(self._outputs, dim=1).requires_grad_(self._input.differentiate)
            lengths = [part.shape[1] for part in self._outputs]
            self._outputs.clear()
            loss = self._input.loss(whole, loss_func, self._model, self.config, self.result)
            if self._input.differentiate:
                loss.backward()
                assert whole.grad is not None
                slices = [other for other in self._pieces if other.sequence == piece.sequence]
                self._gradients |= zip(slices, whole.grad.split(lengths, dim=1), strict=True)
        share: Tensor = _ShareOfLoss.apply(output, self._gradients, piece)
        return share


class _ShareOfLoss(torch.autograd.Function):
    """Brings the gradient of a loss over several outputs to one of them, when all are there."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradients: _Gradients, piece: Piece) -> Tensor:
        ctx.gradients, ctx.piece = gradients, piece
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradients.pop(ctx.piece) * grad, None, None


# On a stage between the ends, which needs neither tokens nor labels.
_NO_CALL = ModelCall(torch.empty(0), None, None)


def check_documents(call: ModelCall, *, is_needed: bool) -> None:
    """``ValueError`` unless a forward step has given documents to a model that is built for them alone."""
    if is_needed and call.documents is None:
        raise ValueError("the forward step must give the model, on every rank, a sequence's documents")
    if call.documents is not None and not is_needed:
        raise ValueError("the model was not built for attention that ends at documents; pass none")
    if call.documents is not None and len(call.documents.rows) > 1:
        raise ValueError("slices of joined documents run one sequence at a time; use a micro batch size of 1")


def pieces_of(plan: Plan, ends: tuple[int, ...]) -> tuple[Piece, ...]:
    """The slice of each micro batch."""
    return tuple(
        Piece(sequence, start, end - start, ends[-1])
        for sequence in range(plan.num_sequences)
        for start, end in pairwise((0, *ends))
    )


def operations_of_layer(config: TransformerConfig) -> TokenTimes:
    """Floating-point operations of a layer's forward, which its time is taken to go with."""
    assert config.kv_channels is not None
    assert config.ffn_hidden_size is not None
    query, key = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    mlp = config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)
    # Causal: scores and their product with values, for half of all pairs.
    return TokenTimes(2.0 * config.hidden_size * (2 * query + 2 * key + mlp), 2.0 * query)


def part_of(tensor: Tensor | None, piece: Piece) -> Tensor | None:
    """The columns of a slice, of [b, s]."""
    return None if tensor is None else tensor[:, piece.start : piece.start + piece.length]
