"""The closed world: pictures whose every texture is known, and small models that live in them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
