"""The events and counters of an allocation."""

from __future__ import annotations

import enum

import attrs

from firezone_tunnel.core.ice.candidate import Candidate


@attrs.frozen
class CandidateFound:
    """Offer this candidate to peers: a host or reflexive one that the relay showed us, or one at the relay."""

    candidate: Candidate


@attrs.frozen
class CandidateLost:
    """Take this candidate back."""

    candidate: Candidate


class FailureReason(enum.Enum):
    """The value completes the sentence "the relay …"."""

    NO_RESPONSE = "did not answer: is UDP to it blocked?"
    NO_AUTHENTIC_RESPONSE = "sent no answer that matches our credentials: are they wrong?"
    CREDENTIALS_REJECTED = "rejected our credentials: they are wrong or expired"
    PROTOCOL = "does not understand an attribute that we need"


@attrs.frozen
class Failed:
    """The allocation has ended and can be freed. Only the portal can announce the relay again."""

    reason: FailureReason


AllocationEvent = CandidateFound | CandidateLost | Failed


@attrs.define
class AllocationCounters:
    requests_sent: int = 0
    """Retransmissions included."""
    answers_received: int = 0
    unauthentic: int = 0
    """Answers to open requests that are not signed, or not with our credentials."""
    unexpected: int = 0
    """Messages from the relay that answer no request, or are invalid."""
    binds_refused: int = 0
    """Channels that were not requested: allocation suspended, address family not granted, too many peers waiting."""
