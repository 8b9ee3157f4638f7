"""What all tests share."""

from hypothesis import HealthCheck, settings

# No timed tests: machines differ, and a test run may share one with other work.
settings.register_profile("dinotile", deadline=None, max_examples=60)
# pytest tests/test_bad_input.py --hypothesis-profile=thorough: over 10,000 examples, some 10 minutes.
settings.register_profile(
    "thorough",
    deadline=None,
    max_examples=2600,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dinotile")
