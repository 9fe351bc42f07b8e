"""Megatron's forward-step contract, met by segments.

``forward_step_func(data_iterator, model)`` is called with a stand-in for the model, which notes the arguments
and returns a placeholder. The segments then compute in plan order, and the loss function that came back
with the placeholder is applied to what the last segment returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from helixpipe.layers.segmented_gpt import SegmentedGPTModel, Tensors
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

_SIGNATURE = inspect.signature(GPTModel.forward)
# What a segmented model can honour; the mask is checked to be causal.
_USED = ("input_ids", "position_ids", "attention_mask", "labels", "loss_mask")


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one call of the model, by GPTModel's names."""

    tokens: Tensor
    position_ids: Tensor | None
    labels: Tensor | None


_PendingCall: TypeAlias = tuple[ModelCall, Callable[..., Any] | None]


def _refuse(*operands: Any) -> NoReturn:
    raise ValueError(
        "the forward step computed with the model's output; under helix the output is computed later, "
        "so hand it on untouched and compute in the loss function"
    )


class PendingOutput:
    """Placeholder for the model's output, which does not exist yet when the forward step returns."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(self, name)

    # Python looks operators up on the class, past __getattr__; torch asks for its own hook.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __getitem__ = __len__ = __iter__ = __float__ = _refuse
    __torch_function__ = classmethod(_refuse)


class StandInModel:
    """Takes the model's place in a forward step; everything but the call is the real model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> PendingOutput:
        """Note the arguments.

        Raises:
            ValueError: an argument that segments cannot honour.
        """
        arguments = _SIGNATURE.bind(self._model, *args, **kwargs).arguments
        for name, value in arguments.items():
            if name not in ("self", *_USED) and value is not None:
                raise ValueError(f"the helix schedule does not support the model argument {name!r}")
        tokens = arguments["input_ids"]
        _check_mask(arguments.get("attention_mask"), tokens.shape[1])
        return PendingOutput(ModelCall(tokens, arguments.get("position_ids"), arguments.get("labels")))


def _check_mask(mask: Tensor | None, seq_length: int) -> None:
    """Attention is causal by construction; a mask that says otherwise would be ignored silently."""
    if mask is None:
        return
    causal = torch.ones(seq_length, seq_length, dtype=torch.bool, device=mask.device).triu_(1)
    if mask.shape[-2:] != causal.shape or not bool((mask == causal).all()):
        raise ValueError(
            "the attention mask is not the causal one; helix supports causal attention only, "
            "so pass None and do not reset the mask at document ends"
        )


@dataclass
class IterationInput:
    """What Megatron hands over for one iteration."""

    forward_step_func: Callable[..., Any]
    data_iterators: Sequence[Iterator[Any] | None]  # one per model chunk
    num_microbatches: int
    collect_non_loss_data: bool
    differentiate: bool

    def loss_to_differentiate(self, loss: Tensor, config: TransformerConfig) -> Tensor:
        """The scaled loss as the scalar that a backward pass starts from; as it is in an evaluation."""
        if not self.differentiate:
            return loss
        if config.grad_scale_func is not None:
            loss = config.grad_scale_func(loss)
        # Megatron's scaling, and some loss functions, give a vector of one element.
        return loss.reshape(())


@dataclass
class IterationResult:
    """What goes back to Megatron: one entry per micro batch, and the number of tokens in them."""

    loss_data: list[Any] = field(default_factory=list)
    num_tokens: Tensor | None = None

    def add_tokens(self, num_tokens: Tensor, loss: Tensor) -> None:
        """Count a micro batch's tokens, where its loss is."""
        num_tokens = num_tokens.to(loss.device)
        self.num_tokens = num_tokens if self.num_tokens is None else self.num_tokens + num_tokens


class GPTSegments:
    """The computation behind a plan: a segmented model fed by a forward step.

    Args:
        model: the model as the training loop knows it, wrapped or not.
        segmented: the :class:`SegmentedGPTModel` inside.
        seq_length, micro_batch_size: sizes of every micro batch.
        dtype: of activations and weights.
        has_loans: whether segments compute with other ranks' weights.
        losses_here: the micro batches whose last segment runs on this rank; all of them if None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        segmented: SegmentedGPTModel,
        seq_length: int,
        micro_batch_size: int,
        dtype: torch.dtype,
        *,
        has_loans: bool = False,
        losses_here: Collection[int] | None = None,
    ) -> None:
        self.segmented = segmented
        self.config = segmented.config
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.dtype = dtype
        self.result = IterationResult()
        self.weight_gradients = DeferredWeightGradients()  # stays empty: helix has no W
        self.lending: WeightLending | None = None
        if has_loans:
            own = next(segmented.parameters())
            gradient_dtype = getattr(own, "main_grad", own).dtype
            self.lending = WeightLending(self._lent_parameters, segmented.lent_shapes, dtype, gradient_dtype)
        # A tied embedding is used by the first segment and by the last, a lent weight by other ranks.
        is_tied = segmented.share_embeddings_and_output_weights and segmented.pre_process
        self.has_shared_weights = is_tied or has_loans
        self._model = model
        self._stand_in = StandInModel(model)
        self._input: IterationInput | None = None
        self._losses_here = None if losses_here is None else frozenset(losses_here)
        self._last_loss = max(losses_here or (), default=None)
        self._num_read = 0
        self._pending: dict[int, _PendingCall] = {}

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        self._input = iteration
        self._pending.clear()
        self._num_read = 0
        self.result = IterationResult()

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights: there is one."""
        return 0

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        shapes = self.segmented.edge_shapes(edge, self.seq_length, self.micro_batch_size)
        # A residual beside other tensors comes last. It is only added to something, or passed on.
        return MessageLayout(tuple(shapes), self.dtype, num_kept=len(shapes) - 1 or None)

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        assert self._input is not None
        if segment == 0:
            self._read_to(micro_batch + 1)
            call, _ = self._pending[micro_batch]
            if not self._has_loss(micro_batch):
                del self._pending[micro_batch]
            return self.segmented.forward_segment(0, (), tokens=call.tokens, position_ids=call.position_ids)
        borrowed = None if self.lending is None else self.lending.weights_for(segment, micro_batch)
        if segment < self.segmented.num_segments - 1:
            return self.segmented.forward_segment(segment, inputs, borrowed=borrowed)
        self._read_to(micro_batch + 1)
        call, loss_func = self._pending.pop(micro_batch)
        if micro_batch == self._last_loss:
            # The iterator must stand at the next iteration's first micro batch when this one ends.
            self._read_to(self._input.num_microbatches)
        (output,) = self.segmented.forward_segment(segment, inputs, labels=call.labels, borrowed=borrowed)
        return (self._loss(output, loss_func),)

    def _has_loss(self, micro_batch: int) -> bool:
        return self._losses_here is None or micro_batch in self._losses_here

    def _read_to(self, count: int) -> None:
        """Call the forward step for the first ``count`` micro batches, and keep what is used on this rank."""
        while self._num_read < count:
            call = self._next_call(self._num_read)
            if self.segmented.pre_process or self._has_loss(self._num_read):
                self._pending[self._num_read] = call
            self._num_read += 1

    def _lent_parameters(self, segment: int) -> list[torch.nn.Parameter]:
        parameters = self.segmented.lent_parameters(segment)
        if getattr(self._model, "use_forward_hook", False):
            # With --overlap-param-gather, modules wait for their parameters when they run; these may be read
            # before that.
            groups: Any = self._model.param_to_bucket_group
            for parameter in parameters:
                groups[parameter].finish_param_sync()
        return parameters

    def _next_call(self, micro_batch: int) -> _PendingCall:
        assert self._input is not None
        (data_iterator,) = self._input.data_iterators
        output, loss_func = self._input.forward_step_func(data_iterator, self._stand_in)
        if not isinstance(output, PendingOutput):
            raise ValueError("the forward step must return the model's output itself as its first value")
        expected = (self.micro_batch_size, self.seq_length)
        if tuple(output.call.tokens.shape) != expected:
            raise ValueError(
                f"micro batch {micro_batch} holds tokens of shape {tuple(output.call.tokens.shape)}, the job "
                f"was set up for {expected} (micro batch size, sequence length)"
            )
        return output.call, loss_func

    def _loss(self, output: Tensor, loss_func: Callable[..., Any] | None) -> Tensor:
        """Megatron's own loss bookkeeping on the model's output; the scaled loss."""
        assert self._input is not None
        if output.dtype in (torch.float16, torch.bfloat16):
            output = output.float()
        if self.config.timers is not None:
            self.config.timers("forward-compute", log_level=2).start()
        loss, num_tokens = forward_step_calc_loss(
            self.segmented,
            output,
            loss_func,
            self.config,
            None,
            self._input.collect_non_loss_data,
            self._input.num_microbatches,
            self.result.loss_data,
            cp_group_size=1,
            is_last_stage=True,
        )
        self.result.add_tokens(num_tokens, loss)
        return self._input.loss_to_differentiate(loss, self.config)
