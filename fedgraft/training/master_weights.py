"""Values, gradients and moments of single slots inside DeepSpeed, whatever the ZeRO stage has made of them.

DeepSpeed keeps float32 master weights in flat partitions over the ranks. A live weight that is written without its master comes
back as it was at the next step; a master that is written without the live weight leaves the next forward pass with the old one.
All ranks call the same things in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["MOMENTS", "MasterWeights"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, beside its count of steps."""


class MasterWeights:
    """The slots of one DeepSpeed engine.

    Args:
        engine: As ``deepspeed.initialize`` gave it.
        parameters: All parameters of the model by name.
        groups: Names by parameter group, in the order that the optimiser has them.
        stage: ZeRO stage.
        is_leader: Whether this rank's values count where all ranks write.
    """

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], groups: Sequence[Sequence[str]], stage: int, *, is_leader: bool
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._groups = groups
        self._stage = stage
        self._is_leader = is_leader
        optimizer = engine.optimizer
        # Stage 0 in float32 has no masters: the weights themselves are stepped.
        self._zero: Any = optimizer if hasattr(optimizer, "refresh_fp32_params") else None
        self._inner: torch.optim.Optimizer = optimizer if self._zero is None else optimizer.optimizer
        if isinstance(self._inner, torch.optim.AdamW):
            self._create_states()

    # ---- values

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write float32 values, by parameter name, into live weights and masters."""
        from deepspeed.runtime.zero import GatheredParameters

        found = [self._parameters[name] for name in values]
        with torch.no_grad(), GatheredParameters(found, modifier_rank=0, enabled=self._stage == 3):
            for parameter, value in zip(found, values.values(), strict=True):
                if self._stage < 3 or self._is_leader:
                    parameter.data.copy_(value)
        if self._zero is None:
            return
        self._zero.refresh_fp32_params()

    def write_exactly(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write float32 values into the masters of a bfloat16 model: ``write`` rounds them on their way through live weights."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._zero is None:
            return
        for name, value in values.items():
            parameter = self._parameters[name]
            if self._stage == 3:
                safe_set_local_fp32_param(parameter, self._own_part(value, parameter))
            else:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def read(self, name: str) -> torch.Tensor:
        """Give the float32 value of a parameter."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self._parameters[name]
        return parameter.detach() if self._zero is None else safe_get_full_fp32_param(parameter).detach()

    # ---- gradients

    def read_gradient(self, name: str) -> torch.Tensor | None:
        """Give the gradient of a parameter, averaged over ranks; ``None`` where it has none."""
        from deepspeed.utils import safe_get_full_grad

        found = safe_get_full_grad(self._parameters[name])
        return None if found is None else found.detach()

    def write_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Replace the gradient of a parameter."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        parameter = self._parameters[name]
        if self._stage == 3:
            safe_set_local_grad(parameter, self._own_part(gradient, parameter))
            return
        if self._zero is None and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        safe_set_full_grad(parameter, gradient.to(parameter.device))

    # ---- the optimiser

    def begin(self, rates: Sequence[float]) -> None:
        """Set each group's learning rate and forget all moments."""
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self._inner.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def write_moment(self, name: str, moment: str, value: torch.Tensor) -> None:
        """Set ``step``, ``exp_avg`` or ``exp_avg_sq`` of a parameter."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self._parameters[name]
        if moment == "step":
            self._step_count(name).fill_(float(value))
        elif self._zero is None:
            self._inner.state[parameter][moment].copy_(value)
        elif self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(value, parameter), moment)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)

    def read_moments(self, name: str) -> dict[str, torch.Tensor]:
        """Copy AdamW's moments of a parameter out; none where the optimiser has none."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not isinstance(self._inner, torch.optim.AdamW):
            return {}
        parameter = self._parameters[name]
        found = {"step": self._step_count(name).detach().cpu().clone()}
        for moment in MOMENTS:
            state = self._inner.state[parameter] if self._zero is None else {}
            value = state[moment] if state else safe_get_full_optimizer_state(parameter, moment)
            found[moment] = value.detach().cpu().clone()
        return found

    def _create_states(self) -> None:
        """Make the moments that AdamW else makes at its first step.

        Kept ones need a place before it; and ZeRO looks for those of all groups once, after the first group's step.
        """
        for parameter in self._flat():
            zeros = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            self._inner.state[parameter].update({"step": torch.zeros(()), **zeros})
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat(self) -> list[torch.Tensor]:
        """What the inner optimiser steps: the weights themselves, or ZeRO's flat partitions of masters."""
        if self._zero is None:
            return [parameter for group in self._engine.optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _step_count(self, name: str) -> torch.Tensor:
        """AdamW's count of steps for a parameter: its own, or that of the flat partition it lies in."""
        parameter = self._parameters[name]
        if self._zero is None:
            return self._inner.state[parameter]["step"]  # type: ignore[no-any-return]
        if self._stage == 3:
            parts: Any = self._zero.fp16_groups
            place = next(index for index, part in enumerate(parts) if any(found is parameter for found in part))
        else:
            place = next(index for index, names in enumerate(self._groups) if name in names)
        return self._inner.state[self._flat()[place]]["step"]  # type: ignore[no-any-return]

    def _own_part(self, value: torch.Tensor, parameter: Any) -> torch.Tensor:
        """This rank's part of a value in ZeRO 3, padded as DeepSpeed pads it: what it offers for whole values fails on one
        that is smaller than the number of ranks.
        """
        from torch import distributed as dist

        size = int(parameter.ds_tensor.ds_numel)
        flat = value.reshape(-1).float()
        padded = torch.zeros(size * dist.get_world_size(), dtype=torch.float32)
        padded[: flat.numel()] = flat.cpu()
        return padded[dist.get_rank() * size :][:size].to(parameter.device)
