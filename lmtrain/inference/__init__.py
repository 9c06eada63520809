"""Arithmetic on log-probabilities: scoring and sampling."""
