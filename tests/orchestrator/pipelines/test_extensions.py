"""Three tables to which packages add: names, contracts, clashes, and what a broken package does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from installed_package import PACKAGE, install, on_path
from refusals import refused

from iiet import METHODS
from iiet.extensions import ExtensionError
from iiet.iiad.influence import INFLUENCE_METRICS
from orchestrator.cli import main
from orchestrator.pipelines.doctor import examine, extension_points
from orchestrator.settings import Settings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import open_workspace
from orchestrator.workspace.provenance import extension_packages

GROUPS = {table.group: table for table in extension_points()}
SOURCE = """
from iiet.iiad.influence import Comparison


class Distance(Comparison):
    def compare(self, before, after):
        return (after - before).norm(dim=-1)
"""
NAMES = {
    "iiet.influence_metrics": {
        "distance": "of_mine:Distance",
        "no_class": "of_mine:SOURCE",
        "broken": "of_mine_broken:Metric",
    },
    "iiet.methods": {"broken_method": "of_mine_broken:Method"},
    "iiet_orch.depth": {"broken_kind": "of_mine_broken:Kind"},
}
BROKEN = "import iiet\nraise ImportError('libfoo.so is\\nmissing')\n"


@pytest.fixture
def site(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "site"
    install(folder, {"of_mine": SOURCE + "SOURCE = 1\n", "of_mine_broken": BROKEN}, NAMES)
    with on_path(folder):
        yield folder


def test_the_tables_hold_this_projects_classes_first():
    first_names = {group: next(iter(table)) for group, table in GROUPS.items()}
    assert first_names == {
        "iiet.methods": "vanilla",
        "iiet.influence_metrics": "cosine",
        "iiet_orch.depth": "ouro",
    }
    for table in extension_points():
        assert all(table[name] for name in table.own_classes)
        assert not table.entry_points()
    assert extension_packages() == {}


def test_names_of_packages_come_after_and_are_looked_up_when_used(site):
    assert list(INFLUENCE_METRICS) == [
        "cosine", "relative", "loss", "broken", "distance", "no_class",
    ]  # fmt: skip
    assert len(INFLUENCE_METRICS) == 6
    assert INFLUENCE_METRICS["distance"].__module__ == "of_mine"
    assert INFLUENCE_METRICS.package("distance") == f"{PACKAGE} 1.0"
    assert INFLUENCE_METRICS.package("cosine") is None
    assert extension_packages() == {PACKAGE: "1.0"}
    assert METHODS["iiet"], "a broken package does not disturb what does not use it"
    with pytest.raises(KeyError):
        METHODS["no such"]
    assert METHODS.get("no such") is None
    with refused(ExtensionError, "'no such'", "vanilla"):
        METHODS["no such"]
    # If a package uses a name of this project, the project's own class stays.
    own_class = METHODS["iiet"]
    install(site / "other", {}, {"iiet.methods": {"iiet": "a:B"}}, name="other")
    with on_path(site / "other"):
        assert METHODS["iiet"] is own_class
        assert METHODS.package("iiet") is None


def test_what_cannot_be_used_is_one_sentence_before_the_work(site, capsys, tmp_path):
    for command, change, words in (
        (
            "influence", "influence.metric=broken",
            "the influence metric 'broken' of the package my-extensions 1.0 cannot be imported "
            "from of_mine_broken:Metric (ImportError: libfoo.so is missing); repair the package",
        ),
        ("influence", "influence.metric=no_class", "iiet.iiad.influence:InfluenceMetric, got 1"),
        (
            "influence", "influence.metric=angel",
            "influence.metric: input should be 'cosine', 'relative', 'loss', 'broken', 'distance' "
            "or 'no_class'; got 'angel'",
        ),
    ):  # fmt: skip
        assert main([command, "--set", change, "--workspace", str(tmp_path / "ws")]) == 2
        printed = capsys.readouterr().err
        assert words in " ".join(printed.split())
        assert "Traceback" not in printed
    for change, words in (
        ("model.method=broken_method", "model.method: the method 'broken_method' of the package"),
        ("sweep.methods=[iiet, broken_method]", "sweep.methods: the method 'broken_method' of the"),
    ):
        with pytest.raises(UserError) as error:
            resolve_settings({}, [change])
        assert words in str(error.value)


def test_settings_take_the_names_of_packages(site):
    settings = resolve_settings({}, ["influence.metric=distance"])
    assert settings.influence.metric == "distance"
    schema = Settings.model_json_schema()["$defs"]
    metric, _none = schema["InfluenceSettings"]["properties"]["metric"]["anyOf"]
    assert "distance" in metric["enum"]


def test_doctor_lists_what_packages_add(site, tmp_path):
    findings = [
        finding for finding in examine(open_workspace(tmp_path)) if finding.name == "extensions"
    ]
    assert len(findings) == 5
    usable = {finding.text for finding in findings if finding.state == "ok"}
    assert usable == {f"the influence metric distance of {PACKAGE} 1.0"}
    remedies = {finding.remedy for finding in findings if finding.state == "broken"}
    assert remedies == {f"repair the package {PACKAGE} 1.0, or uninstall it"}
