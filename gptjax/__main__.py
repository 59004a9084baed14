"""`python -m gptjax` is `gptjax`."""

import sys

from gptjax.cli import main

sys.exit(main())
