"""Command-line options that the WebUI gets from this extension."""


def preload(parser):
    parser.add_argument("--dinotile-adapters-dir", type=str, help="folder with DINO Tile adapters (.safetensors)")
    parser.add_argument("--dinotile-heads-dir", type=str, help="folder with restoration heads (.safetensors)")
    parser.add_argument(
        "--dinotile-encoders-dir", type=str, help="folder with DINOv2 and DINOv3 models, one folder each"
    )
