"""A JPEG's markers: what they tell of a file without decoding it."""

import pytest

from locfast.data.decode.jpeg import is_whole


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_a_whole_jpeg_is_told_from_a_damaged_one(picture, encode, options):
    data = encode(picture(90, 70), quality=90, **options)
    scan = data.rindex(b"\xff\xda")
    assert is_whole(data)
    assert is_whole(data + b"anything behind it")
    assert not is_whole(data[:-2])
    assert not is_whole(data[: len(data) // 2])
    assert not is_whole(data[: scan + 30] + b"\xff\xe5" + data[scan + 32 :])
    assert not is_whole(b"\x89PNG" + data)
    assert not is_whole(b"")
