"""One module for each thing that a person does; here packages are composed.

Everywhere, `workspace` is a workspace or its folder, `progress` a progress display (none when
unset), `context` both of them opened, with MLflow's store, and `name` of a sweep is made from its
content when unset.
"""
