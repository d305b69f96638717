"""A Mixture-of-Experts model as data: families, routing, adapters, grafts, the shared base."""
