"""The oracle: every merge restated in NumPy, plainly and slowly. Only ``backend`` knows ``merged_lora``."""
