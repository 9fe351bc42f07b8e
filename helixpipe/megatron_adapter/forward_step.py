"""Megatron's forward-step contract, met by segments.

``forward_step_func(data_iterator, model)`` is called with a stand-in for the model, which notes the arguments
and returns a placeholder. The segments then compute in plan order, and the loss function that came back
with the placeholder is applied to what the last segment returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from helixpipe.layers.attention.context_parallel import own_pieces
from helixpipe.layers.documents import Documents

_SIGNATURE = inspect.signature(GPTModel.forward)
# What a model that is cut, at its attention or into slices, can honour; the mask is checked to be causal.
_USED = ("input_ids", "position_ids", "attention_mask", "labels", "loss_mask", "packed_seq_params")


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one call of the model, by GPTModel's names."""

    tokens: Tensor
    position_ids: Tensor | None
    labels: Tensor | None
    documents: Documents | None = None


def _refuse(*operands: Any) -> NoReturn:
    raise ValueError(
        "the forward step computed with the model's output; under this schedule it is computed later, "
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
                raise ValueError(f"this schedule does not support the model argument {name!r}")
        tokens, documents = arguments["input_ids"], arguments.get("packed_seq_params")
        if not isinstance(documents, Documents | None):
            raise ValueError("this schedule does not support Megatron's packed_seq_params; pass Documents")
        _check_mask(arguments.get("attention_mask"), tokens.shape[1])
        return PendingOutput(
            ModelCall(tokens, arguments.get("position_ids"), arguments.get("labels"), documents)
        )


def _check_mask(mask: Tensor | None, seq_length: int) -> None:
    """Attention is causal by construction; a mask that says otherwise would be ignored silently.

    Args:
        mask: [..., seq_length, whole sequence]: Megatron gives ranks that share sequences the rows of their
            tokens.
        seq_length: tokens of a sequence that this rank has.
    """
    if mask is None:
        return
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    whole = seq_length * max(size, 1)
    causal = torch.ones(whole, whole, dtype=torch.bool, device=mask.device).triu_(1)
    causal = own_pieces(causal, 0, size, rank)
    if mask.shape[-2:] != causal.shape or not bool((mask == causal).all()):
        raise ValueError(
            "the attention mask is not the causal one; this schedule supports causal attention only, "
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

    def scale_router_losses(self, config: TransformerConfig, model: torch.nn.Module) -> None:
        """Weigh what routers add to the loss like the loss itself, as Megatron does with every forward step.

        Routers differentiate it in their own layer's backward pass, on ranks that compute no loss.
        """
        if config.num_moe_experts is None:
            return
        scale = torch.ones(1, device=next(model.parameters()).device)
        if config.grad_scale_func is not None:
            scale = config.grad_scale_func(scale)
        # A sum over tokens is divided later by their number, a mean over micro batches here by theirs.
        MoEAuxLossAutoScaler.set_loss_scale(
            scale if config.calculate_per_token_loss else scale / self.num_microbatches
        )

    def call(
        self, data_iterator: Iterator[Any] | None, model: StandInModel, shape: tuple[int, int], number: int
    ) -> tuple[ModelCall, Callable[..., Any] | None]:
        """Call the forward step for a micro batch: what the model is to compute, and the loss function.

        Args:
            data_iterator: of the model chunk.
            model: stands in for it.
            shape: micro batch size and sequence length.
            number: of the micro batch, for messages.

        Raises:
            ValueError: a forward step that does not hand on the model's output, or tokens of another shape.
        """
        output, loss_func = self.forward_step_func(data_iterator, model)
        if not isinstance(output, PendingOutput):
            raise ValueError("the forward step must return the model's output itself as its first value")
        if tuple(output.call.tokens.shape) != shape:
            raise ValueError(
                f"micro batch {number} holds tokens of shape {tuple(output.call.tokens.shape)}, the job "
                f"was set up for {shape} (micro batch size, sequence length)"
            )
        return output.call, loss_func

    def loss(
        self,
        output: Tensor,
        loss_func: Callable[..., Any] | None,
        model: torch.nn.Module,
        config: TransformerConfig,
        result: IterationResult,
    ) -> Tensor:
        """Megatron's own loss bookkeeping on the model's output; the scaled loss."""
        if output.dtype in (torch.float16, torch.bfloat16):
            output = output.float()
        if config.timers is not None:
            config.timers("forward-compute", log_level=2).start()
        loss, num_tokens = forward_step_calc_loss(
            model,
            output,
            loss_func,
            config,
            None,
            self.collect_non_loss_data,
            self.num_microbatches,
            result.loss_data,
            cp_group_size=config.context_parallel_size,
            is_last_stage=True,
        )
        result.add_tokens(num_tokens)
        return self.loss_to_differentiate(loss, config)


@dataclass
class IterationResult:
    """What goes back to Megatron: one entry per micro batch, and the number of tokens in them."""

    loss_data: list[Any] = field(default_factory=list)
    num_tokens: Tensor | None = None

    def add_tokens(self, num_tokens: Tensor) -> None:
        """Count a micro batch's tokens, where they were counted: Megatron's own zero is on the host."""
        self.num_tokens = num_tokens if self.num_tokens is None else self.num_tokens + num_tokens
