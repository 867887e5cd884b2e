"""The marks that follow from others, and the process in which a test runs."""

from pathlib import Path

import pytest


def test_long_tests_are_slow_those_that_install_are_long_and_ray_has_one_process(request):
    plugin = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    assert plugin
    names = ("test_that_installs", "test_of_a_formula", "test_under_ray")
    installs, formula, under_ray = [
        pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None)
        for name in names
    ]
    installs.add_marker("installs")
    plugin.pytest_collection_modifyitems(request.config, [installs, formula])
    assert {"long", "slow"} <= {mark.name for mark in installs.iter_markers()}
    assert [mark.args for mark in formula.iter_markers()] == [("test_marks",)]
    under_ray.fixturenames.append("ray_session")
    plugin.pytest_collection_modifyitems(request.config, [under_ray])
    assert next(under_ray.iter_markers("xdist_group")).args == ("ray",)
