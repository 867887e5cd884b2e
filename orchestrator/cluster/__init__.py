"""The only imports of Ray: start or join it, place workers, run Ray Train and Ray Tune.

`launch.py` chooses between Ray and this process (`local.py`).
"""

from orchestrator.cluster.environment import prepare_environment

prepare_environment()
