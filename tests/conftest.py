"""What all tests share."""

from hypothesis import settings

# No timed tests: machines differ, and a test run may share one with other work.
settings.register_profile("dinotile", deadline=None, max_examples=60)
settings.load_profile("dinotile")
