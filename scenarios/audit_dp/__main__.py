"""The process in which a promise is audited: `python -P -m fedtap.scenarios.audit_dp SETTINGS`, as `fedtap audit-dp`
starts it.

It exits 0 once the audit is done, and 2 where the promise could not be audited; audit_dp.json says why.
"""

from __future__ import annotations

import os
import sys

import torch

from fedtap.scenarios.audit_dp.audit import PromiseAudit, PromiseAuditSettings
from fedtap.simulator.errors import FedtapError

if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on tensors of this size a second thread costs many times what it brings
    try:
        PromiseAudit(PromiseAuditSettings.of(sys.argv[1])).run()
    except FedtapError as error:
        raise SystemExit(error.code) from error
