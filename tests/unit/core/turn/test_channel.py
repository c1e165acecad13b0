"""Channel data on the wire, and the channel numbers of an allocation (docs/protocol/data-plane.md, 3.7 and 9.5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firezone_tunnel.core.packet.layout import Rows
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.turn.channel import ChannelBindings
from firezone_tunnel.core.turn.channel_data import (
    FIRST_CHANNEL,
    LAST_CHANNEL,
    ChannelData,
    common_channel_data,
    encode_channel_data,
    parse_channel_data,
)

PEER, OTHER = SocketAddress("203.0.113.1", 52625), SocketAddress("203.0.113.2", 52625)


class TestFraming:
    def test_the_header_is_channel_and_length_in_network_order(self) -> None:
        assert encode_channel_data(0x4001, b"hello").hex() == "40010005" + b"hello".hex()

    def test_nothing_is_padded(self) -> None:
        assert len(encode_channel_data(FIRST_CHANNEL, b"1")) == 5

    @given(st.integers(0x4000, 0x7FFF), st.binary(max_size=2000))
    def test_encoded_data_is_read_back(self, channel: int, payload: bytes) -> None:
        for exact in (True, False):
            data = parse(encode_channel_data(channel, payload), exact=exact)

            assert data is not None
            assert (data.number, bytes(data.payloads.row(0))) == (channel, payload)

    @pytest.mark.parametrize("datagram", ["", "400000", "40000001", "4000000100ff", "4000000200", "40000000ff"])
    def test_the_length_must_be_exact(self, datagram: str) -> None:
        assert parse(bytes.fromhex(datagram), exact=True) is None

    @pytest.mark.parametrize("channel", [0x0000, 0x0001, 0x3FFF, 0x8000, 0xFFFF])
    def test_other_numbers_are_not_channels(self, channel: int) -> None:
        assert parse(encode_channel_data(channel, b"payload"), exact=True) is None

    @given(st.binary(max_size=64))
    def test_any_bytes_are_either_refused_or_written_back_unchanged(self, datagram: bytes) -> None:
        data = parse(datagram, exact=True)

        if data is None:
            number, length = int.from_bytes(datagram[:2], "big"), int.from_bytes(datagram[2:4], "big")
            assert len(datagram) < 4 or not 0x4000 <= number <= 0x7FFF or length != len(datagram) - 4
        else:
            assert encode_channel_data(data.number, data.payloads.row(0)) == datagram

    def test_a_relay_ignores_padding(self) -> None:
        data = parse(bytes.fromhex("4001000241420000"), exact=False)

        assert data is not None
        assert (data.number, bytes(data.payloads.row(0))) == (0x4001, b"AB")

    @given(
        st.lists(st.binary(max_size=3), min_size=2, max_size=4).map(b"".join) | st.binary(min_size=8, max_size=64),
        st.integers(4, 20),
        st.booleans(),
    )
    def test_the_data_of_a_batch_equals_the_data_of_its_datagrams(self, data: bytes, size: int, exact: bool) -> None:
        rows = Rows.segments(memoryview(data), len(data), size)

        common = common_channel_data(rows, exact=exact)

        if common is not None:
            each = [parse_channel_data(rows, index, exact=exact) for index in range(rows.count)]
            assert {data.number for data in each if data is not None} == {common.number}
            expected = [bytes(data.payloads.row(0)) for data in each if data is not None]
            assert list(map(bytes, common.payloads.each())) == expected

    @given(st.integers(0x4000, 0x7FFF), st.integers(1, 20), st.integers(1, 5), st.booleans())
    def test_datagrams_of_one_channel_are_taken_together(self, number: int, size: int, count: int, exact: bool) -> None:
        payloads = [bytes([index]) * size for index in range(count)] + [b"z"]
        data = b"".join(encode_channel_data(number, payload) for payload in payloads)

        common = common_channel_data(Rows.segments(memoryview(data), len(data), size + 4), exact=exact)

        assert common is not None
        assert (common.number, list(map(bytes, common.payloads.each()))) == (number, payloads)


def parse(datagram: bytes, *, exact: bool) -> ChannelData | None:
    return parse_channel_data(Rows.single(memoryview(datagram)), exact=exact)


class TestNumbers:
    def test_the_first_is_0x4000_and_the_others_follow(self) -> None:
        bindings = ChannelBindings()

        assert [bindings.bind(peer(number), 0.0) for number in range(3)] == [0x4000, 0x4001, 0x4002]

    def test_all_are_used_once_before_any_is_used_again(self) -> None:
        bindings = ChannelBindings()
        numbers = [bind(bindings, peer(number), float(number)) for number in range(4096)]
        assert numbers == list(range(FIRST_CHANNEL, LAST_CHANNEL + 1))
        assert bindings.bind(PEER, 4096.0) == FIRST_CHANNEL, "it ended at 600 and was free from 900 on"

    def test_a_freed_number_waits_for_its_turn(self) -> None:
        bindings = ChannelBindings()
        bindings.remove(bind(bindings, PEER, 0.0))

        assert bindings.bind(OTHER, 1.0) == 0x4001

    def test_numbers_run_out_while_all_are_bound_or_cooling_down(self) -> None:
        bindings = ChannelBindings()
        for number in range(4096):
            bind(bindings, peer(number), 0.0)

        assert [bindings.bind(PEER, now) for now in (1.0, 599.9, 600.0, 899.9)] == [None] * 4
        assert bindings.bind(PEER, 900.0) == 0x4000
        assert bindings.channel_to(peer(0), 900.0) is None
        assert bindings.channel_to(PEER, 900.0) == 0x4000

    def test_a_refused_bind_makes_room_at_once(self) -> None:
        bindings = ChannelBindings()
        for number in range(4096):
            bind(bindings, peer(number), 0.0)
        assert bindings.bind(PEER, 1.0) is None
        bindings.remove(0x4123)

        assert bindings.bind(PEER, 1.0) == 0x4123

    def test_the_same_peer_gets_its_number_again_while_it_cools_down(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        bind(bindings, OTHER, 0.0)

        assert bindings.bind(PEER, 700.0) == number

    def test_an_ipv4_and_an_ipv6_peer_are_two(self) -> None:
        bindings = ChannelBindings()

        assert bindings.bind(PEER, 0.0) != bindings.bind(SocketAddress("2001:db8::1", PEER.port), 0.0)


class TestLifetime:
    def test_a_channel_can_be_sent_on_as_soon_as_it_is_requested(self) -> None:
        bindings = ChannelBindings()
        assert bindings.channel_to(PEER, 0.0) is None
        number = bindings.bind(PEER, 0.0)

        assert bindings.channel_to(PEER, 5.0) == number

    def test_nothing_is_received_before_the_relay_confirmed_it(self) -> None:
        bindings = ChannelBindings()
        number = bindings.bind(PEER, 0.0)
        assert number is not None
        assert bindings.received(number, 0.5) is None
        bindings.confirm(number, 1.0)

        assert bindings.received(number, 1.0) == PEER

    def test_an_unknown_number_belongs_to_no_peer(self) -> None:
        bindings = ChannelBindings()
        bindings.confirm(0x4000, 0.0)
        bindings.remove(0x4000)

        assert bindings.received(0x4000, 0.0) is None

    def test_it_ends_600_seconds_after_the_bind_was_confirmed(self) -> None:
        bindings = ChannelBindings()
        number = bindings.bind(PEER, 0.0)
        assert number is not None
        bindings.confirm(number, 2.0)

        assert (bindings.channel_to(PEER, 601.9), bindings.received(number, 601.9)) == (number, PEER)
        assert (bindings.channel_to(PEER, 602.0), bindings.received(number, 602.0)) == (None, None)

    def test_an_expired_channel_receives_nothing_until_it_is_confirmed_again(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        assert bindings.bind(PEER, 650.0) == number

        assert bindings.channel_to(PEER, 650.0) == number
        assert bindings.received(number, 650.0) is None
        bindings.confirm(number, 651.0)
        assert bindings.received(number, 1250.9) == PEER

    def test_a_bind_is_not_repeated_while_one_is_in_flight_or_holds(self) -> None:
        bindings = ChannelBindings()
        number = bindings.bind(PEER, 0.0)
        assert number is not None
        assert bindings.bind(PEER, 1.0) is None
        bindings.confirm(number, 2.0)

        assert bindings.bind(PEER, 601.9) is None
        assert bindings.bind(PEER, 602.0) == number


class TestRefresh:
    def test_it_is_due_after_300_seconds_if_data_was_received(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        bindings.received(number, 10.0)

        assert bindings.next_refresh() == 300.0
        assert bindings.take_refreshes(299.9) == []
        assert bindings.take_refreshes(300.0) == [(number, PEER)]
        assert bindings.next_refresh() is None, "one in flight is enough"

    def test_without_received_data_it_is_left_to_expire(self) -> None:
        bindings = ChannelBindings()
        bind(bindings, PEER, 0.0)
        bindings.channel_to(PEER, 200.0)  # sending does not count

        assert bindings.take_refreshes(300.0) == []
        assert bindings.next_refresh() is None
        assert bindings.take_refreshes(599.0) == []

    def test_data_after_300_seconds_makes_it_due_at_once(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        assert bindings.take_refreshes(300.0) == []
        bindings.received(number, 450.0)

        assert bindings.next_refresh() == 450.0
        assert bindings.take_refreshes(450.0) == [(number, PEER)]

    def test_data_before_the_last_bind_does_not_count(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        bindings.received(number, 10.0)
        assert bindings.take_refreshes(300.0) == [(number, PEER)]
        bindings.confirm(number, 300.1)

        assert bindings.take_refreshes(600.1) == []
        assert bindings.channel_to(PEER, 900.0) == number, "the refresh lengthened its life"

    def test_a_channel_goes_on_while_its_refresh_is_in_flight(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        bindings.received(number, 10.0)
        bindings.take_refreshes(300.0)

        assert (bindings.channel_to(PEER, 301.0), bindings.received(number, 301.0)) == (number, PEER)

    def test_a_refused_refresh_ends_the_channel(self) -> None:
        bindings = ChannelBindings()
        number = bind(bindings, PEER, 0.0)
        bindings.received(number, 10.0)
        bindings.take_refreshes(300.0)
        bindings.remove(number)

        assert (bindings.channel_to(PEER, 301.0), bindings.received(number, 301.0)) == (None, None)
        assert bindings.next_refresh() is None

    def test_each_channel_has_its_own_time(self) -> None:
        bindings = ChannelBindings()
        first, second = bind(bindings, PEER, 0.0), bind(bindings, OTHER, 50.0)
        bindings.received(first, 60.0)
        bindings.received(second, 60.0)

        assert bindings.take_refreshes(320.0) == [(first, PEER)]
        assert bindings.next_refresh() == 350.0
        assert bindings.take_refreshes(350.0) == [(second, OTHER)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bind", "confirm", "remove", "receive", "refresh"]),
            st.integers(0, 5),
            st.floats(0.0, 400.0),
        ),
        max_size=60,
    )
)
def test_a_number_never_stands_for_two_peers_within_its_cool_down(steps: list[tuple[str, int, float]]) -> None:
    bindings = ChannelBindings()
    now = 0.0
    owners: dict[int, SocketAddress] = {}
    bound_at: dict[int, float] = {}
    for action, which, pause in steps:
        now += pause
        address = peer(which)
        number = FIRST_CHANNEL + which
        if action == "bind":
            requested = bindings.bind(address, now)
            if requested is not None:
                recently = now - bound_at.get(requested, float("-inf")) < 900.0
                assert owners.get(requested) in {None, address} or not recently
                owners[requested] = address
                assert bindings.channel_to(address, now) == requested
        elif action == "confirm" and number in owners:
            bindings.confirm(number, now)
            bound_at[number] = now
            assert bindings.received(number, now) == owners[number]
        elif action == "remove" and number in owners:
            bindings.remove(number)
            del owners[number]
        elif action == "receive":
            assert bindings.received(number, now) in {None, owners.get(number)}
        elif action == "refresh":
            for refreshed, whose in bindings.take_refreshes(now):
                assert owners[refreshed] == whose
                assert 300.0 <= now - bound_at[refreshed] < 600.0


def peer(number: int) -> SocketAddress:
    return SocketAddress(f"10.0.{number >> 8}.{number & 255}", 52625)


def bind(bindings: ChannelBindings, whom: SocketAddress, now: float) -> int:
    number = bindings.bind(whom, now)
    assert number is not None
    bindings.confirm(number, now)
    return number
