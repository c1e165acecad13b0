"""Database migrations, which Alembic runs when the portal starts."""
