"""The lab bench for sparse and parameter-efficient fine-tuning."""

__version__ = "0.1.0"
