"""`python -m tests.simulation --seed N --steps N`."""

import sys

from tests.simulation.campaign import main

sys.exit(main())
