"""`python3 -m teacache.embedded DIR` builds the embedded checkpoint in DIR."""

import sys

from teacache.embedded.build import main

if __name__ == "__main__":
    sys.exit(main())
