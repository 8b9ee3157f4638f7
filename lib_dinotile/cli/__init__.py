"""Commands of `python -m lib_dinotile`."""


def quiet_transformers() -> None:
    """transformers warns of what is optional, and shows bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
