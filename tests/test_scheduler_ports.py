"""The package and its tests beside other clusters on the same machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from clusters import users_cluster
from distributed import Client

from ks4stream.engine.cluster import local_client

ROOT = Path(__file__).parents[1]
HOMES = {ROOT / "ks4stream" / "engine" / "cluster.py", ROOT / "tests" / "helpers" / "clusters.py"}
STARTERS = {"LocalCluster", "SpecCluster", "Scheduler"}


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the last part of what is called."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


@pytest.mark.slow
def test_schedulers_are_started_in_two_places_which_ask_for_no_port() -> None:
    files = [path for folder in ("ks4stream", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for name, call in calls_of(path):
            assert name not in STARTERS or path in HOMES, f"{path}:{call.lineno}: use clusters.users_cluster"
            alone = name == "Client" and not call.args and not call.keywords
            assert not alone, f"{path}:{call.lineno}: Client() starts a cluster, with a dashboard on port 8787"


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (local_client, {"n_workers": 1, "processes": False}),
        pytest.param(local_client, {"n_workers": 1, "processes": True}, marks=pytest.mark.slow),
        (users_cluster, {"n_workers": 0}),
    ],
    ids=["threads", "processes", "a user's"],
)
def test_dasks_own_ports_are_left_to_others(start: Any, options: dict[str, Any]) -> None:
    """A scheduler that asks for one gets it where it is free, and warns, which is an error, where it is taken."""
    cluster: AbstractContextManager[Client] = start(**options)
    with cluster as client:
        scheduler = client.scheduler_info()
        assert scheduler["services"]["dashboard"] != 8787
        assert not scheduler["address"].endswith(":8786")
