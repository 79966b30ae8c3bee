"""`python -m fat.kernels.prefill`; see `fat.kernels.prefill.command`."""

import sys

from fat.kernels.prefill.command import main

sys.exit(main())
