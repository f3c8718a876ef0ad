"""Write the skeleton of a new method, score, schedule, optimizer, selector, data set or model into this checkout.

``python scripts/new.py KIND NAME``, for example ``python scripts/new.py method row_scale --family reparam``. With
``--plugins DIR`` the files go into a folder of plug-ins; ``python -m finetune.testing.new`` does the same where this
package was installed from a wheel.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.system.exit_code import exit_code_of
from finetune.testing.new import main

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
