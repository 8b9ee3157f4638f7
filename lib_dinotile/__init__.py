"""dinotile: a tiled upscaler that keeps every tile true to the picture with DINOv2 features."""

__version__ = "0.1.0"


class DinotileError(Exception):
    """What the user did or lacks, in one line that says what to do about it."""

    def __init__(self, message: str, status_code: int = 422) -> None:
        super().__init__(message)
        # The WebUIs' API reads these two off any exception and answers with them.
        self.status_code = status_code
        self.detail = message
