"""``python -m finetune``."""

from .cli.app import main

main()
