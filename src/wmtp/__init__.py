"""Weighted multi-token-prediction fine-tuning, from a laptop to a GPU cluster."""
