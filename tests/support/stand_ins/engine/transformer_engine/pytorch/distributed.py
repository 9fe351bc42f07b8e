"""Random states and recomputation, as megatron.core derives from them."""

from typing import Any


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, Any]:
        return dict(self.states_)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states_ = states


def activation_recompute_forward(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def get_all_rng_states() -> dict[str, Any]:
    return {}


def checkpoint(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError
