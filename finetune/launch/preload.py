"""What nearly every run needs, imported once for all of a sweep (see ``warm.py``). Never imported by anything else."""

import datasets  # noqa: F401
import pydantic.type_adapter  # noqa: F401
from transformers.models.vit import image_processing_pil_vit, modeling_vit  # noqa: F401

from ..registry import import_all
from ..report import summary  # noqa: F401
from ..system import progress  # noqa: F401
from ..training import run  # noqa: F401

import_all()
