"""What tests of the pipeline's parts share; a module that needs others has fixtures of its own."""

from __future__ import annotations

import pytest

from tests.data.prepared_files import make_dataset, toy_template
from vlmscale.data.conversation import Template
from vlmscale.data.dataset import Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="module")
def template() -> Template:
    return toy_template()
