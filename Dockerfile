# Targets: api (the HTTP process), worker-cpu (draws through ONNX Runtime), worker-gpu (through TensorRT and torch), and
# queue (a Valkey out of a Python package, for where no image of one can be had).
# BASE is any Debian with Python >= 3.11 and its venv module. BUILD_BASE, by default the same, may know more
# (certificates, settings of pip): of it only /opt/venv goes into an image. The order of the stages matters to builders
# that build all of them down to the target.
ARG BASE=python:3.11-slim-bookworm
ARG BUILD_BASE

FROM ${BUILD_BASE:-$BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
# s3.lock: with what pictures in an S3-compatible store need (FEWSTEP_RESULTS).
ARG LOCK=serve.lock
RUN python3 -m venv /tmp/installer && python3 -m venv --without-pip /opt/venv
COPY requirements/${LOCK} /tmp/serve.lock

FROM build AS dependencies
RUN /tmp/installer/bin/pip --python /opt/venv/bin/python3 --disable-pip-version-check --quiet \
        install --no-cache-dir --no-deps --require-hashes -r /tmp/serve.lock

FROM ${BASE} AS bare
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fewstep" \
    org.opencontainers.image.description="Serves pictures of a few-step student" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# A volume takes over the owner of the folder that it is mounted on first.
RUN useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin fewstep \
    && install -d -o fewstep -g fewstep -m 0755 /data /data/results /secrets/queue /secrets/metrics /secrets/grafana
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FEWSTEP_DATA_DIR=/data
WORKDIR /app

FROM bare AS runtime
COPY --from=dependencies /opt/venv /opt/venv
COPY LICENSE /app/
COPY student /app/student
COPY rewards /app/rewards
COPY service /app/service
COPY fewstep /app/fewstep
COPY models /app/models
USER 10001:10001

FROM runtime AS worker-cpu
HEALTHCHECK --interval=20s --timeout=15s --start-period=60s CMD ["python", "-m", "service.run", "probe"]
CMD ["python", "-m", "service.run", "worker"]

FROM runtime AS api
ENV FEWSTEP_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-I", "-S", "-c", "import http.client; \
    c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=3); c.request('GET', '/healthz'); \
    assert c.getresponse().status == 200"]
CMD ["python", "-m", "service.run", "api"]

FROM runtime AS queue
USER root
RUN ln -s "$(python -c 'from service.supervise.redis_server import find_program; print(find_program())')" \
    /usr/local/bin/valkey-server
USER 10001:10001
WORKDIR /data
EXPOSE 6379
# Healthchecks run for as long as the container does: these start an interpreter and nothing more.
HEALTHCHECK --interval=5s --timeout=5s CMD ["python", "-I", "-S", "-c", "import socket; \
    s = socket.create_connection(('127.0.0.1', 6379), 2); s.sendall(b'PING\\r\\n'); assert s.recv(5) in (b'+PONG', b'-NOAU')"]
# Inside a container's network the port is open to the network's members, as it is in the images of Valkey and Redis.
ENTRYPOINT ["valkey-server"]

FROM build AS gpu-dependencies
COPY requirements/gpu.lock /tmp/gpu.lock
RUN /tmp/installer/bin/pip --python /opt/venv/bin/python3 --disable-pip-version-check --quiet \
        install --no-cache-dir --no-deps --require-hashes -r /tmp/gpu.lock
# TensorRT's libraries are in NVIDIA's own index alone: NVIDIA_INDEX=https://pypi.nvidia.com adds them, of the release of
# the bindings. Without it the image draws through TensorRT-RTX, ONNX Runtime and torch.
ARG NVIDIA_INDEX=
RUN [ -z "$NVIDIA_INDEX" ] || /tmp/installer/bin/pip --python /opt/venv/bin/python3 --disable-pip-version-check --quiet \
        install --no-cache-dir --no-deps --extra-index-url "$NVIDIA_INDEX" \
        $(sed -n 's/^tensorrt-cu13-bindings==\([0-9.]*\).*/tensorrt-cu13==\1 tensorrt-cu13-libs==\1/p' /tmp/gpu.lock)

FROM bare AS worker-gpu
COPY --from=gpu-dependencies /opt/venv /opt/venv
COPY LICENSE /app/
COPY student /app/student
COPY rewards /app/rewards
COPY service /app/service
COPY fewstep /app/fewstep
COPY models /app/models
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
HEALTHCHECK --interval=20s --timeout=15s --start-period=300s CMD ["python", "-m", "service.run", "probe"]
CMD ["python", "-m", "service.run", "worker"]
