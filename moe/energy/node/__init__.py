"""Energy of whole nodes, measured by others or beside the devices, held against what the devices of a run used.

    from moe.energy import fold_ledgers
    from moe.energy.node import read_node_file, reconcile

    print(reconcile(fold_ledgers([Path("ledger.jsonl")]), read_node_file(Path("pdu.csv"))).unseen_share)

A node contains its devices: the two are compared, never added.
"""

from moe.energy.node.files import read_node_file
from moe.energy.node.reconcile import NodeReconciliation, node_readings, reconcile
from moe.energy.node.series import NodeSeries

__all__ = ["NodeReconciliation", "NodeSeries", "node_readings", "read_node_file", "reconcile"]
