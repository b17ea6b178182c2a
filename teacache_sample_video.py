#!/usr/bin/env python3
"""Sample identity-preserving videos with ConsisID and TeaCache: from a photograph to an mp4."""

import gc
import sys

from teacache.command.main import main

if __name__ == "__main__":
    code = main()
    gc.freeze()  # skip the final garbage collection over torch's objects: saves a second at exit
    sys.exit(code)
