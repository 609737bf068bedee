"""DETOT: an inference-time prompting service for self-hosted language models."""

__version__ = "0.1.0"
