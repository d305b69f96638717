"""The methods: one paper, one file. Importing this package registers them all."""

from fedgraft.aggregation import base, centralised, fedavg, flex, local_only, private_lora

__all__ = ["base", "centralised", "fedavg", "flex", "local_only", "private_lora"]
