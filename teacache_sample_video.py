#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.14.1",
#     "torchvision==0.29.2",
#     "diffusers==0.42.1",
#     "transformers==5.23.0",
#     "accelerate==1.15.0",
#     "huggingface_hub==2.4.0",
#     "sentencepiece==0.2.3",
#     "insightface==2.1",
#     "facexlib==0.3.0",
#     "consisid-eva-clip==1.0.2",
#     "onnx==1.23.2",
#     "onnxruntime==1.31.1",
#     "opencv-python==5.0.0.93",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1",
#     "pillow==13.0.0",
#     "scikit-image==0.26.0",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "requests==2.34.2",
#     "filelock==4.2.11",
#     "tqdm==4.70.1",
# ]
# ///
"""Sample identity-preserving videos with ConsisID and TeaCache: from a photograph to an mp4."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out
    from teacache.command.main import run_and_exit

    run_and_exit()
