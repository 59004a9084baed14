"""What is compared here comes from the same programs or allows for rounding, so that nothing needs an optimising compiler."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(unoptimised: None) -> None:
    pass
