"""`python -m vlm_reason` is the command `vlm-reason`."""

import sys

from .cli.main import main

sys.exit(main())
