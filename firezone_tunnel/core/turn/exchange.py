"""Requests to one relay and the answers to them: signing, retransmission, and which answers are believed.

Sources: docs/protocol/data-plane.md, 3.3 to 3.5; RFC 8489, section 9.2. Servers that sign no challenge:
docs/decisions.md, 4.
"""

from __future__ import annotations

import enum
from collections import deque

from firezone_tunnel.core.sansio import Entropy, Transmit
from firezone_tunnel.core.stun.message import ERROR_CODE, TRANSACTION_ID_SIZE, Kind, Message, Method
from firezone_tunnel.core.stun.transaction import Transactions
from firezone_tunnel.core.turn.credentials import LongTermCredentials
from firezone_tunnel.core.turn.events import AllocationCounters, FailureReason
from firezone_tunnel.core.turn.request import Request

MAX_CHALLENGES = 3  # later challenges of a request are followed when it is next due, not at once


class Outcome(enum.Enum):
    """The effect of an answer on its request."""

    OPEN = "open"
    """It still waits: the answer was not believed, or the request was sent again with other credentials."""
    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    MISMATCHED = "mismatched"
    """437: the relay and we disagree whether there is an allocation. The request still waits."""
    CREDENTIALS_REJECTED = "credentials rejected"
    NOT_UNDERSTOOD = "not understood"
    """420: the relay does not know an attribute that we need."""


class Exchange:
    """The open requests of one allocation. Drain `transmits` after each call."""

    def __init__(self, credentials: LongTermCredentials, entropy: Entropy, counters: AllocationCounters) -> None:
        self.open: Transactions[Request] = Transactions()
        self.transmits: deque[Transmit] = deque()
        self._credentials = credentials
        self._entropy = entropy
        self._counters = counters
        self._expects_unsigned = credentials.realm is None
        self._distrusted = False

    @property
    def reason_for_silence(self) -> FailureReason:
        """Why no answer has been accepted since the last one, or since `drop_all`."""
        return FailureReason.NO_AUTHENTIC_RESPONSE if self._distrusted else FailureReason.NO_RESPONSE

    def start(self, request: Request, now: float) -> None:
        """Send a new request. All but BINDINGs are signed, as soon as there is a key."""
        request.is_signed = request.method != Method.BINDING and self._credentials.key is not None
        self.send(request, now)

    def send(self, request: Request, now: float) -> None:
        """Send a started request, for the first time or again."""
        # A BINDING keeps its id; what is signed anew is a new request to the relay (docs/protocol/data-plane.md, 3.4).
        reused = request.latest_id if request.method == Method.BINDING else None
        transaction_id = reused or self._entropy(TRANSACTION_ID_SIZE)
        self.transmits.append(Transmit(request.destination, self._encode(request, transaction_id)))
        self.open.sent(request, transaction_id, now)
        self._counters.requests_sent += 1

    def encode_unanswered(self, request: Request) -> Transmit:
        """The signed datagram of a request whose answer nobody waits for."""
        request.is_signed = True
        return Transmit(request.destination, self._encode(request, self._entropy(TRANSACTION_ID_SIZE)))

    def finish(self, request: Request) -> None:
        """Its answer was accepted."""
        self._counters.answers_received += 1
        self._distrusted = False
        self.open.finish(request)

    def drop_all(self) -> None:
        """Wait for no answer any longer."""
        self._distrusted = False
        for request in self.open:
            self.open.finish(request)

    def drop_authenticated(self) -> None:
        """Wait for the answers to BINDINGs only."""
        for request in self.open:
            if request.method != Method.BINDING:
                self.open.finish(request)

    def judge(self, request: Request, message: Message, now: float, *, is_allocated: bool) -> Outcome:
        """Take an answer to any request but a BINDING. Repeats the request where the answer is a challenge."""
        key = self._credentials.key
        if key is not None and message.is_authentic(key):
            return self._judge_authentic(request, message, now)
        outcome = self._judge_unsigned(request, message, now, is_allocated=is_allocated)
        if outcome is None:
            # The request stays open: otherwise anybody who sees it could end it. Wrong credentials look like silence.
            self._counters.unauthentic += 1
            self._distrusted = True
        return outcome or Outcome.OPEN

    def _judge_authentic(self, request: Request, message: Message, now: float) -> Outcome:
        if message.kind is Kind.SUCCESS:
            # Upstream ignores answers to earlier transmissions; a round trip of more than a second defeats it.
            self.finish(request)
            return Outcome.SUCCEEDED
        error = message.get(ERROR_CODE)
        if error is None or message.transaction_id != request.latest_id:
            self._counters.unexpected += 1
            return Outcome.OPEN
        if error.code == 401 and request.nonce is not None and request.nonce == self._credentials.vouched_nonce:
            return Outcome.CREDENTIALS_REJECTED
        if error.code in {401, 438}:
            if not self._follow_challenge(request, message, now, first=False, is_vouched=True):
                self._counters.unexpected += 1
            return Outcome.OPEN
        if error.code == 420:
            return Outcome.NOT_UNDERSTOOD
        if error.code == 437:
            return Outcome.MISMATCHED
        self.finish(request)
        return Outcome.REFUSED

    def _judge_unsigned(self, request: Request, message: Message, now: float, *, is_allocated: bool) -> Outcome | None:
        """A standard TURN server doesn't sign its challenges. Returns None for an answer that can't be believed.

        An unsigned challenge may begin an attempt, and its nonce may be tried, but it ends nothing: the relay's own
        answer to the same request is still accepted, and the relay's reaction to that nonce proves nothing.
        """
        error = message.get(ERROR_CODE)
        if message.kind is not Kind.ERROR or message.has_integrity or error is None:
            return None
        if message.transaction_id != request.latest_id:
            return None
        if request.nonce is None:
            if error.code in {401, 438} and self._follow_challenge(request, message, now, first=True, is_vouched=False):
                self._expects_unsigned = True
                return Outcome.OPEN
            if error.code in {400, 401, 438} and request.is_signed:
                # coturn rejects a request with credentials but without a nonce as malformed (docs/decisions.md, 4).
                request.is_signed = False
                request.start_over()
                self.send(request, now)
                return Outcome.OPEN
        elif error.code == 438 and (self._expects_unsigned or not is_allocated):
            followed = self._follow_challenge(request, message, now, first=False, is_vouched=False)
            return Outcome.OPEN if followed else None
        may_be_standard = self._expects_unsigned or request.nonce is None
        if error.code == 437 and request.method == Method.ALLOCATE and may_be_standard:
            return Outcome.MISMATCHED
        return None

    def _follow_challenge(
        self, request: Request, message: Message, now: float, *, first: bool, is_vouched: bool
    ) -> bool:
        """Sign the request with the realm and nonce of a 401 or 438, and send it again. False: they can't be used."""
        if not self._credentials.take_challenge(message, first=first, is_vouched=is_vouched):
            return False
        request.is_signed = True
        request.challenges += 1
        if request.challenges <= MAX_CHALLENGES:
            request.start_over()
            self.send(request, now)
        return True

    def _encode(self, request: Request, transaction_id: bytes) -> bytes:
        if not request.is_signed:
            request.nonce = None
            return Message(request.method, Kind.REQUEST, transaction_id, request.attributes).encode()
        request.nonce = self._credentials.nonce
        attributes = request.attributes + self._credentials.attributes()
        return Message(request.method, Kind.REQUEST, transaction_id, attributes).encode(key=self._credentials.key)
