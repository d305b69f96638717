"""The methods: one paper, one file. Importing this package registers them all."""

from fedgraft.aggregation import base, fedavg, flex, local_only, private_lora

__all__ = ["base", "fedavg", "flex", "local_only", "private_lora"]
