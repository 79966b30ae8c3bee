"""Run `fat.kernels.prefill.command`: `python -m fat.kernels.prefill`."""

import sys

from fat.kernels.prefill.command import main

sys.exit(main())
