"""Devices, relays, flows, and the portal's own secrets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "secrets",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("owner", sa.String(36), nullable=False),
        sa.Column("external_id", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("public_key", sa.String, nullable=False),
        sa.Column("psk_base", sa.LargeBinary, nullable=False),
        sa.Column("ipv4", sa.String, nullable=False, unique=True),
        sa.Column("ipv6", sa.String, nullable=False, unique=True),
        sa.Column("remote_ip", sa.String, nullable=False),
        sa.Column("user_agent", sa.String, nullable=False),
        sa.Column("last_seen_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("role", "owner", "external_id"),
    )
    op.create_table(
        "relays",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("host", sa.String, nullable=False),
        sa.Column("port", sa.Integer, nullable=False),
        sa.Column("last_seen_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("host", "port"),
    )
    op.create_table(
        "flows",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("client_id", sa.String(36), sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False),
        sa.Column("gateway_id", sa.String(36), sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False),
        sa.Column("resource_id", sa.String(36), nullable=False),
        sa.Column("policy_id", sa.String(36), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False),
        sa.Column("reach", sa.String, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=True),
        sa.UniqueConstraint("client_id", "gateway_id", "resource_id"),
    )
    op.create_index("flows_of_gateway", "flows", ["gateway_id"])


def downgrade() -> None:
    for table in ("flows", "relays", "devices", "secrets"):
        op.drop_table(table)
