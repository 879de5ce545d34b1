"""``python -m merged_lora`` is ``merged-lora``."""

import sys

from .cli import main

sys.exit(main())
