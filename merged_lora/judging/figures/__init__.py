"""Figures of what was found, by matplotlib, which is imported when one is drawn.

Colours are those of maps that read alike to all eyes and in grey.
"""

from .files import check_path, save
from .maps import heat_map
from .retentions import retentions
from .trials import trials_by_task

__all__ = ["check_path", "heat_map", "retentions", "save", "trials_by_task"]
