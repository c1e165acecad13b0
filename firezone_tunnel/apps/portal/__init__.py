"""The portal: what `twistd firezone-portal` runs."""
