"""Flags of Megatron-LM launch scripts that ask for what is always so here.

Each is accepted at the values that are already true and an error otherwise, so that a script runs with
every flag accepted or answered. Nothing else reads them.
"""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CompatibilityConfig:
    use_mcore_models: bool = True
    """The model is always our own (model/gpt.py) over Megatron-Core's groups."""
    transformer_impl: str = "local"
    """Layers are our own; --attention-backend chooses the attention kernel. local or transformer_engine."""
    use_flash_attn: bool = True
    """Attention never makes a matrix of scores; --attention-backend chooses the kernel."""
    use_rotary_position_embeddings: bool = True
    """Positions are always rotary."""
    attention_softmax_in_fp32: bool = True
    """Attention kernels always keep the softmax in fp32."""
    masked_softmax_fusion: bool = False
    """There is no masked softmax: no mask exists."""
    create_attention_mask_in_dataloader: bool = False
    """There is no mask: documents are cu_seqlens."""
    overlap_grad_reduce: bool = True
    """FSDP2 always overlaps the reduction of gradients with backward."""
    overlap_param_gather: bool = True
    """FSDP2 always prefetches parameters."""
    exit_on_missing_checkpoint: bool = True
    """A --load without a checkpoint is an error, unless it is the empty --save."""
    ckpt_format: str = "torch_dist"
    """Checkpoints are torch.distributed.checkpoint."""
    log_throughput: bool = True
    """Every console line and every line of metrics.jsonl has it."""
    recompute_method: str = "uniform"
    """Full recompute is uniform, a layer at a time."""
    recompute_num_layers: int = 1
    """Full recompute is a layer at a time."""
    cpu_offloading_activations: bool = True
    """What --cpu-offloading-num-layers moves is what a layer keeps for its backward."""
    cpu_offloading_weights: bool = False
    """Weights stay on the device."""
    cpu_offloading_double_buffering: bool = True
    """While backward computes a layer, what the one before it kept is on its way back."""
    optimizer_offload_fraction: float = 1.0
    """--optimizer-cpu-offload moves all of the optimizer."""
    use_torch_optimizer_for_cpu_offload: bool = True
    """The optimizer is always torch's."""
    overlap_cpu_optimizer_d2h_h2d: bool = True
    """FSDP2 copies a layer while others compute; the update itself waits for all of them."""
    no_load_rng: bool = False
    """There is no random state: everything random is a function of the seed and the clock. A warning."""
    no_save_rng: bool = False
    """There is no random state: everything random is a function of the seed and the clock. A warning."""
    override_ckpt_iteration: int | None = None
    """A checkpoint's clock cannot be overridden; an error."""
    num_workers: int = 1
    """Data is read in process, a step ahead, in one thread; any number is accepted."""

    def validate(self) -> list[str]:
        """A problem for each value that is not already true."""
        problems = []
        for name, accepted in ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                problems.append(f"{name} = {value}: here it is always {' or '.join(map(str, accepted))}. "
                                "Fix: remove the flag.")
        if self.override_ckpt_iteration is not None:
            problems.append(f"override_ckpt_iteration = {self.override_ckpt_iteration}: the clock of a checkpoint is "
                            "its own, since data and learning rate are functions of it. Fix: --ckpt-step for another "
                            "iteration's checkpoint, or --finetune for clock 0.")
        return problems

    def warnings(self) -> list[str]:
        """Flags that ask to leave out what does not exist."""
        return [f"{name} = True: has no effect, since there is no random state: everything random is a function of "
                "the seed and the clock" for name in ("no_load_rng", "no_save_rng") if getattr(self, name)]


ACCEPTED = {
    "use_mcore_models": (True,), "transformer_impl": ("local", "transformer_engine"), "use_flash_attn": (True,),
    "use_rotary_position_embeddings": (True,), "attention_softmax_in_fp32": (True,), "masked_softmax_fusion": (False,),
    "create_attention_mask_in_dataloader": (False,), "overlap_grad_reduce": (True,), "overlap_param_gather": (True,),
    "exit_on_missing_checkpoint": (True,), "ckpt_format": ("torch_dist",), "log_throughput": (True,),
    "recompute_method": ("uniform",), "recompute_num_layers": (1,), "cpu_offloading_activations": (True,),
    "optimizer_offload_fraction": (1.0,), "use_torch_optimizer_for_cpu_offload": (True,),
    "overlap_cpu_optimizer_d2h_h2d": (True,), "cpu_offloading_weights": (False,),
    "cpu_offloading_double_buffering": (True,),
}
