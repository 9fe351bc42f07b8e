"""A GPT split into segments around its attention, with Megatron's modules and parameter names.

A layer's pieces are norm1, qkv, core, proj, norm2, mlp. Segment ``2l+1`` holds the attention range of layer
``l``: ``core``, which has no weights, ``qkv``, which is norm1, qkv and core, or ``block``, from norm1 to
proj. Segment ``2l`` holds what stands between the ranges of layers ``l-1`` and ``l`` (the first begins with
the embedding, the last ends with the head and the loss). An attention segment may run anywhere: the rank of
segment ``2l`` owns the weights of both, and lends those of segment ``2l+1``. The last segment may be lent in
the same way. Over slices of sequences the ranges ``qkv`` and ``block`` are two segments, ``3l+1`` with norm1
and qkv and ``3l+2`` with the rest: keys and values are there for other ranks before this one attends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from helixpipe.layers.attention.core import FlashCoreAttention
from helixpipe.layers.attention.windows import window_of
from helixpipe.layers.borrowed_modules import BorrowedModules
from helixpipe.layers.chunked_loss import chunked_loss
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.core_attention import attend_to_slices
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.positions import rotate_at
from helixpipe.layers.elastic.slice_attention import compact
from helixpipe.layers.recomputing_layer import (
    NOTHING_SAVED,
    MemorySaving,
    SavingTransformerLayer,
    attend_to,
    query_key_value,
)
from helixpipe.layers.rotary import angles_of, build_rotary, is_rotated, rotate
from helixpipe.layers.segmented_decoder import (
    SegmentedDecoder,
    build_head,
    build_norm,
    check_supported,
    owned_parts,
)
from helixpipe.layers.slices import mark_sliced
from helixpipe.layers.spec import (
    ATTENTION_PARTS,
    Implementation,
    LayerPart,
    final_norm,
    layer_spec,
    partial_layer_spec,
)
from helixpipe.layers.variants import build_local_rotary, scale_embedding
from helixpipe.plan.cost_model import Recompute

Tensors = tuple[Tensor, ...]
Layout: TypeAlias = ChunkLayout | Documents


def _borrowing_config(config: TransformerConfig) -> TransformerConfig:
    config = copy(config)
    # A fused accumulation would look for the main_grad of a weight that is not this rank's.
    config.gradient_accumulation_fusion = False
    return config


class SegmentedGPTModel(LanguageModule):
    """One rank's share of a GPT that runs by segments.

    Parameters have the names they have in Megatron's whole GPTModel, so checkpoints are interchangeable.

    Args:
        config: the model's configuration.
        implementation: whose modules compute the layers, and which attention.
        owned_segments: the segments between attention whose weights are on this rank.
        vocab_size: padded vocabulary size.
        max_sequence_length: longest sequence, for learned positions.
        attention_range: what attention segments hold: ``core``, ``qkv`` or ``block``.
        lends_head: the last segment, too, runs on other ranks than its weights'.
        share_embeddings_and_output_weights: tie the head to the embedding; both segments must be here.
        position_embedding_type: one of :data:`~helixpipe.layers.rotary.POSITIONS`.
        saving: what to do to keep less for the backward pass.
        contexts: where attention finds keys and values of earlier slices; None for whole sequences.
        rotary: those of GPTModel for rotary positions, like ``rotary_base`` and ``rope_scaling``.

    Raises:
        ValueError: an option that segments do not support.
    """

    def __init__(
        self,
        config: TransformerConfig,
        implementation: Implementation,
        owned_segments: Collection[int],
        vocab_size: int,
        max_sequence_length: int,
        *,
        attention_range: str = "core",
        lends_head: bool = False,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: str = "learned_absolute",
        saving: MemorySaving = NOTHING_SAVED,
        contexts: ContextStore | None = None,
        **rotary: Any,
    ) -> None:
        check_supported(config, position_embedding_type, attention_range, has_slices=contexts is not None)
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.attention_range, self.lends_head = attention_range, lends_head
        self.segments_per_layer = 2 if contexts is None or attention_range == "core" else 3
        self.num_segments = self.segments_per_layer * config.num_layers + 1
        self.pre_process = 0 in owned_segments
        self.post_process = self.num_segments - 1 in owned_segments
        self.vocab_size = vocab_size
        self.max_sequence_length, self.position_embedding_type = max_sequence_length, position_embedding_type
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.saving, self.contexts = saving, contexts
        self.needs_documents = implementation.documents
        if share_embeddings_and_output_weights and self.pre_process != self.post_process:
            raise ValueError("tied embeddings need the first and the last segment on one rank")

        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type=position_embedding_type,
                tp_group=self.pg_collection.tp,
            )
            scale_embedding(self.embedding, config)
        self._local_rotary = build_local_rotary(config, self.pg_collection.cp)
        self.rotary_pos_emb = build_rotary(position_embedding_type, config, self.pg_collection.cp, **rotary)
        specs = self._layer_specs(implementation)
        self._attention_part = ATTENTION_PARTS[attention_range]
        self.decoder = SegmentedDecoder(
            config,
            specs,
            owned_parts(config.num_layers, owned_segments, self._attention_part, self.segments_per_layer),
            final_norm(implementation) if self.post_process else None,
        )
        self._borrowed = self._build_borrowed(specs, final_norm(implementation) if lends_head else None)
        # Every rank runs the core attention of every layer; it has no weights and is no submodule.
        self._cores = [self._build_core(spec, number) for number, spec in enumerate(specs)]
        if self.post_process:
            tied = share_embeddings_and_output_weights
            self.output_layer = build_head(config, vocab_size, self.pg_collection.tp, is_tied=tied)
            if saving.loss_chunk_size is not None:
                mark_sliced([self.output_layer])
        self._mark_embedding_parameters()

    def _layer_specs(self, implementation: Implementation) -> list[ModuleSpec]:
        """Of every whole layer of the model."""
        numbers = range(self.config.num_layers)
        specs = [layer_spec(self.config, implementation, self.saving, layer) for layer in numbers]
        if self.contexts is not None:
            attend_to_slices(specs, self.contexts, implementation.attention)
        return specs

    def _build_borrowed(self, specs: Sequence[ModuleSpec], norm: type | None) -> dict[int, BorrowedModules]:
        """By piece of a layer, and the last segment; in a dictionary, as they are no submodules.

        Args:
            specs: of every whole layer.
            norm: class of the norm before a head that is lent; None if it is not.
        """
        parts = {1: self._attention_part}
        if self.segments_per_layer == 3:
            lends_proj = LayerPart.PROJ in self._attention_part
            parts = {1: LayerPart.PRE, 2: LayerPart.CORE | LayerPart.PROJ if lends_proj else LayerPart(0)}
        borrowed = {piece: self._borrowed_attention(specs[0], part) for piece, part in parts.items() if part}
        if norm is not None:
            borrowed[self.num_segments - 1] = self._borrowed_last(specs[-1], norm)
        return borrowed

    def _build_core(self, spec: ModuleSpec, number: int) -> torch.nn.Module:
        found: torch.nn.Module = spec.submodules.self_attention.submodules.core_attention(
            config=self.config,
            layer_number=number + 1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=self.config.softmax_scale,
            pg_collection=self.pg_collection,
        )
        if self.config.softmax_type == "learnable":
            if not isinstance(found, FlashCoreAttention):
                raise ValueError(
                    "--softmax-type learnable does not go with --attention-backend unfused; use 1f1b"
                )
            # Those of the layer are used, which may be lent.
            found.softmax_offset = None
        return found

    def _borrowed_attention(self, spec: ModuleSpec, part: LayerPart) -> BorrowedModules:
        config = _borrowing_config(self.config)
        layer = build_module(partial_layer_spec(spec, part), config=config, layer_number=1)
        return BorrowedModules(layer=layer)

    def _borrowed_last(self, spec: ModuleSpec, norm: type) -> BorrowedModules:
        config = _borrowing_config(self.config)
        part = partial_layer_spec(spec, LayerPart.POST & ~self._attention_part)
        # The weight is borrowed either way, from the embedding where it is tied.
        output_layer = build_head(config, self.vocab_size, self.pg_collection.tp, is_tied=False)
        if self.saving.loss_chunk_size is not None:
            mark_sliced([output_layer])
        # Megatron adds what comes before a contiguous stage; losses of routers are kept by layer.
        number = config.num_layers - get_transformer_layer_offset(config)
        return BorrowedModules(
            layer=build_module(part, config=config, layer_number=number),
            final_layernorm=build_norm(config, norm),
            output_layer=output_layer,
        )

    def _mark_embedding_parameters(self) -> None:
        """Tell the optimizer which weights are the embedding's and the head's, as Megatron does."""
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        if getattr(self.config, "use_mup", False):
            # By these its optimizer groups weights.
            ends = [self.embedding] if self.pre_process else []
            ends += [self.output_layer] if self.post_process else []
            for parameter in (parameter for end in ends for parameter in end.parameters()):
                parameter.is_embedding_parameter = True
        if self.share_embeddings_and_output_weights and self.pre_process:
            # Fused weight-gradient accumulation must start from zero where one weight serves twice.
            self.embedding.word_embeddings.weight.zero_out_wgrad = True

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """None: Megatron asks for the weight that is *duplicated* across stages, and none is.

        A tied head uses the embedding's own weight, so its gradient needs no reduction between stages.
        """
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not available: a segmented model has no forward pass of its own."""
        raise RuntimeError("a segmented model runs through forward_segment, driven by a plan")

    def forward_segment(
        self,
        segment: int,
        inputs: Tensors,
        *,
        tokens: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        borrowed: Sequence[Tensor] | None = None,
        layout: Layout | None = None,
    ) -> Tensors:
        """Run one segment of one micro batch.

        Args:
            segment: 0..num_segments-1.
            inputs: what the previous segment returned; empty for segment 0.
            tokens, position_ids: [b, s], for segment 0.
            labels: [b, s], for the last segment; None returns logits instead of losses.
            borrowed: weights for a segment whose own weights are elsewhere, as :meth:`lent_parameters` gives
                them there.
            layout: of the slice that the micro batch is, or the documents of its sequences; None for whole
                sequences.

        Returns:
            Before attention: query [s, b, heads, d], key and value [s, b, groups, d], residual [s, b, h];
            before ``qkv`` and ``block``, which make these themselves, the hidden state [s, b, h].
            Attention: its output [s, b, heads * d], residual; for ``block`` the hidden state.
            Last segment: losses [b, s] in fp32, or logits [b, s, vocab]. Sizes are per tensor-parallel
            rank; with sequence parallelism what has size h holds this rank's part of s.
        """
        number, piece = divmod(segment, self.segments_per_layer)
        if piece:
            run = self._run_attention if piece == self.segments_per_layer - 1 else self._run_qkv
            if borrowed is not None:
                return self._borrowed[piece].compute(run, borrowed, number, inputs, layout)
            layer = self.decoder.layers[str(number)] if piece in self._borrowed else None
            return run(layer, number, inputs, layout)
        if segment == self.num_segments - 1:
            if borrowed is not None:
                return self._borrowed[segment].compute(self._run_last, borrowed, inputs, labels)
            return self._run_last(*self._last_modules(), inputs, labels)
        if segment == 0:
            values: Tensors = (self.embedding(input_ids=tokens, position_ids=position_ids),)
        else:
            after = LayerPart.POST & ~self._attention_part
            values = self._run_parts(self.decoder.layers[str(number - 1)], number - 1, after, inputs)
        before = LayerPart.PRE & ~self._attention_part
        return self._run_parts(self.decoder.layers[str(number)], number, before, values, layout)

    def lent_parameters(self, segment: int) -> list[torch.nn.Parameter]:
        """This rank's parameters of an attention segment, or of the last, which other ranks borrow."""
        modules = self._borrowed_modules(segment)
        own: tuple[Any, ...]
        if segment == self.num_segments - 1:
            own = self._last_modules()
        else:
            own = (self.decoder.layers[str(segment // self.segments_per_layer)],)
        places = dict(zip((name for name, _ in modules.named_children()), own, strict=True))
        parameters = []
        for name in modules.names:
            module, _, inner = name.partition(".")
            if module == "output_layer" and self.share_embeddings_and_output_weights:
                parameters.append(self.embedding.word_embeddings.weight)
            else:
                parameters.append(places[module].get_parameter(inner))
        return parameters

    def lent_shapes(self, segment: int) -> list[torch.Size]:
        """Shapes of :meth:`lent_parameters`, also where the segment's weights are elsewhere."""
        return [parameter.shape for parameter in self._borrowed_modules(segment).parameters()]

    def _last_modules(self) -> tuple[Any, torch.nn.Module, torch.nn.Module]:
        """What the last segment runs, in the order of its borrowed modules."""
        assert self.decoder.final_layernorm is not None
        layer = self.decoder.layers[str(self.config.num_layers - 1)]
        return layer, self.decoder.final_layernorm, self.output_layer

    def _borrowed_modules(self, segment: int) -> BorrowedModules:
        piece = segment % self.segments_per_layer
        assert piece or segment == self.num_segments - 1, "only attention and the head are lent"
        return self._borrowed[piece or segment]

    @property
    def borrowing_modules(self) -> list[BorrowedModules]:
        """What computes with weights of other ranks; no submodules, for they have none of their own."""
        return list(self._borrowed.values())

    def train(self, mode: bool = True) -> SegmentedGPTModel:
        """Switch dropout on or off, also in what is no submodule."""
        for module in (*self._cores, *self._borrowed.values()):
            module.train(mode)
        super().train(mode)
        return self

    def _random_state(self, dropout: float) -> AbstractContextManager[Any]:
        """Dropout on sequence-parallel activations differs between tensor-parallel ranks."""
        if self.config.sequence_parallel and dropout:
            found: AbstractContextManager[Any] = tensor_parallel.get_cuda_rng_tracker().fork()
            return found
        return nullcontext()

    def _run_attention(
        self,
        layer: TransformerLayer | None,
        number: int,
        inputs: Tensors,
        layout: Layout | None = None,
    ) -> Tensors:
        """Attention of layer ``number`` with what its segment has beside, with the weights of ``layer``."""
        before = LayerPart.PRE & self._attention_part if self.segments_per_layer == 2 else LayerPart(0)
        core = self._cores[number]
        options: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "packed_seq_params": layout}
        if self.config.softmax_type == "learnable":
            assert layer is not None
            options["sink"] = layer.self_attention.core_attention.softmax_offset

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with self._random_state(self.config.attention_dropout):
                output: Tensor = core(query, key, value, None, **options)
            return output

        level = self.saving.level(number)
        if before and level is not Recompute.NONE:
            assert layer is not None
            (residual,) = inputs
            rotated = partial(self._rotated, number, layout=layout)
            output = attend_to(layer, level, residual, rotated, attend)
        else:
            *attended, residual = self._run_parts(layer, number, before, inputs, layout)
            output = attend(*attended)
        return self._run_parts(layer, number, LayerPart.POST & self._attention_part, (output, residual))

    def _run_qkv(
        self, layer: TransformerLayer, number: int, inputs: Tensors, layout: Layout | None
    ) -> Tensors:
        """norm1 and QKV of layer ``number``, where they are a segment of their own."""
        query, key, value = query_key_value(layer, self.saving.level(number), *inputs)
        return (*compact(*self._rotated(number, query, key, value, layout)), *inputs)

    def _run_parts(
        self,
        layer: TransformerLayer | None,
        number: int,
        part: LayerPart,
        values: Tensors,
        layout: Layout | None = None,
    ) -> Tensors:
        """Consecutive parts of layer ``number``: each takes what the one before it returns."""
        if not part:
            return values
        assert layer is not None
        with self._random_state(self.config.hidden_dropout):
            if LayerPart.PRE in part:
                query, key, value = self._query_key_value(layer, *values)
                values = (*compact(*self._rotated(number, query, key, value, layout)), *values)
            if LayerPart.PROJ in part:
                values = (self._project(layer, *values),)
            if LayerPart.MLP in part:
                values = (layer._forward_mlp(*values),)
        return values

    def _query_key_value(self, layer: TransformerLayer, hidden: Tensor) -> Tensors:
        # An attention segment computes norm1 and QKV again together, for the core; others norm1, for QKV.
        if isinstance(layer, SavingTransformerLayer) and LayerPart.PRE not in self._attention_part:
            return layer.query_key_value(hidden)
        output: Tensors = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
        return output

    def _rotated(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, layout: Layout | None = None
    ) -> Tensors:
        """Queries and keys of layer ``number`` with their rotary positions, if the model has any."""
        rotary, group = self.rotary_pos_emb, self.pg_collection.cp
        if self._local_rotary is not None and window_of(self.config, number + 1):
            rotary = self._local_rotary
        if rotary is None or not is_rotated(self.config, number + 1):
            return query, key, value
        if isinstance(layout, Documents) or (layout is not None and not layout.is_one_slice):
            return (*rotate_at(query, key, layout.positions, rotary, self.config, group), value)
        if layout is None:
            # Of the whole sequence: Megatron picks the rows of this rank.
            angles = angles_of(rotary, query.shape[0] * self.config.context_parallel_size)
        else:
            (piece,) = layout.pieces
            angles = angles_of(rotary, piece.sequence_length)[piece.start :][: piece.length]
        return (*(rotate(tensor, angles, self.config, group) for tensor in (query, key)), value)

    def _project(self, layer: TransformerLayer, attention_output: Tensor, residual: Tensor) -> Tensor:
        projected = layer.self_attention.linear_proj(attention_output)
        add = layer.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        output: Tensor = add(projected, residual, layer.hidden_dropout)
        return output

    def _run_last(
        self,
        layer: TransformerLayer,
        final_layernorm: torch.nn.Module,
        output_layer: torch.nn.Module,
        inputs: Tensors,
        labels: Tensor | None,
    ) -> Tensors:
        """What follows the last attention; a head without a weight of its own uses the embedding's."""
        after = LayerPart.POST & ~self._attention_part
        (hidden,) = self._run_parts(layer, self.config.num_layers - 1, after, inputs)
        hidden = final_layernorm(hidden)
        weight = self.embedding.word_embeddings.weight if output_layer.weight is None else None
        chunk, loss = self.saving.loss_chunk_size, self.compute_language_model_loss
        if labels is not None and chunk is not None:
            return (chunked_loss(hidden, labels, output_layer, weight, loss, chunk),)
        logits, _ = output_layer(hidden, weight=weight)
        if labels is None:
            return (logits.transpose(0, 1).contiguous(),)
        return (loss(labels, logits),)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint form of this rank's share."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron's GPTModel keeps no extra state for the head either.
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state

    def edge_shapes(self, edge: int, seq_length: int, micro_batch_size: int) -> list[torch.Size]:
        """Shapes of the tensors that segment ``edge`` returns to segment ``edge + 1``.

        Args:
            edge: 0..num_segments-2.
            seq_length: s, before any splitting.
            micro_batch_size: b.
        """
        config, tp = self.config, self.config.tensor_model_parallel_size
        heads = config.num_attention_heads // tp
        residual_length = seq_length // tp if config.sequence_parallel else seq_length
        residual = torch.Size((residual_length, micro_batch_size, config.hidden_size))
        has_attended = (edge + 1) % self.segments_per_layer == 0
        if has_attended and LayerPart.PROJ not in self._attention_part:
            return [torch.Size((seq_length, micro_batch_size, heads * config.kv_channels)), residual]
        attends_next = (edge + 2) % self.segments_per_layer == 0
        if not attends_next or (self.segments_per_layer == 2 and LayerPart.PRE in self._attention_part):
            return [residual]
        query = torch.Size((seq_length, micro_batch_size, heads, config.kv_channels))
        key = self.key_shape(seq_length, micro_batch_size)
        return [query, key, key, residual]

    def key_shape(self, seq_length: int, micro_batch_size: int) -> torch.Size:
        """Shape of the keys of one layer on one tensor-parallel rank, and of the values."""
        config = self.config
        groups = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
        return torch.Size((seq_length, micro_batch_size, groups, config.kv_channels))
