"""`python -m jaxfp4` is `jaxfp4`."""

import sys

from jaxfp4.cli import main

sys.exit(main())
