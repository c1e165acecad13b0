# One image per role: docker build --target client|gateway|portal .  (`server` is the demo's private server)
# The images share all layers and differ in entry point, health check, volumes and ports.

FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY twisted_plugins twisted_plugins
COPY firezone_tunnel firezone_tunnel
RUN python -m venv /opt/firezone && /opt/firezone/bin/pip install --no-cache-dir .
# Write twistd's plugin cache now, because a container's file system may be read-only.
RUN /opt/firezone/bin/twistd --help >/dev/null

FROM python:3.12-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl iproute2 nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/firezone /opt/firezone
COPY docker/ /usr/local/lib/firezone/
ENV PATH="/opt/firezone/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    FIREZONE_LOG_FORMAT=json
# twistd shuts down cleanly on SIGTERM. This is Docker's default, stated explicitly.
STOPSIGNAL SIGTERM

FROM base AS client
VOLUME /var/lib/dev.firezone.client/config
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s --retries=5 CMD ["/usr/local/lib/firezone/health-client"]
ENTRYPOINT ["/usr/local/lib/firezone/client"]

FROM base AS gateway
VOLUME /var/lib/firezone
EXPOSE 8080/tcp
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s --retries=5 CMD ["curl", "--fail", "--silent", "--max-time", "2", "http://127.0.0.1:8080/readyz"]
ENTRYPOINT ["/usr/local/lib/firezone/gateway"]

FROM base AS portal
VOLUME /var/lib/firezone
EXPOSE 8081/tcp
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s --retries=5 CMD ["curl", "--fail", "--silent", "--max-time", "2", "http://127.0.0.1:8081/healthz"]
ENTRYPOINT ["/usr/local/lib/firezone/portal"]

FROM base AS server
RUN apt-get update \
    && apt-get install -y --no-install-recommends iperf3 \
    && rm -rf /var/lib/apt/lists/*
COPY tests/system/web_server.py /usr/local/lib/firezone/
EXPOSE 80/tcp 5201/tcp 5201/udp
HEALTHCHECK --interval=5s --timeout=3s --retries=5 CMD ["curl", "--fail", "--silent", "--max-time", "2", "--output", "/dev/null", "http://127.0.0.1/bytes?num=1"]
ENTRYPOINT ["/usr/local/lib/firezone/server"]
