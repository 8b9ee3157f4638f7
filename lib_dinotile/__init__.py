"""dinotile: a tiled upscaler that keeps every tile true to the picture with DINOv2 features."""

__version__ = "0.1.0"


class DinotileError(Exception):
    """What the user did or lacks, in one line that says what to do about it.

    `status_code` and `detail` are what the WebUIs' API reads off an exception to answer with 422 and the line.
    """

    status_code = 422

    @property
    def detail(self) -> str:
        return str(self)
