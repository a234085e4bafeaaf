"""For scripts that tests start: torch, which is here for parity tests alone, is not there for them.

So it is where the package alone is installed. tensorboardX imports it where it can: seconds.
"""

import sys

sys.modules["torch"] = None
