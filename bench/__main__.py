"""`python -P -m siglip2_bench`, the same as `siglip2 bench`."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
