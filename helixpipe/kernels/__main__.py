"""``python -m helixpipe.kernels`` builds them."""

import sys

from helixpipe.kernels.build import main

sys.exit(main())
