"""Run by the WebUI at its start. Changes no package that is there; A1111 and Forge have all that is needed."""

from importlib.metadata import PackageNotFoundError, version


def _version(package: str) -> tuple[int, ...]:
    """(major, minor); (0, 0) if it is not installed."""
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:
        return 0, 0


if _version("transformers") < (4, 32) and _version("timm") == (0, 0):
    import launch

    # Without its dependencies, which would pull packages that the WebUI pins; of a version that is known to run there.
    launch.run_pip("install timm==1.0.20 --no-deps", "timm for DINO Tile: this transformers has no DINOv2")
