"""What a run cost, in the forms that publishers fill in: model cards, BoAmps reports, the EU's model documentation.

Every number comes from the ledger, the run directory or a factor that was stated, and carries its band, scope, source
and method. An estimate says so. What is not known is left out, and `missing` says what that was.
"""

from moe.disclosure.boamps import boamps
from moe.disclosure.facts import Facts, facts_of
from moe.disclosure.gpai import gpai
from moe.disclosure.model_card import front_matter, markdown

__all__ = ["Facts", "boamps", "facts_of", "front_matter", "gpai", "markdown"]
