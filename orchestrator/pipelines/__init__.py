"""One module for each thing that a user does, which combines the other packages.

Common arguments: `workspace` is a workspace or its folder; `progress` a progress display (none when
unset); `context` both of them, opened, with MLflow's store; `name` of a sweep is made from its
content when unset.
"""
