"""One pair of transport keys: its counters, its lifetime and its replay window (whitepaper, sections 5.4.6 and 6)."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from firezone_tunnel.core.wireguard.handshake import TransportKeys

REKEY_AFTER_MESSAGES = 2**60  # whitepaper, section 6.1, this one and the next three
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1
REKEY_AFTER_TIME = 120.0
REJECT_AFTER_TIME = 180.0
INITIATOR_SENDS_FOR = 170.0  # docs/protocol/data-plane.md, 2.8
WINDOW_SIZE = 8192  # docs/protocol/data-plane.md, 2.8: V2's; a 64 KiB batch that is overtaken by others must still fit

Mask = npt.NDArray[np.bool_]
Counters = npt.NDArray[np.uint64]


@attrs.define
class PeerCounters:
    """Counters of the peers that share this object, over all of their sessions."""

    initiations_sent: int = 0
    responses_sent: int = 0
    keepalives_sent: int = 0
    messages_sent: int = 0
    sessions_established: int = 0
    initiations_rejected: int = 0
    initiations_replayed: int = 0
    responses_rejected: int = 0
    cookie_replies_rejected: int = 0
    replayed: int = 0
    forged: int = 0


class Session:
    """The two directions of one handshake's result. `receiver_index` is ours, `peer_index` the other side's."""

    __slots__ = (
        "__weakref__",
        "_bitmap",
        "_counters",
        "_last",
        "confirmed",
        "created_at",
        "initiator",
        "open_cipher",
        "peer_index",
        "receiver_index",
        "seal_cipher",
        "send_counter",
        "serial",
    )

    def __init__(
        self,
        keys: TransportKeys,
        *,
        receiver_index: int,
        peer_index: int,
        initiator: bool,
        serial: int,
        counters: PeerCounters,
        now: float,
    ) -> None:
        self.seal_cipher = ChaCha20Poly1305(keys.send)
        self.open_cipher = ChaCha20Poly1305(keys.receive)
        self.receiver_index = receiver_index
        self.peer_index = peer_index
        self.initiator = initiator
        self.confirmed = initiator
        self.serial = serial
        self.created_at = now
        self.send_counter = 0
        self._counters = counters
        self._last = -1
        self._bitmap = 0  # bit i: counter `_last - i` was seen

    def may_send(self, now: float) -> bool:
        lifetime = INITIATOR_SENDS_FOR if self.initiator else REJECT_AFTER_TIME
        return now < self.created_at + lifetime and self.send_counter < REJECT_AFTER_MESSAGES - _LARGEST_TURN

    def may_receive(self, now: float) -> bool:
        return now < self.created_at + REJECT_AFTER_TIME

    def wants_rekey_after_sending(self, now: float) -> bool:
        """Only its initiator renews a session for its age, so that not both do; too many messages concern both."""
        aged = self.initiator and now >= self.created_at + REKEY_AFTER_TIME
        return aged or self.send_counter >= REKEY_AFTER_MESSAGES

    def take_counters(self, count: int) -> int:
        """Reserve `count` successive send counters; returns the first."""
        first = self.send_counter
        self.send_counter = first + count
        return first

    def accept(self, counters: Sequence[int] | Counters, authentic: Sequence[bool] | Mask) -> Mask:
        """Enter the counters of a batch, in order, into the replay window. Returns a mask of the new ones.

        Only authentic messages count: a forged one must not shut out the real one. The mask may be `authentic`
        itself.
        """
        numbers = np.asarray(counters, np.uint64)
        genuine = np.asarray(authentic, np.bool_)
        count = len(numbers)
        # A run right after or beyond the last counter, all of it authentic, is what a working path delivers.
        # Comparing bytes costs a tenth of NumPy's reductions on arrays this short.
        if 0 < count <= _MAX_RUN and genuine.tobytes() == _TRUE[:count]:
            first = int(numbers[0])
            last = first + count - 1
            run = first > self._last and last < REJECT_AFTER_MESSAGES
            if run and (numbers - numbers[0]).tobytes() == _RAMP[: 8 * count]:
                shift = last - self._last
                seen = (1 << count) - 1
                self._bitmap = (self._bitmap << shift | seen) & _WINDOW if shift < WINDOW_SIZE else seen
                self._last = last
                return genuine
        return self._accept_each(numbers, genuine)

    def accept_lone(self, counter: int | None) -> bool:
        """`accept` for a lone message; `counter` is None if it is forged.

        Without NumPy, which costs ten times as much for a lone message as for one of a batch.
        """
        if counter is None:
            self._counters.forged += 1
            return False
        ahead = counter - self._last
        if counter >= REJECT_AFTER_MESSAGES or -ahead >= WINDOW_SIZE:
            self._counters.replayed += 1
            return False
        if ahead > 0:
            self._bitmap = (self._bitmap << ahead | 1) & _WINDOW if ahead < WINDOW_SIZE else 1
            self._last = counter
            return True
        bit = 1 << -ahead
        if self._bitmap & bit:
            self._counters.replayed += 1
            return False
        self._bitmap |= bit
        return True

    def close(self) -> None:
        """Let go of the keys. The cipher objects hold the only copies; nothing can be sealed or opened afterwards."""
        del self.seal_cipher, self.open_cipher

    def __repr__(self) -> str:
        role = "initiator" if self.initiator else "responder"
        return f"<Session {self.receiver_index:#010x} {role} since {self.created_at:.3f}>"

    def _accept_each(self, numbers: Counters, genuine: Mask) -> Mask:
        fresh = np.zeros(len(numbers), np.bool_)
        for position, (number, is_genuine) in enumerate(zip(numbers.tolist(), genuine.tolist(), strict=True)):
            fresh[position] = self.accept_lone(number if is_genuine else None)
        return fresh


_LARGEST_TURN = 8192  # more counters than are taken between two calls of `may_send`
_MAX_RUN = 64  # segments of one batch
_WINDOW = (1 << WINDOW_SIZE) - 1
_TRUE = np.ones(_MAX_RUN, np.bool_).tobytes()
_RAMP = np.arange(_MAX_RUN, dtype=np.uint64).tobytes()
