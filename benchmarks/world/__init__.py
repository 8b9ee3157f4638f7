"""The closed world: pictures whose every texture is known, and small models that live in them."""
