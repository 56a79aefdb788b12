"""From joules to carbon, water, embodied carbon and money, each with its band, its factors and their sources.

    from moe.energy.footprint import Stated, footprint_of

Nothing is filled in: a factor comes from the user, from a shipped row the user names, or is a range.
"""

from moe.energy.footprint.basis import Basis
from moe.energy.footprint.report import Footprint, Stated, footprint_of

__all__ = ["Basis", "Footprint", "Stated", "footprint_of"]
