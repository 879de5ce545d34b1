"""Settings of the property tests in this folder."""

from hypothesis import settings

# A deadline per example would make tests fail on a busy machine; pytest's timeout guards the whole test.
settings.register_profile("merged-lora", deadline=None)
settings.load_profile("merged-lora")
