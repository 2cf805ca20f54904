"""`python -m sectool`: the same as the console script."""

import sys

from sectool.cli.main import main

sys.exit(main())
