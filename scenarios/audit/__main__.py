"""The process in which an app is audited: `python -P -m fedtap.scenarios.audit SETTINGS`, as `fedtap audit` starts it.

It exits 0 once the audit is done, and 2 where the app could not be audited; audit.json says why.
"""

from __future__ import annotations

import os
import sys

import torch

from fedtap.scenarios.audit.audit import Audit, AuditSettings
from fedtap.simulator.errors import FedtapError

if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on small nets' tensors a second thread costs many times what it brings
    try:
        Audit(AuditSettings.of(sys.argv[1])).run()
    except FedtapError as error:
        raise SystemExit(error.code) from error
