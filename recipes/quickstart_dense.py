"""The dense twin of quickstart_moe: same attention, depth, width, data and active parameters, no routing.

accelerate launch recipes/quickstart_dense.py [section.field=value …]
"""

import dataclasses

from quickstart_moe import RECIPE as MOE

from moe.config import RunConfig
from moe.trainer import main

RECIPE = dataclasses.replace(MOE, run=RunConfig(name="quickstart_dense"), model=MOE.model.dense_twin(match="active"))

if __name__ == "__main__":
    main(RECIPE)
