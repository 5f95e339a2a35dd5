"""`python -m ailurus_hf.cli`, the same as `ailurus-hf`."""

import sys

from . import main

sys.exit(main())
