"""Making an allocation: addresses, authentication, errors, retransmission.

See docs/protocol/data-plane.md, 3.2 to 3.5.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firezone_tunnel.core.ice.candidate import Candidate, CandidateKind
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.core.stun import message as stun
from firezone_tunnel.core.stun.message import Kind, Message, Method, long_term_key
from firezone_tunnel.core.turn.allocation import Allocation
from firezone_tunnel.core.turn.events import CandidateFound, FailureReason
from firezone_tunnel.core.turn.state import TRANSITIONS, State
from tests.hypothesis_profiles import examples
from tests.unit.core.turn.client import (
    KEY,
    LOCAL4,
    LOCAL6,
    MAPPED4,
    MAPPED6,
    OTHER4,
    PASSWORD,
    PEER4,
    RELAY4,
    RELAY6,
    RELAYED4,
    RELAYED6,
    USERNAME,
    Client,
    Sent,
    allocated,
    bound,
    reach_allocate,
)

HOST, REFLEXIVE, RELAYED = CandidateKind.HOST, CandidateKind.SERVER_REFLEXIVE, CandidateKind.RELAYED
FAILED_SILENTLY = ("failed", FailureReason.NO_RESPONSE, None)


class TestSockets:
    def test_both_addresses_of_a_relay_are_asked_at_once(self) -> None:
        client = Client()

        assert [(sent.at, sent.destination, sent.names) for sent in client.take(Method.BINDING)] == [
            (0.0, RELAY4, ["SOFTWARE"]),
            (0.0, RELAY6, ["SOFTWARE"]),
        ]

    @pytest.mark.parametrize("ipv6", [False, True])
    def test_the_first_answer_selects_the_address_we_use(self, ipv6: bool) -> None:
        client = Client()
        client.answer_binding(ipv6=ipv6)

        (sent,) = client.take()
        assert sent.message.method == Method.ALLOCATE
        assert sent.destination == client.allocation.active_socket == (RELAY6 if ipv6 else RELAY4)

    def test_the_second_answer_only_shows_candidates(self) -> None:
        client = Client()
        binding4, binding6 = client.take(Method.BINDING)
        client.answer(binding6.message, (stun.XOR_MAPPED_ADDRESS, MAPPED6), source=RELAY6)
        client.take_one(Method.ALLOCATE)
        client.take_events()
        client.answer(binding4.message, (stun.XOR_MAPPED_ADDRESS, MAPPED4))

        assert client.allocation.active_socket == RELAY6
        assert client.changes() == [("found", HOST, LOCAL4), ("found", REFLEXIVE, MAPPED4)]
        assert client.take() == []

    def test_an_answer_shows_a_host_candidate_and_a_reflexive_one_with_that_base(self) -> None:
        client = Client()
        client.answer_binding()

        assert client.take_events() == [
            CandidateFound(Candidate.host(LOCAL4)),
            CandidateFound(Candidate.server_reflexive(MAPPED4, LOCAL4)),
        ]

    def test_an_answer_from_another_socket_is_not_ours(self) -> None:
        client = Client(ipv6=None)
        (binding,) = client.take()
        mapped = (stun.XOR_MAPPED_ADDRESS, MAPPED4)

        assert not client.answer(binding.message, mapped, source=SocketAddress(RELAY4.host, 3479))
        assert not client.answer(binding.message, mapped, source=SocketAddress("198.51.100.2", 3478))
        assert not client.answer(binding.message, mapped, local=LOCAL6)
        assert client.allocation.active_socket is None
        assert client.answer(binding.message, mapped)

    def test_an_answer_to_nothing_is_not_ours(self) -> None:
        client = Client(ipv6=None)
        (binding,) = client.take()
        mapped = (stun.XOR_MAPPED_ADDRESS, MAPPED4)
        other = Message(Method.BINDING, Kind.REQUEST, bytes(12))

        assert not client.answer(other, mapped)
        assert client.answer(binding.message, mapped)
        assert not client.answer(binding.message, mapped), "it was answered already"
        assert client.allocation.counters.unexpected == 2

    def test_a_request_is_not_an_answer(self) -> None:
        client = Client(ipv6=None)
        (binding,) = client.take()

        assert not client.allocation.handle_message(binding.message, RELAY4, LOCAL4, client.now)

    @pytest.mark.parametrize("attributes", [(), ((stun.XOR_MAPPED_ADDRESS, MAPPED6),)])
    def test_a_binding_answer_without_a_valid_address_is_ignored(self, attributes: tuple[object, ...]) -> None:
        client = Client(ipv6=None)
        (binding,) = client.take()
        client.answer(binding.message, *attributes)

        assert client.changes() == []
        client.run_until(1.0)
        assert len(client.take(Method.BINDING)) == 1

    def test_a_relay_without_an_address_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no address"):
            Client(ipv4=None, ipv6=None)

    def test_credentials_too_long_for_a_message_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="bytes"):
            Allocation(
                "relay",
                ipv4=RELAY4,
                ipv6=None,
                username="x" * 513,
                password="",
                entropy=bytes,
                now=0.0,
            )


class TestRequests:
    def test_the_first_contact_goes_as_specified(self) -> None:
        client = Client()  # docs/protocol/data-plane.md, 12.4
        client.answer_binding()
        first = client.take_one(Method.ALLOCATE)
        client.challenge(first, nonce="the nonce")
        second = client.take_one(Method.ALLOCATE)
        client.grant(second)

        assert first.transaction_id != second.transaction_id
        assert first.attributes == (
            (stun.REQUESTED_TRANSPORT, 17),
            (stun.ADDITIONAL_ADDRESS_FAMILY, 2),
            (stun.SOFTWARE, "firezone_tunnel"),
            (stun.USERNAME, USERNAME),
            (stun.REALM, "firezone"),
        )
        assert second.attributes == (*first.attributes, (stun.NONCE, "the nonce"))
        assert first.is_authentic(KEY)
        assert second.is_authentic(KEY)
        assert not first.has_fingerprint
        assert (client.allocation.relayed(False), client.allocation.relayed(True)) == (RELAYED4, RELAYED6)
        assert [line for line in client.changes() if line[1] is RELAYED] == [
            ("found", RELAYED, RELAYED4),
            ("found", RELAYED, RELAYED6),
        ]

    def test_values_are_encoded_as_the_relay_expects_them(self) -> None:
        _, allocate = reach_allocate()
        client = allocated()
        client.bind(PEER4)
        bind = client.take_one(Method.CHANNEL_BIND)

        assert bytes.fromhex("0019 0004 11000000 8000 0004 02000000") in allocate.raw
        assert bytes.fromhex("000c 0004 4000 0000") in bind.raw

    def test_a_refresh_carries_neither_transport_nor_family(self) -> None:
        client = allocated()
        client.run_until(300.0)

        (refresh,) = client.take(Method.REFRESH)
        assert refresh.names == ["SOFTWARE", "USERNAME", "REALM", "NONCE", "MESSAGE-INTEGRITY"]

    def test_a_channel_bind_names_peer_and_number(self) -> None:
        client = allocated()
        client.bind(PEER4)

        (sent,) = client.sent
        assert sent.names == [
            "XOR-PEER-ADDRESS",
            "CHANNEL-NUMBER",
            "SOFTWARE",
            "USERNAME",
            "REALM",
            "NONCE",
            "MESSAGE-INTEGRITY",
        ]
        assert (sent.message.get(stun.XOR_PEER_ADDRESS), sent.message.get(stun.CHANNEL_NUMBER)) == (PEER4, 0x4000)
        assert sent.message.is_authentic(KEY)

    @pytest.mark.parametrize(("relayed", "is_ipv6"), [(RELAYED4, False), (RELAYED6, True)])
    def test_one_relayed_address_is_enough(self, relayed: SocketAddress, is_ipv6: bool) -> None:
        client = allocated(relayed)

        assert client.allocation.relayed(is_ipv6) == relayed
        assert client.allocation.relayed(not is_ipv6) is None

    def test_a_relayed_address_of_the_other_family_is_worth_less(self) -> None:
        client = allocated()

        assert client.allocation.candidates[-2:] == (
            Candidate.relayed(RELAYED4),
            Candidate.relayed(RELAYED6, other_family=True),
        )

    @pytest.mark.parametrize("relayed", [(), (SocketAddress("0.0.0.0", 50000),), (SocketAddress("198.51.100.1", 0),)])
    def test_a_grant_without_a_usable_address_is_ignored(self, relayed: tuple[SocketAddress, ...]) -> None:
        client, request = reach_allocate()
        client.take_events()
        addresses = [(stun.XOR_RELAYED_ADDRESS, address) for address in relayed]
        client.answer(request, *addresses, (stun.LIFETIME, 600))

        assert client.allocation.state is not State.ALLOCATED
        assert client.changes() == []

    def test_the_lifetime_is_600_seconds_if_the_relay_names_none(self) -> None:
        client, request = reach_allocate()
        client.answer(request, (stun.XOR_RELAYED_ADDRESS, RELAYED4))
        client.take()
        client.run_until(299.9)
        assert client.take(Method.REFRESH) == []
        client.run_until(300.0)

        assert len(client.take(Method.REFRESH)) == 1


class TestAuthentication:
    def test_a_stale_nonce_is_replaced(self) -> None:
        client = allocated()
        client.bind(PEER4)
        client.challenge(client.take_one(Method.CHANNEL_BIND), error=438, nonce="newer")
        again = client.take_one(Method.CHANNEL_BIND)
        client.answer(again)

        assert again.get(stun.NONCE) == "newer"
        assert again.is_authentic(KEY)
        assert again.get(stun.CHANNEL_NUMBER) == 0x4000
        assert client.allocation.peer_of(0x4000, client.now) == PEER4

    def test_a_challenge_starts_the_waiting_over(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.run_until(0.75)
        client.challenge(request)
        client.run_until(20.0)

        assert [sent.at for sent in client.take(Method.ALLOCATE)] == [0.75, 1.75, 3.25, 5.5]

    def test_401_although_we_had_a_nonce_means_that_the_credentials_are_wrong(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.challenge(request)
        client.challenge(client.take_one(Method.ALLOCATE), nonce="another")

        assert client.changes()[-1] == ("failed", FailureReason.CREDENTIALS_REJECTED, None)
        client.run_until(1000.0)
        client.refresh()
        client.restart()
        client.bind(PEER4)
        assert client.take() == []
        assert client.allocation.next_timeout() is None

    def test_credentials_that_are_rejected_later_take_the_candidates_along(self) -> None:
        client = bound(PEER4)
        client.run_until(300.0)
        client.challenge(client.take(Method.REFRESH)[0].message)

        assert client.changes() == [
            ("lost", RELAYED, RELAYED4),
            ("lost", RELAYED, RELAYED6),
            ("failed", FailureReason.CREDENTIALS_REJECTED, None),
        ]
        assert client.allocation.channel_to(PEER4, client.now) is None

    @pytest.mark.parametrize("attributes", [(), ((stun.NONCE, "n"), (stun.REALM, "elsewhere"))])
    def test_a_challenge_for_another_realm_or_without_a_nonce_is_refused(self, attributes: tuple[object, ...]) -> None:
        client, request = reach_allocate(ipv6=None)
        client.answer(request, *attributes, error=401)

        assert client.take() == []
        client.run_until(1.0)
        assert client.take_one(Method.ALLOCATE).get(stun.NONCE) is None

    @pytest.mark.parametrize("key", [long_term_key(USERNAME, "firezone", "wrong"), None], ids=["forged", "unsigned"])
    @pytest.mark.parametrize("error", [None, 401, 403, 420, 437, 438, 486, 500])
    def test_an_answer_that_is_not_signed_with_our_key_ends_nothing(self, key: bytes | None, error: int | None) -> None:
        client = bound(PEER4)
        client.run_until(300.0)
        refresh = client.take(Method.REFRESH)[0].message
        client.answer(refresh, (stun.REALM, "firezone"), (stun.NONCE, "trap"), (stun.LIFETIME, 0), error=error, key=key)

        assert client.allocation.state is State.ALLOCATED
        assert client.allocation.channel_to(PEER4, client.now) == 0x4000
        assert (client.take(), client.changes()) == ([], [])
        assert client.allocation.counters.unauthentic == 1
        assert client.answer(refresh, (stun.LIFETIME, 600)), "the real answer still counts"
        client.run_for(20.0)
        assert client.take(Method.REFRESH) == []

    def test_answers_signed_with_another_password_count_as_silence_with_a_reason_of_its_own(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.take_events()
        client.challenge(request, key=long_term_key(USERNAME, "firezone", "wrong"))
        client.run_until(8.1)
        assert client.changes() == []
        client.run_until(8.2)

        assert client.changes() == [("failed", FailureReason.NO_AUTHENTIC_RESPONSE, None)]

    def test_a_relay_that_finds_every_nonce_stale_is_not_asked_faster_and_faster(self) -> None:
        client = allocated()
        client.bind(PEER4)
        for number in range(50):
            for sent in client.take(Method.CHANNEL_BIND):
                client.challenge(sent.message, error=438, nonce=f"nonce {number}")

        assert client.allocation.counters.requests_sent < 10
        client.run_for(1.0)
        client.answer(client.take_one(Method.CHANNEL_BIND))
        assert client.allocation.peer_of(0x4000, client.now) == PEER4


class TestStandardServers:
    """coturn signs no challenge, and wants a request without credentials first (docs/decisions.md, 4)."""

    @pytest.mark.parametrize("error", [400, 401, 438])
    def test_after_an_unsigned_refusal_an_allocate_without_credentials_follows(self, error: int) -> None:
        client, request = reach_allocate()
        client.answer(request, error=error, key=None)
        (bare,) = client.take()
        client.challenge(bare.message, key=None, nonce="coturn's")
        signed = client.take_one(Method.ALLOCATE)
        client.grant(signed)

        assert bare.names == ["REQUESTED-TRANSPORT", "ADDITIONAL-ADDRESS-FAMILY", "SOFTWARE"]
        assert signed.get(stun.NONCE) == "coturn's"
        assert signed.is_authentic(KEY)
        assert client.allocation.state is State.ALLOCATED

    def test_only_one_allocate_is_sent_without_credentials(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.take_events()
        client.answer(request, error=400, key=None)
        client.answer(client.take_one(Method.ALLOCATE), error=400, key=None)

        assert client.take() == []
        client.run_until(20.0)
        assert client.changes() == [("failed", FailureReason.NO_AUTHENTIC_RESPONSE, None)]

    def test_a_forged_nonce_does_not_make_a_relay_reject_our_credentials(self) -> None:
        client, request = reach_allocate()
        client.challenge(request, key=None, nonce="forged")
        # Firezone's relay answers 401, not 438, to a nonce that it did not issue.
        client.challenge(client.take_one(Method.ALLOCATE), nonce="real")
        signed = client.take_one(Method.ALLOCATE)
        assert signed.get(stun.NONCE) == "real"
        client.challenge(signed, nonce="another")

        assert client.changes()[-1] == ("failed", FailureReason.CREDENTIALS_REJECTED, None)

    def test_firezones_realm_is_not_replaced_by_an_unsigned_realm(self) -> None:
        client, request = reach_allocate()
        client.answer(request, error=400, key=None)
        bare = client.take_one(Method.ALLOCATE)
        client.answer(bare, (stun.REALM, "elsewhere"), (stun.NONCE, "trap"), error=401, key=None)

        assert client.take() == []

    def test_without_a_configured_realm_the_server_names_it(self) -> None:
        client, first = reach_allocate(realm=None)
        client.answer(first, (stun.REALM, "example.org"), (stun.NONCE, "n"), error=401, key=None)
        signed = client.take_one(Method.ALLOCATE)
        key = long_term_key(USERNAME, "example.org", PASSWORD)
        client.answer(signed, (stun.XOR_RELAYED_ADDRESS, RELAYED4), (stun.LIFETIME, 600), key=key)

        assert first.get(stun.USERNAME) is None
        assert not first.has_integrity
        assert signed.get(stun.REALM) == "example.org"
        assert signed.is_authentic(key)
        assert client.allocation.state is State.ALLOCATED

    def test_a_server_that_grants_without_credentials_is_not_believed(self) -> None:
        client, first = reach_allocate(realm=None)
        client.answer(first, (stun.XOR_RELAYED_ADDRESS, RELAYED4), (stun.LIFETIME, 600), key=None)

        assert client.allocation.state is not State.ALLOCATED

    def test_its_unsigned_stale_nonce_is_replaced_while_the_allocation_lives(self) -> None:
        client = self._allocated()
        client.run_until(300.0)
        client.challenge(client.take(Method.REFRESH)[0].message, error=438, key=None, nonce="newer")
        again = client.take_one(Method.REFRESH)
        client.answer(again, (stun.LIFETIME, 600))

        assert again.get(stun.NONCE) == "newer"
        client.run_until(590.0)
        assert client.allocation.state is State.ALLOCATED
        assert client.changes() == []

    def test_an_unsigned_stale_nonce_does_not_override_the_servers_own_answer(self) -> None:
        client = self._allocated()
        client.run_until(300.0)
        refresh = client.take(Method.REFRESH)[0].message
        client.challenge(refresh, error=438, key=None, nonce="forged")
        client.answer(refresh, (stun.LIFETIME, 600))
        client.take()
        client.run_for(20.0)

        assert client.take(Method.REFRESH) == []
        assert client.allocation.state is State.ALLOCATED

    def test_an_unsigned_stale_nonce_for_an_earlier_transmission_is_ignored(self) -> None:
        client = self._allocated()
        client.run_until(300.0)
        refresh = client.take(Method.REFRESH)[0].message
        client.run_until(301.0)
        client.take()
        client.challenge(refresh, error=438, key=None, nonce="forged")

        assert client.take() == []
        assert client.allocation.credentials.nonce == "nonce"

    def test_a_later_challenge_does_not_change_the_realm(self) -> None:
        client = self._allocated()
        client.run_until(300.0)
        refresh = client.take(Method.REFRESH)[0].message
        client.answer(refresh, (stun.REALM, "elsewhere"), (stun.NONCE, "trap"), error=438, key=None)

        assert client.take() == []
        assert client.allocation.credentials.realm == "firezone"

    def test_an_unsigned_mismatch_is_not_believed_of_a_relay_that_signs_its_challenges(self) -> None:
        client, request = reach_allocate()
        client.challenge(request)
        client.answer(client.take_one(Method.ALLOCATE), error=437, key=None)

        assert client.take() == []

    @pytest.mark.parametrize("error", [401, 403, 420, 437, 500])
    def test_other_unsigned_errors_do_not_change_its_allocation(self, error: int) -> None:
        client = self._allocated()
        client.run_until(300.0)
        refresh = client.take(Method.REFRESH)[0].message
        client.answer(refresh, (stun.REALM, "firezone"), (stun.NONCE, "x"), error=error, key=None)

        assert client.take() == []
        assert client.allocation.state is State.ALLOCATED

    def test_wrong_credentials_show_as_silence_with_a_reason(self) -> None:
        client, request = reach_allocate(ipv6=None, realm=None)
        client.take_events()
        client.challenge(request, key=None)
        client.challenge(client.take_one(Method.ALLOCATE), key=None, nonce="another")
        client.run_until(20.0)

        assert client.changes() == [("failed", FailureReason.NO_AUTHENTIC_RESPONSE, None)]

    @pytest.mark.parametrize("realm", ["firezone", None])
    def test_an_allocation_left_by_an_earlier_process_is_deleted(self, realm: str | None) -> None:
        client, request = reach_allocate(ipv6=None, realm=realm)
        client.answer(request, error=437, key=None)
        deletion = client.take_one(Method.REFRESH)
        assert deletion.get(stun.LIFETIME) == 0
        if realm is not None:
            client.answer(deletion, error=400, key=None)
            deletion = client.take_one(Method.REFRESH)
        assert not deletion.has_integrity
        client.challenge(deletion, key=None)
        client.answer(client.take_one(Method.REFRESH), (stun.LIFETIME, 0))
        early = client.take_one(Method.ALLOCATE)
        client.answer(early, error=437, key=None)
        assert client.take() == [], "it takes a second to delete"
        client.run_for(1.0)
        client.grant(client.take_one(Method.ALLOCATE))

        assert client.allocation.state is State.ALLOCATED

    def test_after_a_network_change_its_nonce_is_renewed(self) -> None:
        client = self._allocated()
        client.restart()
        client.answer_binding()
        client.challenge(client.take_one(Method.ALLOCATE), error=438, key=None, nonce="newer")
        client.grant(client.take_one(Method.ALLOCATE))

        assert client.allocation.state is State.ALLOCATED

    def _allocated(self) -> Client:
        client, request = reach_allocate(ipv6=None, realm=None)
        client.challenge(request, key=None)
        client.grant(client.take_one(Method.ALLOCATE))
        client.take_events()
        return client


class TestErrors:
    def test_437_on_allocate_deletes_the_old_allocation(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.challenge(request)
        client.answer(client.take_one(Method.ALLOCATE), error=437)
        deletion = client.take_one(Method.REFRESH)
        client.answer(deletion, (stun.LIFETIME, 0))
        client.grant(client.take_one(Method.ALLOCATE))

        assert [attribute.name for attribute, _ in deletion.attributes] == [
            "SOFTWARE",
            "LIFETIME",
            "USERNAME",
            "REALM",
            "NONCE",
        ]
        assert deletion.get(stun.LIFETIME) == 0
        assert client.allocation.state is State.ALLOCATED

    def test_437_on_the_deletion_means_that_it_is_gone(self) -> None:
        client, request = reach_allocate()
        client.answer(request, error=437)
        client.answer(client.take_one(Method.REFRESH), error=437)
        client.grant(client.take_one(Method.ALLOCATE))

        assert client.allocation.state is State.ALLOCATED

    def test_437_on_refresh_allocates_anew(self) -> None:
        client = bound(PEER4)
        client.run_until(300.0)
        client.answer(client.take(Method.REFRESH)[0].message, error=437)

        assert client.changes() == [("lost", RELAYED, RELAYED4), ("lost", RELAYED, RELAYED6)]
        assert client.allocation.channel_to(PEER4, client.now) is None
        another = SocketAddress(RELAYED4.host, 50001)
        client.grant(client.take_one(Method.ALLOCATE), another)
        assert client.changes() == [("found", RELAYED, another)]

    def test_437_on_channel_bind_allocates_anew_and_binds_after_that(self) -> None:
        client = allocated()
        client.bind(PEER4, OTHER4)
        first, _ = client.take(Method.CHANNEL_BIND)
        client.answer(first.message, error=437)
        allocate = client.take_one(Method.ALLOCATE)
        assert client.changes() == [("lost", RELAYED, RELAYED4), ("lost", RELAYED, RELAYED6)]
        assert client.allocation.channel_to(PEER4, client.now) is None
        client.grant(allocate)

        assert {sent.message.get(stun.XOR_PEER_ADDRESS) for sent in client.take(Method.CHANNEL_BIND)} == {PEER4, OTHER4}

    def test_the_other_address_of_the_relay_is_still_asked_after_437(self) -> None:
        client = Client()
        binding4, binding6 = client.take(Method.BINDING)
        client.answer(binding4.message, (stun.XOR_MAPPED_ADDRESS, MAPPED4))
        client.answer(client.take_one(Method.ALLOCATE), error=437)

        assert client.answer(binding6.message, (stun.XOR_MAPPED_ADDRESS, MAPPED6), source=RELAY6)

    def test_the_other_address_is_still_asked_when_the_relay_forgot_us(self) -> None:
        client = Client()
        binding4, binding6 = client.take(Method.BINDING)
        client.answer(binding4.message, (stun.XOR_MAPPED_ADDRESS, MAPPED4))
        client.grant(client.take_one(Method.ALLOCATE))
        client.refresh()
        client.answer(client.take_one(Method.REFRESH), error=437)

        assert client.answer(binding6.message, (stun.XOR_MAPPED_ADDRESS, MAPPED6), source=RELAY6)

    def test_a_relay_may_restart_any_number_of_times(self) -> None:
        client = allocated()
        for _ in range(20):
            client.bind(PEER4)
            client.answer(client.take_one(Method.CHANNEL_BIND))
            client.refresh()
            client.answer(client.take_one(Method.REFRESH), error=437)
            client.grant(client.take_one(Method.ALLOCATE))

        assert client.allocation.state is State.ALLOCATED

    def test_a_relay_that_deletes_without_end_is_given_up(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.sent.append(Sent(0.0, RELAY4, request))
        for _ in range(600):
            for sent in client.take():
                if sent.message.method == Method.ALLOCATE:
                    client.answer(sent.message, error=437)
                else:
                    client.answer(sent.message, (stun.LIFETIME, 0))
            client.run_for(0.1)

        assert client.changes()[-1] == FAILED_SILENTLY
        assert client.allocation.counters.requests_sent < 30

    @pytest.mark.parametrize("method", [Method.ALLOCATE, Method.REFRESH, Method.CHANNEL_BIND])
    def test_420_fails_it(self, method: Method) -> None:
        client = allocated()
        if method == Method.ALLOCATE:
            client, request = reach_allocate()
        elif method == Method.REFRESH:
            client.refresh()
            request = client.take_one(method)
        else:
            client.bind(PEER4)
            request = client.take_one(method)
        client.answer(request, error=420)

        assert client.changes()[-1] == ("failed", FailureReason.PROTOCOL, None)
        assert client.allocation.state is not State.ALLOCATED
        assert client.allocation.next_timeout() is None

    @pytest.mark.parametrize("error", [400, 403, 442, 486, 500, 508])
    def test_another_error_on_allocate_suspends_it(self, error: int) -> None:
        client, request = reach_allocate(ipv6=None)
        client.bind(PEER4)
        client.take_events()
        client.answer(request, error=error)

        assert client.allocation.state is State.SUSPENDED
        assert client.allocation.next_timeout() is None
        assert (client.take(), client.changes()) == ([], [])
        client.bind(OTHER4)
        assert client.allocation.counters.binds_refused == 1
        client.refresh()
        client.answer_binding()
        client.grant(client.take_one(Method.ALLOCATE))
        assert client.take() == [], "neither peer was kept waiting"

    def test_a_suspended_allocation_can_begin_anew_while_the_other_address_is_still_asked(self) -> None:
        client, request = reach_allocate()
        client.answer(request, error=486)
        assert client.allocation.state is State.SUSPENDED
        client.refresh()

        assert [sent.destination for sent in client.take(Method.BINDING)] == [RELAY4, RELAY6]

    def test_another_error_on_channel_bind_forgets_the_channel(self) -> None:
        client = allocated()
        client.bind(PEER4)
        client.answer(client.take_one(Method.CHANNEL_BIND), error=403)

        assert client.allocation.channel_to(PEER4, client.now) is None
        assert client.allocation.state is State.ALLOCATED
        client.run_for(10.0)
        assert client.take() == [], "the request is not repeated"
        client.bind(PEER4)
        assert client.take_one(Method.CHANNEL_BIND).get(stun.XOR_PEER_ADDRESS) == PEER4

    def test_another_error_on_refresh_changes_nothing(self) -> None:
        client = bound(PEER4)
        client.run_until(300.0)
        client.answer(client.take(Method.REFRESH)[0].message, error=500)
        client.run_until(599.9)

        assert client.changes() == []
        assert client.take(Method.REFRESH) == []
        client.run_until(600.0)
        assert client.changes() == [("lost", RELAYED, RELAYED4), ("lost", RELAYED, RELAYED6)]

    def test_an_error_on_a_probe_leaves_the_regular_refresh_in_place(self) -> None:
        client = allocated()
        client.refresh()
        client.answer(client.take_one(Method.REFRESH), error=500)
        client.run_until(300.0)

        assert len(client.take(Method.REFRESH)) == 1

    def test_a_relay_that_never_agrees_is_left_alone(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.grant(request)
        for _ in range(100):
            client.bind(PEER4)
            for sent in client.take():
                if sent.message.method == Method.ALLOCATE:
                    client.grant(sent.message)
                else:
                    client.answer(sent.message, error=437)

        assert client.allocation.counters.requests_sent < 20
        assert client.allocation.state is State.SUSPENDED


class TestRetransmission:
    def test_a_binding_is_sent_four_times_with_the_same_id_and_given_up_after_8_seconds(self) -> None:
        client = Client(ipv6=None)
        client.run_until(8.124)
        assert client.changes() == []
        client.run_until(8.125)

        assert [sent.at for sent in client.sent] == [0.0, 1.0, 2.5, 4.75]
        assert len({sent.message.transaction_id for sent in client.sent}) == 1
        assert client.changes() == [FAILED_SILENTLY]

    def test_an_allocate_is_sent_four_times_with_different_ids(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.challenge(request)
        client.run_until(20.0)

        sent = client.take(Method.ALLOCATE)
        assert [request.at for request in sent] == [0.0, 1.0, 2.5, 4.75]
        assert len({request.message.transaction_id for request in sent}) == 4
        assert all(request.message.is_authentic(KEY) for request in sent)

    def test_a_retransmission_is_signed_with_the_latest_nonce(self) -> None:
        client = allocated()
        client.bind(PEER4, OTHER4)
        first, _ = client.take(Method.CHANNEL_BIND)
        client.challenge(first.message, error=438, nonce="newer")
        client.take()
        client.run_for(1.0)

        assert {sent.message.get(stun.NONCE) for sent in client.take(Method.CHANNEL_BIND)} == {"newer"}

    def test_a_late_grant_still_counts(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.challenge(request)
        first = client.take_one(Method.ALLOCATE)
        client.run_until(1.2)
        client.take_one(Method.ALLOCATE)
        client.grant(first)
        client.run_until(20.0)

        assert client.allocation.state is State.ALLOCATED
        assert client.take(Method.ALLOCATE) == []

    def test_a_late_error_does_not_count(self) -> None:
        client, request = reach_allocate(ipv6=None)
        client.challenge(request)
        first = client.take_one(Method.ALLOCATE)
        client.run_until(1.2)
        second = client.take_one(Method.ALLOCATE)
        client.answer(first, error=437)

        assert client.take() == []
        client.grant(second)
        assert client.allocation.state is State.ALLOCATED

    def test_a_relay_that_answers_bindings_only_is_given_up(self) -> None:
        client, _ = reach_allocate(ipv6=None)
        client.take_events()
        client.run_until(20.0)

        assert client.changes() == [FAILED_SILENTLY]
        assert client.allocation.active_socket is None

    def test_an_unreachable_second_address_changes_nothing(self) -> None:
        client, request = reach_allocate()
        client.challenge(request)
        client.grant(client.take_one(Method.ALLOCATE))
        client.take_events()
        client.run_until(20.0)

        assert [sent.at for sent in client.take(Method.BINDING)] == [1.0, 2.5, 4.75]
        assert client.changes() == []
        assert client.allocation.state is State.ALLOCATED

    def test_it_is_not_given_up_at_once_but_after_all_addresses_stayed_silent(self) -> None:
        client = Client()
        assert client.changes() == []
        client.run_until(8.0)
        assert client.changes() == []
        client.run_until(9.0)

        assert client.changes() == [FAILED_SILENTLY]
        assert len(client.sent) == 8

    def test_a_deadline_that_was_missed_is_never_in_the_past(self) -> None:
        client = Client()
        client.now += 5.0
        client.bind(PEER4)
        timeout = client.allocation.next_timeout()

        assert timeout is not None
        assert (timeout.at, timeout.reason) == (client.now, "turn:retransmission")

    def test_a_silent_relay_takes_candidates_channels_and_requests_along(self) -> None:
        client = bound(PEER4)
        client.bind(OTHER4)
        client.run_for(8.2)

        assert client.changes() == [("lost", RELAYED, RELAYED4), ("lost", RELAYED, RELAYED6), FAILED_SILENTLY]
        assert client.allocation.channel_to(PEER4, client.now) is None
        assert client.allocation.next_timeout() is None


def test_every_state_can_be_reached_and_closed() -> None:
    reached = {State.SEARCHING}
    for _ in State:
        reached |= {following for state in reached for following in TRANSITIONS[state]}

    assert reached == set(TRANSITIONS) == set(State)
    assert [state for state in State if State.CLOSED not in TRANSITIONS[state]] == [State.CLOSED]


@settings(max_examples=examples(60))
@given(st.data())
def test_no_sequence_of_answers_breaks_it(data: st.DataObject) -> None:
    """Any mix of answers, signed or not, time and calls: no exception, no deadline in the past, bounded sending."""
    client = Client(realm=data.draw(st.sampled_from(["firezone", None])))
    recent = list(client.sent)
    for _ in range(data.draw(st.integers(1, 40))):
        recent = (recent + client.take())[-6:]
        before = client.allocation.counters.requests_sent
        match data.draw(st.sampled_from(["answer", "answer", "answer", "time", "bind", "refresh", "restart"])):
            case "answer":
                sent = data.draw(st.sampled_from(recent))
                chosen = data.draw(st.lists(st.sampled_from(_ATTRIBUTES), max_size=5))
                error = data.draw(st.sampled_from([None, None, 300, 400, 401, 403, 420, 437, 438, 486, 500]))
                client.answer(sent.message, *chosen, error=error, key=data.draw(_KEYS), source=sent.destination)
            case "time":
                client.run_for(data.draw(st.sampled_from([0.0, 0.3, 1.0, 9.0, 30.0, 301.0, 700.0])))
                before = client.allocation.counters.requests_sent
            case "bind":
                client.bind(PEER4, OTHER4)
            case "refresh":
                client.refresh()
            case "restart":
                client.restart()
        assert client.allocation.counters.requests_sent - before <= 4
        assert (client.allocation.state is State.ALLOCATED) == any(
            candidate.kind is RELAYED for candidate in client.allocation.candidates
        )
    found = [event.candidate for event in client.events if isinstance(event, CandidateFound)]
    assert all(candidate in found for candidate in client.allocation.candidates)


_KEYS = st.sampled_from([KEY, KEY, KEY, None, bytes(16)])
_ATTRIBUTES = [
    (stun.XOR_MAPPED_ADDRESS, MAPPED4),
    (stun.XOR_MAPPED_ADDRESS, MAPPED6),
    (stun.XOR_RELAYED_ADDRESS, RELAYED4),
    (stun.XOR_RELAYED_ADDRESS, RELAYED6),
    (stun.XOR_RELAYED_ADDRESS, SocketAddress("::", 0)),
    (stun.LIFETIME, 0),
    (stun.LIFETIME, 600),
    (stun.LIFETIME, 1),
    (stun.LIFETIME, 0xFFFFFFFF),
    (stun.NONCE, "n1"),
    (stun.NONCE, "n2"),
    (stun.REALM, "firezone"),
    (stun.REALM, "elsewhere"),
]
