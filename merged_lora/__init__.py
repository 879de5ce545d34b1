"""LoRA adapters merged on demand inside vLLM.

Importing this loads nothing else: vLLM imports the plugin in every one of its processes.
"""

from pathlib import Path

__version__ = "0.1.0"  # said here alone; pyproject.toml reads it

_HERE = Path(__file__).parent
if not (_HERE / "reference").is_dir():
    # A wheel holds reference/, cpu_kernels/ and the others inside this folder, a checkout beside it.
    __path__.append(str(_HERE.parent))
