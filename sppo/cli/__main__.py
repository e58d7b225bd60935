"""Entry point of ``python -m sppo.cli``, the same as ``sppo``, for launchers that start a module."""

import sys

from sppo.cli.main import main

sys.exit(main())
