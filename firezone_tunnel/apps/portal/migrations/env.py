"""Alembic's entry: it runs this file with the connection that the store holds."""

from __future__ import annotations

from alembic import context


def migrate() -> None:
    context.configure(connection=context.config.attributes["connection"], transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


if hasattr(context, "config"):  # only while Alembic is at work
    migrate()
