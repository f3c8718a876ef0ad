"""Write a working skeleton of a new class, or of a new YAML file, of one kind.

    python scripts/new.py method row_scale --family reparam    into this checkout
    python scripts/new.py KIND NAME --plugins DIR              into a folder of plug-ins

If this package was installed from a wheel, ``python -m finetune.testing.new`` does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.system.exit_code import exit_code_of
from finetune.testing.new import main

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
