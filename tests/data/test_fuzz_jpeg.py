import pytest
from fuzz_jpeg import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.needs("cc", "jpeg_in_c")]


def test_ten_seconds_of_changed_jpegs_end_without_a_finding_of_the_sanitizers():
    """For an hour: python tests/data/fuzz_jpeg.py 3600 SEED."""
    counted = fuzz(10)
    calls, pictures, copies = (int(word) for word in counted.split()[:5:2])
    assert calls > 1000 and pictures > calls / 10 and copies > calls / 500, counted
