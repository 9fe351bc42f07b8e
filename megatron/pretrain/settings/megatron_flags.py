"""Megatron's flags, as its releases 0.17.1 to 0.19.2 define them, and what becomes of each here.

``SUPPORTED`` flags are options of this program with Megatron's meaning. ``ALIASES`` are other words for such
options. ``NEEDLESS`` ones are accepted, as they change nothing here, by why they do not: ``flag=`` takes any
value, ``flag=+`` several, and ``flag=1,2`` only these. ``REFUSED`` ones are not, by what to use instead.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    """
    accumulate-allreduce-grads-in-fp32 activation-func-clamp-value adam-beta1 adam-beta2 adam-eps
    add-qkv-bias apply-layernorm-1p async-save attention-backend attention-dropout bf16
    calculate-per-token-loss clip-grad context-parallel-size cross-entropy-fusion-impl
    cross-entropy-loss-fusion data-args-path data-cache-path data-path decoder-first-pipeline-num-layers
    decoder-last-pipeline-num-layers decoupled-lr decoupled-min-lr deterministic-mode
    disable-bias-linear disable-log-loss-scale-to-tensorboard disable-manual-gc-eval
    distributed-timeout-minutes empty-unused-memory-level end-weight-decay eod-mask-loss eval-interval
    eval-iters exit-duration-in-mins exit-interval expert-model-parallel-size
    expert-tensor-parallel-size ffn-hidden-size finetune fp16 global-batch-size glu-linear-offset
    grad-reduce-in-bf16 group-query-attention hidden-dropout hidden-size hysteresis init-method-std
    initial-loss-scale kv-channels load log-interval log-memory-to-tensorboard log-num-zeros-in-grad
    log-params-norm log-throughput log-timers-to-tensorboard log-validation-ppl-to-tensorboard
    log-world-size-to-tensorboard loss-scale loss-scale-window lr lr-decay-iters lr-decay-samples
    lr-decay-style lr-warmup-fraction lr-warmup-init lr-warmup-iters lr-warmup-samples
    lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style make-vocab-size-divisible-by manual-gc
    manual-gc-interval max-position-embeddings memory-snapshot-path merge-file micro-batch-size
    microbatch-group-size-per-virtual-pipeline-stage min-loss-scale min-lr mock-data moe-aux-loss-coeff
    moe-expert-capacity-factor moe-ffn-hidden-size moe-grouped-gemm moe-layer-freq moe-router-dtype
    moe-router-group-topk moe-router-load-balancing-type moe-router-num-groups moe-router-pre-softmax
    moe-router-score-function moe-router-topk moe-router-topk-scaling-factor
    moe-shared-expert-intermediate-size moe-token-dispatcher-type
    moe-token-drop-policy moe-z-loss-coeff no-gradient-accumulation-fusion no-load-optim
    no-log-loss-scale-to-tensorboard no-manual-gc-eval no-mmap-bin-files no-rope-freq
    no-yarn-correction-range-round-to-int norm-epsilon normalization num-attention-heads
    num-experts num-layers num-layers-per-virtual-pipeline-stage
    num-query-groups num-workers openai-gelu optimizer overlap-grad-reduce overlap-param-gather
    padded-vocab-size per-split-data-args-path pipeline-model-parallel-size position-embedding-type
    pretrained-checkpoint profile profile-ranks profile-step-end profile-step-start qk-layernorm
    quick-geglu recompute-granularity recompute-method recompute-modules recompute-num-layers
    record-memory-history reset-attention-mask reset-position-ids rope-scaling-factor rotary-base
    rotary-percent rotary-scaling-factor rotary-seq-len-interpolation-factor save save-interval seed
    seq-length sequence-parallel sgd-momentum softmax-type split start-weight-decay swiglu
    tensor-model-parallel-size tensorboard-dir tensorboard-log-interval tensorboard-queue-size
    tiktoken-num-special-tokens tiktoken-pattern tokenizer-model tokenizer-type train-data-path
    train-iters train-samples transformer-impl untie-embeddings-and-output-weights
    use-distributed-optimizer use-rope-scaling valid-data-path vocab-file vocab-size wandb-entity
    wandb-exp-name wandb-project wandb-save-dir weight-decay weight-decay-incr-style
    window-attn-skip-freq window-size yarn-beta-fast yarn-beta-slow
    yarn-correction-range-round-to-int yarn-original-max-position-embeddings
    """.split()
)

# A flag's own values follow those given here.
ALIASES = {
    "use-rotary-position-embeddings": ("--position-embedding-type", "rope"),
    "recompute-activations": ("--recompute-granularity", "selective"),
    "check-weight-hash-across-dp-replicas-interval": ("--check-gradients-every",),
}

# Options whose defaults here would give other numbers than Megatron's, with Megatron's: those of a command
# line that has one of its flags.
OTHER_DEFAULTS: dict[str, float | int] = {"attention-dropout": 0.1, "hidden-dropout": 0.1, "eval-iters": 100}

# What to tell beside a needless flag that has this value.
REMARKS = {"ckpt-format torch": "they are saved as torch_dist"}

NEEDLESS: dict[str, str] = {
    "this program does so anyway": """
        use-mcore-models attention-softmax-in-fp32 no-create-attention-mask-in-dataloader
        override-opt-param-scheduler override-opt_param-scheduler exit-signal-handler
        exit-signal-handler-for-training no-masked-softmax-fusion
        use-flash-attn verify-integrity ckpt-fully-parallel-save use-dist-ckpt
        dist-ckpt-format=torch_dist no-ckpt-fully-parallel-save
        auto-detect-ckpt-format dataloader-type=single exit-signal=SIGTERM use-cpu-initialization
    """,
    "checkpoints are saved as torch_dist, which any layout can read": """
        ckpt-format=torch_dist,torch
    """,
    "random states follow from seed and iteration": """
        no-load-rng no-save-rng
    """,
    "query-key scaling cancels out, and scores are in fp32": """
        apply-query-key-layer-scaling
    """,
    "how checkpoints are written and read in parallel is this program's own": """
        use-persistent-ckpt-worker async-strategy= async-ckpt-cpu-priority= async-ckpt-io-priority=
        async-ckpt-use-cpu-shm ckpt-fully-parallel-load ckpt-fully-parallel-load-exchange-algo=
        ckpt-fully-parallel-save-process-group= ckpt-fully-parallel-load-process-group=
        ckpt-assume-constant-structure dist-ckpt-workers= dist-ckpt-optim-fully-reshardable
        distrib-optim-fully-reshardable-mem-efficient no-ckpt-load-validate-sharding-integrity
        disable-ckpt-load-validate-sharding-integrity no-stream-ckpt-dequant disable-stream-ckpt-dequant
    """,
    "checkpoints are compared parameter by parameter, and none may be missing": """
        dist-ckpt-strictness=
    """,
    "it is about speed or memory, and the numbers are the same without": """
        defer-embedding-wgrad-compute wgrad-deferral-limit= overlap-p2p-communication-warmup-flush
        overlap-param-gather-with-optimizer-step no-align-grad-reduce disable-align-grad-reduce
        no-align-param-gather no-scatter-gather-tensors-in-pipeline ddp-num-buckets= ddp-bucket-size=
        ddp-pad-buckets-for-high-nccl-busbw no-overlap-p2p-communication use-ring-exchange-p2p
        no-persist-layer-norm no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
        no-rope-fusion disable-jit-fuser no-clone-scatter-output-in-embedding
        disable-clone-scatter-output-in-embedding num-dataset-builder-threads=
        high-priority-stream-groups=+ use-nccl-ub disable-symmetric-registration create-all-gather-group
        use-sharp sharp-enabled-group= te-rng-tracker dataloader-fast-cache-load
        dataloader-defer-npy-index-mmap no-use-layer-wise-param-layout init-model-with-meta-device
        use-transformer-engine-op-fuser mid-level-dataset-surplus= lazy-mpu-init
        disable-gloo-process-groups num-distributed-optimizer-instances=
    """,
    "the backend follows from the machine: NCCL on GPUs, gloo on CPUs": """
        distributed-backend=nccl,gloo pipeline-model-parallel-comm-backend=nccl
    """,
    "ranks and nodes are as torchrun starts them": """
        local-rank=
    """,
    "keys and values are gathered in one step, and the numbers are the same": """
        cp-comm-type=+ hierarchical-context-parallel-sizes=+
    """,
    "timers are those of --trace-dir": """
        timing-log-level=0,1,2 timing-log-option= no-barrier-with-level-1-timing
    """,
    "this program watches ranks by itself": """
        no-one-logger one-logger-project= one-logger-run-name= one-logger-async app-tag-run-name=
        app-tag-run-version= error-injection-rate=0 error-injection-type=
        rerun-mode=disabled,validate_results flight-recorder-trace-buffer-size=
        no-flight-recorder-dump-on-timeout disable-flight-recorder-dump-on-timeout
        flight-recorder-include-stack-trace no-flight-recorder-include-only-active
        disable-flight-recorder-include-only-active no-flight-recorder-extra-dump-on-exec
        disable-flight-recorder-extra-dump-on-exec straggler-ctrlr-port= straggler-minmax-count=
        disable-straggler-on-startup ft-num-warmup-iters=
    """,
    "what it belongs to is off": """
        fp8-margin= fp8-interval= fp8-amax-history-len= fp8-amax-compute-algo=
        tp-comm-bootstrap-backend= no-tp-comm-bulk-wgrad disable-tp-comm-bulk-wgrad
        no-tp-comm-bulk-dgrad disable-tp-comm-bulk-dgrad no-tp-comm-overlap-ag
        disable-tp-comm-overlap-ag no-tp-comm-overlap-rs disable-tp-comm-overlap-rs no-tp-comm-split-ag
        disable-tp-comm-split-ag no-tp-comm-split-rs disable-tp-comm-split-rs replication-jump=1
        replication-factor= mask-prob= short-seq-prob= sample-rate=1.0,1 adlr-autoresume-interval=
        mtp-loss-scaling-factor= qk-clip-alpha= qk-clip-threshold= mup-width-mult=1,1.0
        mup-embedding-mult=1,1.0 mup-output-mult=1,1.0 mup-attn-scale-power= cpu-offloading-num-layers=0
    """,
    "nothing is tested once training is over": """
        test-data-path=+
    """,
    "nothing here depends on it": """
        no-data-sharding disable-msc bert-no-binary-head
    """,
}

REFUSED: dict[str, str] = {
    "reinforcement learning is another program's; train with Megatron-LM": """
        grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-entropy-term-weight
        grpo-filter-groups-with-same-reward grpo-group-size grpo-iterations grpo-kl-beta
        grpo-prompts-per-step langrl-env-config no-rl-inference-logprobs-is-correction
        no-rl-offload-inference-model-weights-when-idle no-rl-partial-rollouts no-rl-persist-cuda-graphs
        no-rl-skip-bos-token no-rl-training-cuda-graphs no-rl-use-sequence-packing
        no-rl-verify-model-weights-swap perform-rl-step refit-method rl-consumption-granularity
        rl-default-temperature rl-default-top-k rl-default-top-p rl-generation-batch-size
        rl-generation-lag rl-importance-sampling-truncation-coef rl-inference-expert-model-parallel-size
        rl-inference-expert-tensor-model-parallel-size rl-inference-logprobs-is-correction
        rl-inference-model-unified-memory-level rl-inference-parsers
        rl-inference-pipeline-model-parallel-size rl-inference-tensor-model-parallel-size
        rl-kv-cache-management-mode rl-num-parallel-generation-batches rl-num-parallel-generations
        rl-offload-inference-model-weights-when-idle rl-offload-optimizer-during-inference
        rl-parallel-generation-tasks rl-partial-rollouts rl-persist-cuda-graphs rl-profile
        rl-profile-dir rl-prompts-per-eval rl-sequence-packing-algo
        rl-sequence-packing-max-sequences-per-bin rl-skip-bos-token rl-submission-granularity
        rl-training-cuda-graphs rl-use-sequence-packing rl-verify-model-weights-swap
    """,
    "this program trains and does not generate text; serve its checkpoints with Megatron-LM": """
        batch-invariant-mode decode-only-cuda-graphs enable-chunked-prefill flash-decode
        inference-batch-times-seqlen-threshold inference-coordinator-port
        inference-cuda-graph-all-prefills inference-cuda-graph-max-tokens inference-cuda-graph-scope
        inference-disable-ep-consensus inference-disable-triton-nvls-kernels inference-dynamic-batching
        inference-dynamic-batching-async-sched-mode inference-dynamic-batching-block-size
        inference-dynamic-batching-buffer-size-gb inference-dynamic-batching-cuda-graph-max-tokens
        inference-dynamic-batching-cuda-graph-mixed-prefill-count
        inference-dynamic-batching-cuda-graph-sizing-distribution
        inference-dynamic-batching-logprobs-mode inference-dynamic-batching-mamba-memory-ratio
        inference-dynamic-batching-max-requests inference-dynamic-batching-max-tokens
        inference-dynamic-batching-num-cuda-graphs inference-dynamic-batching-paused-buffer-size-gb
        inference-dynamic-batching-prefix-caching
        inference-dynamic-batching-prefix-caching-coordinator-policy
        inference-dynamic-batching-prefix-caching-eviction-policy
        inference-dynamic-batching-prefix-caching-mamba-gb
        inference-dynamic-batching-prefix-caching-routing-alpha
        inference-dynamic-batching-sampling-backend
        inference-dynamic-batching-track-generated-token-events
        inference-dynamic-batching-track-paused-request-events
        inference-dynamic-batching-unified-memory-level inference-fuse-tp-communication
        inference-grouped-gemm-backend inference-logging-step-interval inference-max-requests
        inference-max-seq-length inference-moe-disable-fused-quant-kernels
        inference-moe-token-dispatcher-type inference-rng-tracker inference-shards
        inference-text-gen-server-logging inference-use-synchronous-zmq-collectives
        inference-wandb-logging max-tokens-to-oom mlp-chunks-for-prefill nccl-all-reduce-for-prefill
        no-inference-disable-ep-consensus no-inference-dynamic-batching-prefix-caching
        no-inference-text-gen-server-logging no-inference-use-synchronous-zmq-collectives
        no-inference-wandb-logging num-speculative-tokens symmetric-ar-type use-legacy-static-engine
        use-same-sampling-seed-across-dp-ranks
    """,
    "this of experts is not built; remove it, or use Megatron-LM's program": """
        delay-wgrad-compute ep-overlap-early-attn-memory-release expert-tensor-parallel-num-weight-shards
        high-priority-a2a-comm-stream moe-apply-probs-on-input moe-deepep-num-sms moe-enable-deepep
        moe-enable-routing-replay moe-expert-rank-capacity-factor moe-flex-dispatcher-backend
        moe-flex-dispatcher-num-sms moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute
        moe-hybridep-num-sms moe-hybridep-num-sms-preprocessing moe-hybridep-pad-uneven-dispatch-inputs
        moe-input-jitter-eps moe-latent-size moe-layer-recompute moe-mlp-glu-interleave-size
        moe-ncclep-static-shape moe-ncclep-zero-copy moe-pad-expert-input-to-capacity
        moe-pad-experts-for-cuda-graph-inference moe-paged-stash moe-paged-stash-buffer-size-factor-cpu
        moe-paged-stash-buffer-size-factor-cuda moe-paged-stash-page-size moe-per-layer-logging
        moe-permute-fusion moe-permute-fusion-into-hybridep moe-router-bias-update-rate
        moe-router-enable-expert-bias moe-router-force-biased moe-router-force-load-balancing
        moe-router-fusion moe-router-padding-for-fp8 moe-router-padding-for-quantization
        moe-router-quantile-balancing-ema moe-routing-trace-capture-hidden-states
        moe-routing-trace-capture-logits moe-routing-trace-dump-weights moe-routing-trace-max-training-iters
        moe-routing-trace-path moe-shared-expert-gate moe-shared-expert-glu-interleave-size
        moe-shared-expert-overlap moe-single-grouped-bias
        moe-single-grouped-weight moe-upcycling-granularity moe-use-upcycling
        overlap-dispatch-backward-with-experts-wgrad overlap-moe-expert-parallel-comm
        use-grouped-gemm-for-dense-mlp use-grouped-gemm-for-shared-expert
    """,
    "multi-token prediction is not built; remove it": """
        mtp-detach-heads mtp-hybrid-override-pattern mtp-num-layers mtp-standalone
        mtp-use-repeated-layer
    """,
    "latent attention is not built; use multi-head or grouped-query attention": """
        cache-mla-latents kv-lora-rank mla-down-proj-fusion mscale mscale-all-dim multi-latent-attention
        q-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
    """,
    "this attention is not built; use causal softmax attention": """
        attention-output-gate disable-dsa-indexer-rotate-activation disable-dsa-indexer-scoring-relu
        dsa-indexer-head-dim dsa-indexer-k-norm-epsilon dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff
        dsa-indexer-n-heads dsa-indexer-rope-interleaved dsa-indexer-skip-topk-offset dsa-indexer-topk
        dsa-indexer-topk-freq dsa-indexer-use-sparse-loss dsa-kernel-backend
        experimental-attention-variant kitchen-attention-backend linear-attention-freq
        linear-conv-kernel-dim linear-key-head-dim linear-num-key-heads linear-num-value-heads
        linear-value-head-dim log-max-attention-logit no-dsa-indexer-rotate-activation
        no-dsa-indexer-scoring-relu qk-clip qk-l2-norm use-kitchen-attention
    """,
    "layers of several kinds are not built; use layers that are all alike": """
        decoder-num-layers disable-mamba-mem-eff-path encoder-num-layers
        heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path hybrid-layer-pattern
        hybrid-override-pattern is-hybrid-model mamba-head-dim mamba-inference-conv-states-dtype
        mamba-inference-ssm-states-dtype mamba-num-groups mamba-num-heads mamba-state-dim
        mamba-training-ssm-states-dtype spec use-legacy-models yaml-cfg
    """,
    "images are another program's; train with Megatron-LM": """
        classes-fraction data-per-class-fraction dino-bottleneck-size dino-freeze-last-layer
        dino-head-hidden-size dino-local-crops-number dino-local-img-size dino-norm-last-layer
        dino-teacher-temp dino-warmup-teacher-temp dino-warmup-teacher-temp-epochs head-lr-mult img-h
        img-w iter-per-epoch mask-factor mask-type mrope-section num-channels num-classes patch-dim
        swin-backbone-type vision-backbone-type vision-pretraining vision-pretraining-type
    """,
    "retrieval is another program's; train with Megatron-LM": """
        bert-embedder-type bert-load biencoder-projection-dim biencoder-shared-query-context-model
        block-data-path embedding-path evidence-data-path ict-head-size ict-load indexer-batch-size
        indexer-log-interval output-bert-embeddings query-in-block-prob retriever-report-topk-accuracies
        retriever-score-scaling titles-data-path use-one-sent-docs
    """,
    "8-bit and 4-bit numbers are not built; use --bf16 or --fp16": """
        disable-fp8-wgrad first-last-layers-bf16 fp4-format fp4-param-gather fp4-quantizer-factory
        fp4-recipe fp8-format fp8-output-proj fp8-param-gather fp8-quantizer-factory fp8-recipe
        keep-fp8-transpose-cache no-fp8-wgrad num-layers-at-end-in-bf16 num-layers-at-start-in-bf16
        reuse-grad-buf-for-mxfp8-param-ag te-precision-config-file
    """,
    "weights are sharded by --use-distributed-optimizer, not by FSDP; use that": """
        data-parallel-sharding-strategy disable-strict-fsdp-dtensor-load enable-full-sharding-in-hsdp
        fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
        megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-grad-comm-dtype
        megatron-fsdp-main-grads-dtype megatron-fsdp-main-params-dtype
        megatron-fsdp-max-pool-double-buffer no-gradient-reduce-div-fusion no-strict-fsdp-dtensor-load
        outer-dp-sharding-strategy suggested-communication-unit-size
        torch-fsdp2-no-reshard-after-forward use-megatron-fsdp use-torch-fsdp2
    """,
    "sequences are shared out evenly; use --context-parallel-size alone": """
        hybrid-context-parallel max-seqlen-per-dp-cp-rank
    """,
    "CUDA graphs are not built; remove it": """
        cuda-graph-impl cuda-graph-modules cuda-graph-scope cuda-graph-warmup-steps
        delay-offload-until-cuda-graph enable-cuda-graph external-cuda-graph optimizer-cuda-graph
    """,
    "recomputation and --mlp-chunk-size save memory here; use those": """
        activation-offload-fraction cpu-offloading-num-layers cpu-offloading-retain-pinned-cpu-buffers
        delta-offload-bytes-across-pp-ranks distribute-saved-activations
        fine-grained-activation-offloading fine-grained-offloading-max-inflight-offloads
        min-offloaded-tensor-size mlp-chunks-for-training no-pin-cpu-grads no-pin-cpu-params
        offload-modules optimizer-cpu-offload optimizer-offload-fraction overlap-cpu-optimizer-d2h-h2d
        use-torch-optimizer-for-cpu-offload
    """,
    "this optimizer is not built; use adam or sgd": """
        exp-avg-dtype exp-avg-sq-dtype lion-beta1 lion-beta2 main-grads-dtype main-params-dtype
        muon-coefficient-type muon-extra-scale-factor muon-fp32-matmul-prec muon-momentum muon-nesterov
        muon-no-split-qkv muon-num-ns-steps muon-scalar-optimizer muon-scale-mode muon-tp-mode
        muon-use-nesterov use-precision-aware-optimizer
    """,
    "the program's own guards do this; see docs/faults.md": """
        adlr-autoresume calc-ft-timeouts check-for-large-grads check-for-spiky-loss
        distributed-timeout-seconds-after-init enable-ft-package error-injection-rate
        fault-injector-delay-start-iteration fault-injector-fault-delay
        fault-injector-fault-probabilities fault-injector-fault-types fault-injector-mtti-seconds
        fault-injector-num-ranks fault-injector-offset-seconds fault-injector-ranks fault-injector-seed
        flight-recorder-dump-path gpu-sniff-test-interval inprocess-active-world-size
        inprocess-barrier-timeout inprocess-completion-timeout inprocess-empty-cuda-cache
        inprocess-granularity inprocess-hard-timeout inprocess-heartbeat-interval
        inprocess-heartbeat-timeout inprocess-last-call-wait inprocess-max-iterations
        inprocess-monitor-process-interval inprocess-monitor-thread-interval
        inprocess-progress-watchdog-interval inprocess-restart inprocess-soft-timeout
        inprocess-termination-grace-time log-energy log-straggler no-check-for-nan-in-loss-and-grad
        rerun-mode result-rejected-tracker-filename run-workload-inspector-server
    """,
    "distillation is not built; remove it": """
        logits-load-decode-threads logits-load-dir logits-load-ignore-errors logits-load-kd-loss-alpha
        logits-load-msc-prefetch-depth logits-load-prefetch-factor logits-save-dir logits-save-dtype
        logits-save-top-k logits-save-top-p logits-save-top-p-min-k
    """,
    "mup is not built here; train with python -m helixpipe.megatron_lm, inside Megatron-LM, which has it": """
        mup-base-head-dim mup-base-hidden-size mup-embedding-mult mup-output-mult mup-width-mult use-mup
    """,
    "what is sampled from the middle is not built; prepare the data so": """
        fim-data fim-eod-token fim-fragment-rate fim-middle-token fim-no-prefix fim-pad-token
        fim-prefix-token fim-rate fim-split-sample fim-spm-rate fim-suffix-token
    """,
    "a form of the model that the layers here do not have; remove it": """
        apply-residual-connection-post-layernorm data-parallel-random-init
        decoder-seq-length disable-bf16-reduced-precision-matmul embedding-init-method-std
        encoder-seq-length flash-attention-version fp32-residual-connection fused-residual-rmsnorm
        init-method-xavier-uniform no-initialization no-position-embedding
        onnx-safe
        relative-attention-max-distance relative-attention-num-buckets rope-type rotary-interleaved
        squared-relu tensor-parallel-num-weight-shards use-fused-weighted-squared-relu
        use-te-activation-func
    """,
    "tensor-parallel messages are not overlapped; remove it": """
        tp-comm-overlap tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad
    """,
    "layers are counted, not weighed; use --decoder-first-pipeline-num-layers and its like": """
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
        pipeline-model-parallel-layout
    """,
    "stages are given by their layers; use --num-layers-per-virtual-pipeline-stage": """
        num-virtual-stages-per-pipeline-rank
    """,
    "the batch size is fixed; use --global-batch-size": """
        batch-size decrease-batch-size-if-needed rampup-batch-size step-batch-size-schedule
    """,
    "its name is another now; see its new name in --help": """
        checkpoint-activations model-parallel-size warmup
    """,
    "optimizer groups are those of weights with and without decay; remove it": """
        apply-wd-to-qk-layernorm dump-param-to-param-group-map freeze-all-layers
        no-weight-decay-cond-type
    """,
    "learning rates follow the options of this job; remove it": """
        use-checkpoint-opt-param-scheduler use-checkpoint-opt_param-scheduler
    """,
    "checkpoints are saved whole, as torch_dist; use --save, --load, --keep-checkpoints": """
        ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format ckpt-format
        ckpt-step dist-ckpt-format dist-ckpt-save-pre-mcore-014 load-main-params-from-ckpt no-save-optim
        non-persistent-ckpt-type non-persistent-global-ckpt-dir non-persistent-local-ckpt-algo
        non-persistent-local-ckpt-dir non-persistent-save-interval override-ckpt-iteration
        persistent-save-interval replication replication-jump save-activations-interval
        save-dgrads-interval save-params-interval save-retain-interval save-tokens-per-expert-interval
        save-wgrads-interval
    """,
    "options come from the command line, and the checkpoint's are compared with them; give them": """
        disable-use-tokenizer-model-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args
        use-checkpoint-args use-mp-args-from-checkpoint-args
    """,
    "a --load that is not the --save must hold a checkpoint; remove it": """
        exit-on-missing-checkpoint
    """,
    "evaluation has the batch size of training, on one set; use --eval-iters": """
        eval-global-batch-size eval-micro-batch-size full-validation multiple-validation-sets skip-train
        start-eval-at-iter validation-set-names
    """,
    "no iteration is passed over; remove it": """
        iterations-to-skip phase-transition-iterations train-sync-interval
    """,
    "gradients are reduced in fp32 by the mean over tokens; remove it": """
        ddp-average-in-collective ddp-param-name-patterns-for-fp32-local-accumulation
        ddp-reduce-scatter-with-fp32-accumulation
    """,
    "ranks are placed tensor, data, pipeline, and groups are torch's own; remove it": """
        distributed-backend fake-process-group nccl-communicator-config-path
        pipeline-model-parallel-comm-backend use-tp-pp-dp-mapping
    """,
    "the profiler is torch's, with the plan's operations as ranges; use --profile alone": """
        nvtx-ranges pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra
        pytorch-profiler-collect-shapes record-shapes use-pytorch-profiler
    """,
    "memory is reported by iteration and rank; use --metrics-jsonl": """
        log-device-memory-used log-memory-interval
    """,
    "what is logged is in --metrics-jsonl; use that": """
        config-logger-dir log-progress logging-level timing-log-level
    """,
    "data are read by their prefix; use helixpipe prepare and --data-path": """
        allow-ambiguous-pad-tokens chat-template dataloader-inter-document-masking
        dataloader-type disable-pad-vocab-size disable-tokenizer-sentencepiece-ignore-extra-whitespaces
        no-pad-vocab-size
        no-tokenizer-sentencepiece-ignore-extra-whitespaces null-tokenizer-eod-id null-tokenizer-pad-id
        object-storage-cache-path per-dataset-sequences-path sample-rate sft
        sft-tokenizer-prompt-format tiktoken-special-tokens
        tokenizer-hf-include-special-tokens tokenizer-hf-no-include-special-tokens
        tokenizer-hf-no-use-fast tokenizer-hf-use-fast tokenizer-metadata tokenizer-sentencepiece-legacy
        tokenizer-special-tokens trust-remote-code vocab-extra-ids
    """,
    "it is for tests of Megatron; remove it": """
        enable-experimental enable-msc test-mode
    """,
    "signals are SIGTERM and SIGINT, for the loader's processes, too; remove it": """
        exit-signal exit-signal-handler-for-dataloader
    """,
    "this is not built yet; remove it": """
        fp16-lm-cross-entropy
    """,
}
