"""`python -m vitlib.report`: run notebooks and make their pages."""

import sys

from vitlib.report.run import main

sys.exit(main())
