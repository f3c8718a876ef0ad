"""``python -m finetune``."""

from .cli import main

main()
