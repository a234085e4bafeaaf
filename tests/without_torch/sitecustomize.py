"""Hides torch from the scripts that tests start, as if only the package were installed.

torch is a dependency of the parity tests. tensorboardX imports it if it can, which takes seconds.
"""

import sys

sys.modules["torch"] = None
