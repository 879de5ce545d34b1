"""The commands of ``merged-lora``, one in each file: what it takes, and what it does with that."""
