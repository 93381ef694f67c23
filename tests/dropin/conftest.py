"""What the parity tests compare with, by name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))  # `side_by_side`
