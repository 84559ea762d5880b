# Build:  docker build -t oneinbox-broker .
# Run:    docker run --rm -p 8000:8000 --env-file .env oneinbox-broker
# Try:    docker run --rm -p 8000:8000 oneinbox-broker sandbox --host 0.0.0.0
# Both stages start from the same image: the virtual environment points at its Python.
FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /build && python -m venv --without-pip /opt/broker
# sandbox.lock: also what the sandbox's agent needs to talk on a LiveKit server.
ARG LOCK=requirements.lock
COPY deploy/requirements.lock deploy/sandbox.lock deploy/build.lock ./
RUN pip --python /opt/broker/bin/python install --require-hashes --only-binary :all: -r "$LOCK" \
 && /build/bin/pip install --require-hashes --only-binary :all: -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN /build/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /wheels . \
 && pip --python /opt/broker/bin/python install --no-deps --no-index /wheels/*.whl

FROM python:3.13-slim
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="oneinbox-broker" \
      org.opencontainers.image.description="Token broker between a browser and the OneInbox voice API" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
# The base brings pip; a running broker never installs anything.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/broker /opt/broker
ENV PATH="/opt/broker/bin:$PATH" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
  CMD ["python", "-IS", "-c", "import os; from http.client import HTTPConnection as C; c = C('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=2); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["oneinbox-broker"]
CMD ["serve", "--host", "0.0.0.0"]
