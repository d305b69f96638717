"""Personalised federated fine-tuning of Mixture-of-Experts language models, simulated on Ray."""
