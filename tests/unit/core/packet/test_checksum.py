from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.packet.checksum import RowSums, checksum, update, word_sum
from tests.unit.core.packet.packets import slow_sum


@given(st.binary(max_size=200))
def test_a_checksum_matches_rfc_1071(data: bytes) -> None:
    assert checksum(data) == ~slow_sum(data) & 0xFFFF


@given(st.binary(min_size=4, max_size=60).filter(any), st.integers(0, 20), st.integers(0, 0xFFFF))
def test_an_update_is_equivalent_to_a_new_computation(data: bytes, word: int, new: int) -> None:
    at = 2 * (word % (len(data) // 2))
    changed = data[:at] + new.to_bytes(2, "big") + data[at + 2 :]

    updated = update(checksum(data), int.from_bytes(data[at : at + 2], "big"), new)

    assert slow_sum(updated.to_bytes(2, "big") + changed) in {0, 0xFFFF}


@given(
    st.binary(min_size=200, max_size=400),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(0, 7),
)
def test_row_sums_equal_the_sum_of_each_row(memory: bytes, rows: int, gap: int, length: int, offset: int) -> None:
    stride = length + gap

    sums = RowSums(bytearray(memory), rows=rows, stride=stride, offset=offset, length=length).of(rows)

    for row in range(rows):
        start = offset + row * stride
        expected = word_sum(memory[start : start + length])
        assert int(sums[row]) * 256 % 0xFFFF == expected
