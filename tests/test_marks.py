"""The marks that follow from others, and the process in which a test runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import FACTOR_VARIABLE, examples


def test_long_tests_are_slow_those_that_install_are_long_and_ray_has_one_process(request):
    plugin = request.config.pluginmanager.get_plugin("suite")
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


def test_pytest_xdist_knows_the_group_of_a_test(request):
    has_group = request.node.nodeid.endswith("@test_marks")
    assert has_group == getattr(request.config.option, "loadgroup", False)


@given(number=st.integers())
def test_of_random_numbers_are_laws(number):
    assert number + 1 > number


def test_long_runs_try_a_law_on_more_examples(request, monkeypatch):
    marks = {
        item.name: item.get_closest_marker("law") is not None
        for item in request.session.items
        if item.path == request.path
    }
    assert marks.pop("test_of_random_numbers_are_laws", True)
    assert not any(marks.values())
    monkeypatch.delenv(FACTOR_VARIABLE, raising=False)
    assert examples(7) == 7
    monkeypatch.setenv(FACTOR_VARIABLE, "20")
    assert examples(7) == 140
