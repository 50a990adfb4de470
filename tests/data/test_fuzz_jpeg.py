import pytest
from fuzz_jpeg import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.needs("cc", "jpeg_in_c")]


def test_ten_seconds_of_changed_jpegs_end_without_a_finding_of_the_sanitizers():
    """For an hour: python tests/data/fuzz_jpeg.py 3600 SEED."""
    counted = fuzz(10)
    calls, pictures = (int(number) for number in counted.replace(",", "").split()[:3:2])
    assert calls > 1000 and pictures > calls / 10, counted
