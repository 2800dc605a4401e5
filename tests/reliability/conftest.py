"""One server of forks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk_bench import Bench
from results import RESULTS, Results
from stage_cases import Cases, Inputs, write_inputs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--crash-results", action="store_true", help="Write crash.json.")
    parser.addoption("--crash-case", action="append", help="Only this case of test_crash.py.")
    parser.addoption("--crash-moments", type=int, default=100, help="Random moments to kill at.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``--crash-case NAME`` keeps the tests of a command: so ``crash.json`` is made in pieces."""
    wanted = config.getoption("--crash-case", None)
    if wanted:
        named = {item: getattr(item, "callspec", None) for item in items}
        items[:] = [i for i, spec in named.items() if spec and spec.params.get("name") in wanted]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return Results(RESULTS if request.config.getoption("--crash-results", False) else None)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def inputs(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    model = make_model("llama", "bfloat16", "100KB")  # several shards
    return write_inputs(tmp_path_factory.mktemp("inputs"), model)


@pytest.fixture(scope="session")
def cases(bench: Bench, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(bench, inputs, tmp_path_factory.mktemp("states"))
