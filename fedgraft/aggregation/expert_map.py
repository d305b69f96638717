"""Which client holds which experts: the bookkeeping of every method that gives clients sub-models.

A client has slots for experts in every MoE layer; a slot holds one of the server's experts. Two slots of a client may be tied to
the same one (a merged or a pooled expert): then the client is one holder of it, not two. A map says nothing about who is in a
cohort; it keeps what was last given to each client.

Shape letters: L layers, N experts of a layer on the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from fedgraft.errors import MethodError
from fedgraft.types import Assignment

__all__ = ["ExpertMap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMap:
    """Experts by client and layer.

    ``layers`` are the layer indices the map knows, ascending; ``num_experts`` how many experts the server has in each of them.
    ``slots_of`` gives, by client and layer, the server's expert in each of the client's slots, in slot order. A client that is
    not in it holds nothing yet; a layer that a client does not name is held as a whole, expert e in slot e, as in ``Assignment``.

    Raises:
        MethodError: A layer or an expert that is not there.
    """

    layers: tuple[int, ...]
    num_experts: int
    slots_of: Mapping[int, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for client, by_layer in self.slots_of.items():
            for layer, slots in by_layer.items():
                self._check_layer(layer)
                if wrong := [expert for expert in slots if not 0 <= expert < self.num_experts]:
                    raise MethodError(
                        f"an expert map gives client {client} expert {wrong[0]} of layer {layer}",
                        f"experts are 0 to {self.num_experts - 1}",
                    )

    @property
    def clients(self) -> tuple[int, ...]:
        """Clients that hold something, ascending."""
        return tuple(sorted(self.slots_of))

    def give(self, slots_of: Mapping[int, Mapping[int, Sequence[int]] | None]) -> Self:
        """The map after these clients got these experts, by client and layer; what they held before is gone. ``None``: all."""
        given = {
            client: {layer: tuple(slots) for layer, slots in (by_layer or {}).items()} for client, by_layer in slots_of.items()
        }
        return replace(self, slots_of={**self.slots_of, **given})

    def slots(self, client: int, layer: int) -> tuple[int, ...]:
        """The server's expert in each slot of a client's layer, in slot order; empty for a client that holds nothing yet."""
        self._check_layer(layer)
        if client not in self.slots_of:
            return ()
        return self.slots_of[client].get(layer, tuple(range(self.num_experts)))

    def experts(self, client: int, layer: int) -> tuple[int, ...]:
        """The server's experts that a client holds, ascending, each once."""
        return tuple(sorted(set(self.slots(client, layer))))

    def assignment(self, client: int) -> Assignment | None:
        """What a client holds by layer, as a task takes it; ``None`` for one that holds all, or nothing yet."""
        named = self.slots_of.get(client)
        return {layer: self.experts(client, layer) for layer in named} if named else None

    def mask(self, client: int) -> torch.Tensor:
        """Which experts a client holds, (L, N) bool, layers in the map's order."""
        is_held_LN = torch.zeros(len(self.layers), self.num_experts, dtype=torch.bool)
        for row, layer in enumerate(self.layers):
            is_held_LN[row, list(self.slots(client, layer))] = True
        return is_held_LN

    def load(self, layer: int, clients: Sequence[int] | None = None) -> torch.Tensor:
        """How many clients hold each expert of a layer, (N,) int64; of all clients, or of these."""
        self._check_layer(layer)
        load_N = torch.zeros(self.num_experts, dtype=torch.int64)
        for client in self.clients if clients is None else clients:
            load_N[list(self.experts(client, layer))] += 1
        return load_N

    def to_json(self) -> dict[str, object]:
        """The map as JSON values, for ``ServerState.notes``."""
        listed = {
            str(client): {str(layer): list(slots) for layer, slots in sorted(self.slots_of[client].items())}
            for client in self.clients
        }
        return {"layers": list(self.layers), "num_experts": self.num_experts, "clients": listed}

    @classmethod
    def from_json(cls, value: object, *, only: Sequence[int] | None = None) -> Self:
        """Read what ``to_json`` gave, also after a way through a file.

        Args:
            value: The map as JSON values.
            only: Clients to read; ``None``: all.

        Raises:
            MethodError: It is something else.
        """
        try:
            return cls._read(value, only)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MethodError(f"this is no expert map: {str(value)[:80]}", "give what to_json() gave") from error

    @classmethod
    def _read(cls, value: object, only: Sequence[int] | None) -> Self:
        if not isinstance(value, Mapping):
            raise TypeError("no mapping")
        listed = value["clients"]
        wanted = listed if only is None else [str(client) for client in only if str(client) in listed]
        slots_of = {
            int(client): {int(layer): tuple(int(expert) for expert in slots) for layer, slots in listed[client].items()}
            for client in wanted
        }
        layers = tuple(int(index) for index in value["layers"])
        return cls(layers=layers, num_experts=int(value["num_experts"]), slots_of=slots_of)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise MethodError(f"an expert map has no layer {layer}", f"its layers are {', '.join(map(str, self.layers))}")
