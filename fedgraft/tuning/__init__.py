"""Choosing hyper-parameters and comparing methods on the same footing."""
