"""Run by the WebUI at its start. Changes no package that is there; A1111 and Forge have all that is needed."""

import importlib.util

if importlib.util.find_spec("timm") is None:
    import transformers

    if not hasattr(transformers, "Dinov2Model"):
        import launch

        # Without its dependencies, which would pull packages that the WebUI pins.
        launch.run_pip("install timm --no-deps", "timm for DINO Tile: this transformers has no DINOv2")
